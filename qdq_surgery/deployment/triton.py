"""A deployed file as Triton's model repository: a folder of the model with its config, and a folder of its version."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from qdq_surgery.deployment.folder import FILE
from qdq_surgery.errors import OptionError
from qdq_surgery.targets.session import Port
from qdq_surgery.targets.target import Target

__all__ = ["REPOSITORY", "check_repository", "write_repository"]

#: Where the repository lies in a deployed folder: what the server is started with.
REPOSITORY = Path("triton")

#: Rows that a request may have; the file takes any number.
_MOST_ROWS = 64

_TYPES = {"float32": "FP32", "float16": "FP16", "int64": "INT64", "int32": "INT32", "uint8": "UINT8", "bool": "BOOL"}


def check_repository(name: str, target: Target) -> None:
    """Whether a model can be written for Triton.

    Args:
        name: The model's on the server.

    Raises:
        OptionError: The name is no folder's, or the runtime takes no files.
    """
    if re.fullmatch(r"[A-Za-z0-9_][\w.-]*", name, re.ASCII) is None:
        raise OptionError(f"--triton {name!r} is no name of a model; give letters, digits, and . _ -")
    if target.session is None:
        raise OptionError(
            f"--triton: Triton serves engines of {target.title}, which are built where they run; leave it out, and "
            "build one from the file"
        )


def write_repository(draft: Path, name: str, target: Target) -> None:
    """Write the repository into a deployed folder, with a copy of its file.

    Args:
        draft: The folder, which has the file.
        name: The model's on the server.

    Raises:
        OptionError: See :func:`check_repository`.
    """
    check_repository(name, target)
    assert target.session is not None
    version = draft / REPOSITORY / name / "1"
    version.mkdir(parents=True)
    for file in sorted((draft / FILE.parent).glob(f"{FILE.name}*")):  # with its weights, if they lie beside it
        shutil.copy(file, version / file.name)
    session = target.session(draft / FILE)
    text = _config(name, target.session.runtime, session.inputs, session.outputs)
    (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")


def _config(name: str, backend: str, inputs: Iterable[Port], outputs: Iterable[Port]) -> str:
    """What Triton calls a ModelConfig. It runs on the CPU, which the file is written for, where there is a GPU, too."""
    head = (
        f'name: "{name}"\nbackend: "{backend}"\ndefault_model_filename: "{FILE.name}"\nmax_batch_size: {_MOST_ROWS}\n'
    )
    ports = "".join(_port("input", each) for each in inputs) + "".join(_port("output", each) for each in outputs)
    return f"{head}{ports}instance_group [ {{ count: 1, kind: KIND_CPU }} ]\n"


def _port(role: str, port: Port) -> str:
    """An input or an output: the first axis is that of the rows, which Triton adds itself."""
    sizes = ", ".join("-1" if size is None else str(size) for size in port.shape[1:])
    shape = f"dims: [ {sizes} ]" if sizes else "dims: [ 1 ], reshape: { shape: [ ] }"  # Triton has no empty dims
    kind = f"TYPE_{_TYPES[np.dtype(port.dtype).name]}"
    return f'{role} [ {{ name: "{port.name}", data_type: {kind}, {shape} }} ]\n'
