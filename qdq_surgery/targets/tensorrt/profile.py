"""TensorRT: how its files are written, and where the rest of it is."""

from __future__ import annotations

from qdq_surgery.targets.target import Target
from qdq_surgery.targets.tensorrt.engine_graph import run_by_tensorrt

__all__ = ["TENSORRT"]

#: TensorRT is symmetric only: zero point 0, so no unsigned grid. Scales along an axis are for weights. Half-precision
#: scales came with opset 19.
TENSORRT = Target(
    "tensorrt",
    "TensorRT",
    opset=19,
    opsets=(19, 23),
    activations=("int8",),
    lint="qdq_surgery.targets.tensorrt.lint",
    executed=run_by_tensorrt,
    unchecked="which needs an engine; scripts/benchmark_tensorrt.sh builds one",
    precisions=("float32", "float16"),
    unsigned=False,
    activation_axes=False,
    int8_rows=False,
)
