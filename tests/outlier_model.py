"""A model with outlier channels, as released ones have them."""

from __future__ import annotations

import torch
from architectures import build
from torch import nn
from transformers import PreTrainedModel

#: How many times the others the outlier channels of :func:`spoiled` are.
OUTLIER, CHANNELS = 60.0, (3, 17)


def spoiled(layers: int = 2) -> PreTrainedModel:
    """A BERT whose hidden states have two outlier channels, as released ones have: their LayerNorms make them."""
    model = build("bert", "BertModel", num_hidden_layers=layers)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.LayerNorm) and name.endswith("output.LayerNorm"):
                module.weight[list(CHANNELS)] *= OUTLIER
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ("query", "key", "value"):
                module.weight[:, list(CHANNELS)] /= OUTLIER  # so that what they say stays what it was
    return model
