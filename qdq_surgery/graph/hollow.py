"""A model without weights, made able to run: what is analyzed while a model is being loaded.

transformers builds a model on the meta device and loads its weights afterwards. Where quantizers go does not depend on
the weights, so they are put in before, and the loading finds a converted model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.safety.transaction import put_back_after

__all__ = ["hollow", "real_tensors"]


def hollow(model: PreTrainedModel) -> PreTrainedModel:
    """A shadow of ``model`` with zeros for whatever has no data.

    The zeros cost no memory as long as they are only read: the operating system has one page for all of them.
    """
    ghost = shadow(model)
    made: dict[int, Tensor] = {}
    for module in ghost.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.is_meta:
                    table[name] = made.setdefault(id(tensor), _zeros(tensor))  # type: ignore[assignment]
    assert isinstance(ghost, PreTrainedModel)
    return ghost


def _zeros(tensor: Tensor) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    zeros = torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(tensor.dtype).reshape(tensor.shape)
    return nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros


@contextmanager
def real_tensors() -> Iterator[None]:
    """New tensors are in main memory and in float32: not on the meta device, nor in the dtype of what is loaded."""
    dtype = torch.get_default_dtype()
    with put_back_after(lambda: torch.set_default_dtype(dtype)):
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            yield
