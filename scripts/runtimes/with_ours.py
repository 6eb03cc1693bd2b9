"""This project's own: converted, calibrated and exported for each runtime."""

from __future__ import annotations

from pathlib import Path

import qdq_surgery as qs
from runtimes.with_onnxruntime import open_session
from runtimes.with_openvino import compile_model
from runtimes.workspace import Contender, Prepared, Workspace, package, tensors

__all__ = ["CONTENDERS"]


#: What the targets' rules are without scales per channel.
PLAIN = """schema: 1
name: plain
extends: qdqbert
exclude:
  - {sites: "add_*", why: residual adds stay in float}
"""


def _plain(workspace: Workspace) -> Path:
    path = workspace.folder / "plain.yaml"
    path.write_text(PLAIN, encoding="utf-8")
    return path


def _export(workspace: Workspace, target: str, rules: str) -> list[Path]:
    """The file for a target, and that of its large data if it has one; made once."""
    path = workspace.folder / f"ours-{target}-{rules}.onnx"
    if not path.is_file():
        qmodel = qs.convert(workspace.model, rules=_plain(workspace) if rules == "plain" else rules)
        batches = [tensors(batch) for batch in workspace.calibration]
        qs.calibrate(qmodel, batches, "max")
        qs.export_onnx(qmodel, path, batches[0], target, parity=False)
    return sorted(workspace.folder.glob(f"{path.name}*"))


def _onnxruntime(workspace: Workspace, rules: str = "onnxruntime") -> Prepared:
    package("onnxruntime")
    files = _export(workspace, "onnxruntime", rules)
    return Prepared(open_session(files[0], workspace.threads), files)


def _openvino(workspace: Workspace, precision: str | None, rules: str = "openvino") -> Prepared:
    package("openvino")
    files = _export(workspace, "openvino", rules)
    return Prepared(compile_model(files[0], workspace.threads, precision), files)


CONTENDERS = (
    Contender("ours-onnxruntime", "ours on ONNX Runtime", _onnxruntime),
    Contender("ours-onnxruntime-plain", "ours on ONNX Runtime, no scales", lambda place: _onnxruntime(place, "plain")),
    Contender("ours-openvino", "ours on OpenVINO", lambda place: _openvino(place, None)),
    Contender("ours-openvino-plain", "ours on OpenVINO, no scales", lambda place: _openvino(place, None, "plain")),
    Contender(
        "ours-openvino-qdqbert",
        "ours on OpenVINO, full recipe as the reference's",
        lambda place: _openvino(place, None, "qdqbert"),
    ),
    Contender("ours-openvino-f32", "ours on OpenVINO, rest float", lambda place: _openvino(place, "f32")),
)
