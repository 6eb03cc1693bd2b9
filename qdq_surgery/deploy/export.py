"""From a calibrated model to a file for one runtime, in one call."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from qdq_surgery.convert import plan_of
from qdq_surgery.deploy.extras import require
from qdq_surgery.deploy.grids import read_grids
from qdq_surgery.deploy.sites import Site
from qdq_surgery.deploy.targets import ACTIVATIONS, PRECISIONS, Target, get_target
from qdq_surgery.deploy.writing import DATA_SUFFIX, LARGEST, draft, writable
from qdq_surgery.errors import ExportError, ModelError
from qdq_surgery.examples import checked_examples, make_examples

__all__ = ["Export", "export_onnx"]

#: Batch and tokens of the example that a model is traced with: no two numbers alike, and none that stands in a config.
_SHAPE = (2, 21)


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: The file.
        target: The name of its target.
        opset: The version of ONNX's operators in it.
        sites: Its Q/DQ pairs.
    """

    path: Path
    target: str
    opset: int
    sites: tuple[Site, ...]


def export_onnx(
    qmodel: PreTrainedModel,
    path: str | Path,
    example_inputs: Mapping[str, Any] | None = None,
    target: str = "onnxruntime",
    *,
    opset: int | None = None,
    dynamic: bool = True,
    parity: bool = True,
    activations: str | None = None,
    precision: str | None = None,
) -> Export:
    chosen = get_target(target)
    opset = _opset(chosen, opset)
    activations = _one_of("activations", activations, ACTIVATIONS, chosen.activations, target)
    precision = _one_of("precision", precision, PRECISIONS, chosen.precisions, target)
    for package in ("onnx", "onnx_ir", "onnxscript"):
        require(package, "exporting to ONNX")
    file = writable(path)
    plan_of(qmodel)
    if qmodel.training:
        raise ModelError(f"this {type(qmodel).__name__} is in train mode, with dropout; call .eval() first")
    grids = read_grids(qmodel, chosen)
    inputs = make_examples(qmodel, _SHAPE) if example_inputs is None else checked_examples(qmodel, example_inputs)

    from qdq_surgery.deploy.building import build
    from qdq_surgery.deploy.tracing import trace

    source, weights = qmodel, {}
    if precision == "float16":
        weights = _float_weights(qmodel)
        source = copy.deepcopy(qmodel).half()
        inputs = {
            name: value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
    built = build(trace(source, inputs, opset, dynamic), qmodel, grids, chosen, activations, weights)

    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in built.model.graph.initializers.values() if value.const_value)
    with draft(file) as temporary:
        ir.save(built.model, temporary, external_data=f"{file.name}{DATA_SUFFIX}" if size > LARGEST else None)
    return Export(file, target, opset, built.sites)


def _opset(target: Target, opset: int | None) -> int:
    first, last = target.opsets
    if opset is None:
        return target.opset
    if not first <= opset <= last:
        raise ExportError(f"opset {opset} is not supported for {target.name}; choose one of {first} to {last}")
    return opset


def _one_of(what: str, value: str | None, known: tuple[str, ...], allowed: tuple[str, ...], target: str) -> str:
    if value is None:
        return allowed[0]
    if value not in known:
        raise ExportError(f"there is no {what} '{value}'; choose one of {', '.join(known)}")
    if value not in allowed:
        raise ExportError(f"{what} '{value}' is not supported for {target}; choose {' or '.join(allowed)}")
    return value


def _float_weights(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    return {name: value.detach().float().cpu().numpy() for name, value in model.named_parameters(remove_duplicate=False)}
