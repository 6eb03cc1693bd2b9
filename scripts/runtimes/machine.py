"""What the figures were measured with: versions and what the processor can do. No names, no paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["describe"]

PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "openvino", "nncf", "torchao", "qdq-surgery")

#: As Linux names them; the first two words of each decide how fast INT8 and bf16 are.
FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
)


def describe(threads: int, information: Path = Path("/proc/cpuinfo")) -> dict[str, Any]:
    """Versions of what is installed, processor flags (empty where the system does not tell) and threads."""
    return {
        "python": platform.python_version(),
        "versions": _versions(PACKAGES),
        "architecture": platform.machine(),
        "flags": _flags(information),
        "cores": os.cpu_count(),
        "threads": threads,
    }


def _versions(packages: Sequence[str]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _flags(information: Path) -> list[str]:
    if not information.is_file():
        return []
    lines = information.read_text(encoding="utf-8", errors="replace").splitlines()
    listed = next((line for line in lines if line.partition(":")[0].strip() in ("flags", "Features")), "")
    words = set(listed.partition(":")[2].split())
    return [flag for flag in FLAGS if flag in words]
