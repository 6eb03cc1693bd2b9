"""OpenVINO on the float model, and what NNCF makes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from runtimes.subjects import Batch
from runtimes.workspace import Contender, Prepared, Run, Workspace, package, quiet

__all__ = ["CONTENDERS", "compile_model", "quantize_by_nncf"]


def compile_model(path: Path, threads: int, precision: str | None = None) -> Run:
    """A model compiled for the CPU.

    Args:
        path: An ONNX file, or the .xml of OpenVINO's own.
        threads: Of the CPU.
        precision: ``INFERENCE_PRECISION_HINT``; None leaves the choice to OpenVINO, which takes bf16 where the CPU has
            it.
    """
    core = package("openvino").Core()
    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if precision is not None:
        options["INFERENCE_PRECISION_HINT"] = precision
    compiled = core.compile_model(core.read_model(path), "CPU", options)
    request, count = compiled.create_infer_request(), len(compiled.outputs)

    def run(batch: Batch) -> list[NDArray[np.float32]]:
        found = request.infer(batch)
        return [found[index] for index in range(count)]

    return run


def _float(workspace: Workspace, precision: str) -> Prepared:
    package("openvino")
    path = workspace.float_onnx
    return Prepared(compile_model(path, workspace.threads, precision), [path])


def quantize_by_nncf(source: Path, path: Path, batches: Sequence[Batch], preset: str | None = None) -> Path:
    """What NNCF makes of a float model; its path, which ends in .xml.

    Args:
        preset: Its ``QuantizationPreset`` by name; its default if left out.
    """
    openvino, nncf = package("openvino"), package("nncf")
    options = {} if preset is None else {"preset": getattr(nncf.QuantizationPreset, preset)}
    with quiet():
        quantized = nncf.quantize(
            openvino.Core().read_model(source),
            nncf.Dataset(batches),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(batches),
            **options,
        )
        openvino.save_model(quantized, path)
    return path


def _nncf(workspace: Workspace, precision: str | None) -> Prepared:
    for name in ("openvino", "nncf"):
        package(name)
    path = workspace.folder / "nncf.xml"
    if not path.is_file():
        quantize_by_nncf(workspace.float_onnx, path, workspace.calibration)
    return Prepared(compile_model(path, workspace.threads, precision), [path, path.with_suffix(".bin")])


CONTENDERS = (
    Contender("openvino-fp32", "OpenVINO, float", lambda place: _float(place, "f32")),
    Contender("openvino-bf16", "OpenVINO, bf16", lambda place: _float(place, "bf16")),
    Contender("openvino-nncf", "OpenVINO, NNCF's INT8", lambda place: _nncf(place, None)),
    Contender("openvino-nncf-f32", "OpenVINO, NNCF's INT8, rest float", lambda place: _nncf(place, "f32")),
)
