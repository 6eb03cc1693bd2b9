"""ONNX Runtime on the float model, and what its own tools make of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from runtimes.subjects import Batch
from runtimes.workspace import Contender, Prepared, Run, Workspace, package, quiet

__all__ = ["CONTENDERS", "open_session", "quantize_dynamic", "quantize_static"]

#: Fusions that cost time on a CPU: ONNX Runtime 1.31's fused kernels are slower than the operators that they replace.
SLOW_FUSIONS = ("SkipLayerNormFusion", "BiasGeluFusion")


def open_session(path: Path, threads: int, without: Sequence[str] = ()) -> Run:
    """A session on the CPU with every optimisation but those named."""
    onnxruntime = package("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        path, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(without)
    )
    outputs = [each.name for each in session.get_outputs()]
    return lambda batch: session.run(outputs, batch)


class _Reader:
    """The calibration batches, as ONNX Runtime's tools ask for them."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self._rest: Iterator[Batch] = iter(batches)

    def get_next(self) -> Batch | None:
        return next(self._rest, None)


def _float(workspace: Workspace) -> Prepared:
    package("onnxruntime")
    path = workspace.float_onnx
    return Prepared(open_session(path, workspace.threads), [path])


def _unfused(workspace: Workspace) -> Prepared:
    package("onnxruntime")
    path = workspace.float_onnx
    return Prepared(open_session(path, workspace.threads, SLOW_FUSIONS), [path])


def quantize_dynamic(source: Path, path: Path) -> Path:
    """What ONNX Runtime's dynamic quantization makes of a float model; its path."""
    tools = package("onnxruntime.quantization")
    with quiet():
        tools.quantize_dynamic(source, path, per_channel=True, weight_type=tools.QuantType.QInt8)
    return path


def quantize_static(source: Path, path: Path, batches: Sequence[Batch], operators: Sequence[str] | None) -> Path:
    """What ONNX Runtime's static quantization makes of a float model; its path.

    Args:
        operators: Which are quantized; all that it knows if left out.
    """
    tools: Any = package("onnxruntime.quantization")
    with quiet():
        tools.quantize_static(
            source,
            path,
            _Reader(batches),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            op_types_to_quantize=operators,
        )
    return path


def _dynamic(workspace: Workspace) -> Prepared:
    package("onnxruntime")
    path = quantize_dynamic(workspace.float_onnx, workspace.folder / "ort-dynamic.onnx")
    return Prepared(open_session(path, workspace.threads), [path])


def _preprocessed(workspace: Workspace) -> Path:
    """The float model after the preparation that the documentation of the tool asks for.

    Without its symbolic shape inference, which gives up on what the exporter writes for an attention mask.
    """
    path = workspace.folder / "ort-preprocessed.onnx"
    if not path.is_file():
        prepare = package("onnxruntime.quantization.shape_inference").quant_pre_process
        with quiet():
            prepare(str(workspace.float_onnx), str(path), skip_symbolic_shape=True)
    return path


def _static(workspace: Workspace, operators: Sequence[str] | None, name: str) -> Prepared:
    package("onnxruntime")
    path = workspace.folder / f"{name}.onnx"
    quantize_static(_preprocessed(workspace), path, workspace.calibration, operators)
    return Prepared(open_session(path, workspace.threads), [path])


CONTENDERS = (
    Contender("ort-fp32", "ONNX Runtime, float", _float),
    Contender("ort-fp32-unfused", "ONNX Runtime, float, without its slow fusions", _unfused),
    Contender("ort-dynamic", "ONNX Runtime, its dynamic INT8", _dynamic),
    Contender("ort-static", "ONNX Runtime, its static INT8", lambda place: _static(place, None, "ort-static")),
    Contender(
        "ort-static-matmul",
        "ONNX Runtime, its static INT8, MatMul only",
        lambda place: _static(place, ["MatMul"], "ort-static-matmul"),
    ),
)
