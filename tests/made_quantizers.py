"""Quantizers for tests: ours, pytorch-quantization's, and those of a spec."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor

from qdq_surgery.quantize.factory import make_quantizer
from qdq_surgery.quantize.provenance import Provenance
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import QuantSpec

__all__ = [
    "CPU",
    "HALF",
    "HALF_IDS",
    "PROPERTY",
    "PROVENANCE",
    "amax_of",
    "calibrate",
    "data",
    "from_spec",
    "quantizer",
    "real",
]

PROPERTY = settings(max_examples=40)
CPU = torch.device("cpu")
HALF = [torch.float16, torch.bfloat16]
HALF_IDS = ["float16", "bfloat16"]

PROVENANCE = Provenance(
    quantizer="encoder.layer.0.attention.matmul_q_input_quantizer",
    role="input",
    rule="attention-matmuls",
    rules="qdqbert",
    why="both matmuls run in int8",
    declared="qdqbert.yaml:12",
    operand="matmul(q)",
    source="modeling_bert.py:180",
    descriptor="int8 per-tensor max",
)


def data(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantizer(**descriptor: Any) -> TensorQuantizer:
    return TensorQuantizer(QuantDescriptor(**descriptor))


def real(**descriptor: Any) -> quant_nn.TensorQuantizer:
    return quant_nn.TensorQuantizer(QuantDescriptor(**descriptor))


def from_spec(spec: QuantSpec | None, default: QuantDescriptor | None = None) -> TensorQuantizer:
    return make_quantizer(spec, default or QuantDescriptor(), PROVENANCE, CPU)


def calibrate(target: quant_nn.TensorQuantizer, batches: list[Tensor]) -> None:
    target.enable_calib()
    target.disable_quant()
    for batch in batches:
        target(batch)
    target.disable_calib()
    target.enable_quant()


def amax_of(target: TensorQuantizer) -> Tensor:
    """The range, which there must be."""
    assert target.amax is not None
    return target.amax
