"""Exporting a model to ONNX: a quantized one for its target, a float one as it is."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.onnx_file.origin import describe
from qdq_surgery.onnx_file.writer import LARGEST, Draft, draft, writable

__all__ = ["export"]

#: Of float models; the target of a quantized one has its own.
_OPSET = 20


def export(
    model: PreTrainedModel,
    batch: dict[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    target: str,
    *,
    overwrite: bool = False,
) -> int:
    """Write ``model`` to ``path``; number of rows and length stay open.

    Args:
        batch: Inputs to export with, at least two rows.
        outputs: Names of the model's outputs.
        target: Of a quantized model; a float one is the same for all.
        overwrite: Whether a file that is there is replaced.

    Returns:
        The version of ONNX's operators in the file.
    """
    model = model.cpu().eval()
    batch = {name: value.cpu() for name, value in batch.items()}
    if qs.quantizers(model):
        return qs.export_onnx(model, path, batch, target=target, overwrite=overwrite).opset
    with draft(writable(path, overwrite), overwrite) as made:
        _export_float(model, batch, outputs, made)
    return _OPSET


def _export_float(model: PreTrainedModel, batch: dict[str, Tensor], outputs: Sequence[str], made: Draft) -> None:
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch}
    # The exporter warns about torchvision, which is not there, and about names of dimensions.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        returned = type(model(**batch))
        program = torch.onnx.export(
            model,
            (),
            kwargs=batch,
            dynamo=True,
            opset_version=_OPSET,
            dynamic_shapes=shapes,
            output_names=list(outputs),
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(describe(model, f"{returned.__module__}.{returned.__qualname__}"))
        import onnx_ir  # those who export nothing need none

        size = sum(value.const_value.nbytes for value in program.model.graph.initializers.values() if value.const_value)
        onnx_ir.save(program.model, made.graph, external_data=made.data.name if size > LARGEST else None)
