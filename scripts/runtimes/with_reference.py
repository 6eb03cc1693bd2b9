"""The real QDQBERT's own ONNX, exported in the environment that has it, on both runtimes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from safetensors.torch import save_file

from runtimes.with_onnxruntime import open_session
from runtimes.with_openvino import compile_model
from runtimes.workspace import Contender, Missing, Prepared, Workspace, package, tensors

__all__ = ["CONTENDERS"]


def _export(workspace: Workspace) -> Path:
    """The ONNX file, made once."""
    path = workspace.folder / "reference.onnx"
    if path.is_file():
        return path
    if workspace.reference is None:
        raise Missing("it needs --reference, a Python with transformers 4.40.2, pytorch-quantization 2.1.3 and onnx")
    given = workspace.folder / "reference"
    given.mkdir(exist_ok=True)
    save_file({name: value.contiguous() for name, value in workspace.model.state_dict().items()}, given / "weights")
    for index, batch in enumerate(workspace.calibration):
        save_file(tensors(batch), given / f"batch-{index}")
    workspace.model.config.to_json_file(given / "config.json", use_diff=False)
    command = [workspace.reference, Path(__file__).with_name("export_reference.py"), given, path]
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(part) for part in command], env=clean, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the reference's export failed: {(done.stderr.strip() or 'no message').splitlines()[-1]}")
    return path


def _onnxruntime(workspace: Workspace) -> Prepared:
    package("onnxruntime")
    path = _export(workspace)
    return Prepared(open_session(path, workspace.threads), [path])


def _openvino(workspace: Workspace, precision: str | None) -> Prepared:
    package("openvino")
    path = _export(workspace)
    return Prepared(compile_model(path, workspace.threads, precision), [path])


CONTENDERS = (
    Contender("reference-ort", "QDQBERT's export on ONNX Runtime", _onnxruntime),
    Contender("reference-openvino", "QDQBERT's export on OpenVINO", lambda place: _openvino(place, None)),
    Contender(
        "reference-openvino-f32", "QDQBERT's export on OpenVINO, rest float", lambda place: _openvino(place, "f32")
    ),
)
