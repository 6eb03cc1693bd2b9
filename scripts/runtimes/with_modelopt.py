"""NVIDIA's ModelOpt: fake quantization of a PyTorch model, calibrated by itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from runtimes.workspace import package, quiet

__all__ = ["quantize_by_modelopt"]


def quantize_by_modelopt(
    model: PreTrainedModel, batches: Sequence[dict[str, Tensor]], name: str, without: Sequence[str] = ()
) -> PreTrainedModel:
    """A copy of ``model`` with ModelOpt's quantizers, in eval mode.

    Args:
        name: Of one of ModelOpt's configurations, such as ``INT8_SMOOTHQUANT_CFG``.
        without: Patterns of names of quantizers that are left out, in ModelOpt's words.
    """
    modelopt: Any = package("modelopt.torch.quantization")

    def calibrate(found: PreTrainedModel) -> None:
        with torch.no_grad():
            for batch in batches:
                found(**batch)

    with quiet():
        config = copy.deepcopy(getattr(modelopt, name))
        config["quant_cfg"] += [{"quantizer_name": each, "enable": False} for each in without]
        made: PreTrainedModel = modelopt.quantize(copy.deepcopy(model), config, calibrate)
    return made.eval()
