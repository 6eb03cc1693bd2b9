"""One batch of the user's as the model is called with it, checked before it runs."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.hf.arguments import named_arguments
from qdq_surgery.hf.config_facts import chunk_size, configs_of
from qdq_surgery.hf.example_inputs import checked_examples
from qdq_surgery.padding.token_masks import check_decoder, trimmed

__all__ = ["NO_BATCHES", "check_batches", "counted", "prepared"]

#: What is said where there are none.
NO_BATCHES = "there are no batches; give an iterable of dicts of tensors, and not one used up before"

#: What every model takes as tensors alone.
_TENSORS = frozenset(("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids"))


def check_batches(batches: Any, what: str = "batches") -> None:
    """Refuse what is no iterable of batches, as one batch alone is none.

    Args:
        what: How a message calls them.

    Raises:
        CalibrationError: It is none.
    """
    if isinstance(batches, Mapping):
        raise CalibrationError(f"{what} is one batch, a {type(batches).__name__}; give a list of batches, such as [it]")
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise CalibrationError(f"{what} is a {type(batches).__name__}, wanted an iterable of dicts of tensors")


def prepared(model: PreTrainedModel, batch: Any, index: int) -> dict[str, Any]:
    """A batch on the model's device, without the columns that are padding in every row.

    Args:
        batch: Keyword arguments of the model's forward.
        index: Its number, for messages.

    Raises:
        CalibrationError: The model cannot be called with it; names the batch.
    """
    if not isinstance(batch, Mapping):
        raise CalibrationError(
            f"batch {index} is a {type(batch).__name__}, wanted a dict of the model's arguments, such as "
            "tokenizer(texts, padding=True, return_tensors='pt')"
        )
    labels = not getattr(model.config, "is_encoder_decoder", False)  # those of an encoder-decoder are its decoder's
    try:
        _check_names(model, batch)
        _check_values(batch)
        inputs = trimmed(checked_examples(model, batch, "it"), chunk_size(*configs_of(model)), labels)
        check_decoder(model.config, inputs)
    except (ModelError, CalibrationError) as error:
        raise CalibrationError(f"batch {index}: {error}") from None
    return inputs


def _check_names(model: PreTrainedModel, batch: Mapping[str, Any]) -> None:
    """Most models take any keyword and ignore it: a misspelt mask would count all padding."""
    known = named_arguments(model)
    for name in batch:
        near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.8)
        if name not in known and near:
            raise CalibrationError(f"it has '{name}', which {type(model).__name__} does not know; write '{near[0]}'")


def _check_values(batch: Mapping[str, Any]) -> None:
    """A tokenizer that is not asked for tensors gives lists, on which models fail in words of their own."""
    for name, value in batch.items():
        if not isinstance(name, str):
            raise CalibrationError(f"it has the key {name!r}, a {type(name).__name__}; its keys are names of arguments")
        if name in _TENSORS and not (value is None or isinstance(value, Tensor)):
            raise CalibrationError(
                f"{name} is a {type(value).__name__}, wanted a tensor: give the tokenizer return_tensors='pt', or take "
                "torch.as_tensor"
            )
        if name in _TENSORS and value is not None and value.numel() == 0:
            raise CalibrationError(
                f"{name} has the shape {tuple(value.shape)}, which holds nothing; leave that batch out"
            )


def counted(inputs: Mapping[str, Any]) -> tuple[int, int]:
    """Rows and tokens of a batch; padding is no token."""
    mask = inputs.get("attention_mask")
    if mask is not None:
        return int(torch.Size(mask.shape[:-1]).numel()), int((mask != 0).sum())
    ids = next((value for value in inputs.values() if isinstance(value, Tensor) and value.ndim >= 2), None)
    return (0, 0) if ids is None else (int(ids.shape[0]), int(torch.Size(ids.shape[:2]).numel()))
