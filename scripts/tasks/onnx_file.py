"""Exporting a model to ONNX, with Q/DQ pairs where it has quantizers."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["OPSET", "export"]

#: The first with Q/DQ pairs in every float type.
OPSET = 19


def export(model: PreTrainedModel, batch: dict[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    """Write ``model`` to ``path``; number of rows and length stay open.

    Args:
        batch: Inputs to export with, at least two rows.
        outputs: Names of the model's outputs.
    """
    model = model.cpu().eval()
    batch = {name: value.cpu() for name, value in batch.items()}
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch}
    # The exporter warns about torchvision, which is not there, and about names of dimensions.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(**batch)  # a kind of call that is new to a converted model is recorded, which cannot happen in an export
        program = torch.onnx.export(
            model,
            (),
            kwargs=batch,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            output_names=list(outputs),
            verbose=False,
        )
        assert program is not None
        program.save(path)
