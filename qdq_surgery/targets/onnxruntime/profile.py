"""ONNX Runtime on CPUs: how its files are written, and where the rest of it is."""

from __future__ import annotations

from qdq_surgery.targets.onnxruntime.engine_graph import run_by_onnxruntime
from qdq_surgery.targets.onnxruntime.session import OnnxRuntimeSession, on_x86
from qdq_surgery.targets.target import Target

__all__ = ["ONNXRUNTIME"]


def _cpu_activations() -> tuple[str, ...]:
    # ONNX Runtime's kernels for x86 multiply unsigned activations by signed weights (PMADDUBSW, VNNI); those for Arm
    # are made for signed ones.
    return ("uint8", "int8") if on_x86() else ("int8", "uint8")


#: Why each value is what it is: DESIGN in words, scripts/benchmark_runtimes.py in figures.
ONNXRUNTIME = Target(
    "onnxruntime",
    "ONNX Runtime",
    opset=20,  # the first with Gelu as one operator
    opsets=(19, 23),
    activations=_cpu_activations(),
    lint="qdq_surgery.targets.onnxruntime.lint",
    executed=run_by_onnxruntime,
    session=OnnxRuntimeSession,
    # ONNX Runtime 1.31 on a CPU: BiasGelu takes more time than Add and Gelu, SkipLayerNormalization four times that of
    # Add and LayerNormalization, and with fixed shapes a product that is fused with its bias is a Gemm in float.
    plain_bias=True,
    plain_skip_norm=True,
)
