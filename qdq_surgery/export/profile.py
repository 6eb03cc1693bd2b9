"""What each runtime wants of the file: a target is an export profile beside the rule file of the same name.

The rule file says where quantizers go (``rules/onnxruntime.yaml``, ``rules/openvino.yaml``, ``rules/tensorrt.yaml``);
the profile says how they are written. Any converted model can be written for any target: what does not fit together
is what the placement linter tells.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass

from qdq_surgery.errors import ExportError

__all__ = ["ACTIVATIONS", "PRECISIONS", "TARGETS", "Target", "get_target"]

ACTIVATIONS = ("int8", "uint8")
PRECISIONS = ("float32", "float16")

_X86 = ("x86_64", "amd64", "i386", "i686", "x86")


@dataclass(frozen=True)
class Target:
    """How a file for one runtime is written.

    Attributes:
        name: ``onnxruntime``, ``openvino`` or ``tensorrt``.
        opset: The version of ONNX's operators if none is asked for.
        opsets: The versions that can be asked for, first and last.
        activations: The integers that activations may become; the first is the usual one. ``uint8`` is the same grid
            as ``int8``, moved: its zero point is 128.
        precisions: What everything else is computed in; the first is the usual one.
        unsigned: Whether a quantizer with an unsigned grid (zero point 0, 255 steps) can be written.
        plain_bias: Keep the runtime from fusing a bias with a GELU behind it, or with the product before it.
        plain_skip_norm: Keep the runtime from fusing a residual add and the LayerNorm behind it.
    """

    name: str
    opset: int
    opsets: tuple[int, int]
    activations: tuple[str, ...]
    precisions: tuple[str, ...] = ("float32",)
    unsigned: bool = True
    plain_bias: bool = False
    plain_skip_norm: bool = False


def _cpu_activations() -> tuple[str, ...]:
    # ONNX Runtime's kernels for x86 multiply unsigned activations by signed weights (PMADDUBSW, VNNI); those for Arm
    # are made for signed ones.
    return ("uint8", "int8") if platform.machine().lower() in _X86 else ("int8", "uint8")


#: Why each value is what it is: DESIGN in words, scripts/benchmark_runtimes.py in figures.
TARGETS = {
    "onnxruntime": Target(
        "onnxruntime",
        opset=20,  # the first with Gelu as one operator
        opsets=(19, 23),
        activations=_cpu_activations(),
        # ONNX Runtime 1.31 on a CPU: BiasGelu takes more time than Add and Gelu, SkipLayerNormalization four times that
        # of Add and LayerNormalization, and with fixed shapes a product that is fused with its bias is a Gemm in float.
        plain_bias=True,
        plain_skip_norm=True,
    ),
    # Unsigned activations would keep OpenVINO from its fused attention and cost a conversion in front of each GEMM.
    "openvino": Target("openvino", opset=20, opsets=(19, 23), activations=("int8",)),
    # TensorRT is symmetric only: zero point 0, so no unsigned grid. Half-precision scales came with opset 19.
    "tensorrt": Target(
        "tensorrt", opset=19, opsets=(19, 23), activations=("int8",), precisions=PRECISIONS, unsigned=False
    ),
}


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        ExportError: There is none.
    """
    if name not in TARGETS:
        raise ExportError(f"there is no target '{name}'; targets are {', '.join(TARGETS)}")
    return TARGETS[name]
