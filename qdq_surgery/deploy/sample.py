"""The inputs that a model is traced and checked with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.errors import ExportError
from qdq_surgery.examples import checked_examples, make_examples

__all__ = ["sample_inputs"]

#: Batch and tokens: no two numbers alike, and none that is likely to stand in a config.
_SHAPE = (2, 21)


def sample_inputs(qmodel: PreTrainedModel, given: Mapping[str, Any] | None, dynamic: bool) -> dict[str, Any]:
    """Keyword arguments of the model's forward.

    Args:
        given: The user's; a single row is doubled where the batch stays open, because torch takes 1 for a constant.
            Left out, they are made from the config: with everything that the model's tokenizer gives.

    Raises:
        ModelError: They do not fit the model, or none can be made from its config.
        ExportError: They are too short to keep the length open.
    """
    if given is None:
        made = make_examples(qmodel, _SHAPE)
        takes = inspect.signature(qmodel.forward).parameters
        segments = getattr(qmodel.config.get_text_config(), "type_vocab_size", 0) or 0
        if "token_type_ids" in takes and segments > 1:
            made["token_type_ids"] = torch.zeros_like(made["input_ids"])
            made["token_type_ids"][..., made["input_ids"].shape[-1] // 2 :] = 1
        return made
    made = checked_examples(qmodel, given)
    tensors = {name: value for name, value in made.items() if isinstance(value, Tensor) and value.ndim > 0}
    if not dynamic or not tensors:
        return made
    short = next((name for name, value in tensors.items() if value.ndim in (2, 3) and value.shape[1] < 2), None)
    if short is not None:
        raise ExportError(
            f"example_inputs['{short}'] has the shape {tuple(tensors[short].shape)}, and torch takes an axis of 1 for "
            "a constant; give an example of two tokens or more, or dynamic=False"
        )
    if all(value.shape[0] == 1 for value in tensors.values()):
        made.update({name: torch.cat([value, value]) for name, value in tensors.items()})
    return made
