"""A second set of modules around the same tensors: while the one is traced, the other goes on working."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

__all__ = ["twin"]


def twin(model: PreTrainedModel, device: str = "cpu") -> PreTrainedModel:
    """A copy of ``model`` that shares its parameters and buffers, so that it costs no memory.

    torch.export puts stand-ins in the place of a module's parameters while it traces. On a twin, another thread may run
    the model meanwhile. Tensors on another device are copied to ``device``: the nodes that quantizers leave in a trace
    have none, which torch takes for a CPU.
    """
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): _on(tensor, torch.device(device)) for tensor in tensors})


def _on(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.device.type == device.type:
        return tensor
    moved = tensor.detach().to(device)
    return nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
