"""A second set of modules around the same tensors: the one can be traced while the other runs."""

from __future__ import annotations

import copy

from transformers import PreTrainedModel

__all__ = ["twin"]


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of ``model`` that shares its parameters and buffers, so that it costs no memory.

    torch.export puts stand-ins in the place of a module's parameters while it traces. On a twin, another thread may run
    the model meanwhile.
    """
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
