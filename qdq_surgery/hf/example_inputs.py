"""Example inputs for a model, made from its config: small, with padding, and in two shapes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from qdq_surgery.errors import ModelError
from qdq_surgery.hf.config_facts import longest_text

__all__ = ["SHAPES", "checked_examples", "make_examples", "resized", "without_mask"]

#: (batch, tokens) of the recorded run and of the run that checks it. Small, and no two numbers alike.
SHAPES = ((2, 7), (3, 11))


def make_examples(model: PreTrainedModel, shape: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments for ``model``'s forward.

    Args:
        shape: Batch and tokens.

    Returns:
        ``input_ids`` and ``attention_mask`` (its last row is padded), the same for the decoder of an encoder-decoder,
        boxes for a model of texts on pages, and what a decoder with cross-attention needs.

    Raises:
        ModelError: The model does not take token ids; pass ``example_inputs``.
    """
    whole = model.config
    both = bool(getattr(whole, "is_encoder_decoder", False))
    config = _side(whole, "encoder") if both else whole.get_text_config()
    names = inspect.signature(model.forward).parameters
    vocabulary = getattr(config, "vocab_size", None)
    if model.main_input_name != "input_ids" or "input_ids" not in names or vocabulary is None:
        raise ModelError(
            f"{type(model).__name__} takes '{model.main_input_name}', for which its config gives no example; "
            "pass example_inputs={name: tensor, ...}"
        )
    batch, tokens = shape
    # A feed-forward network in chunks takes only lengths that its chunks divide.
    chunk = max(1, getattr(config, "chunk_size_feed_forward", 0) or 0)
    tokens *= chunk
    tokens = max(chunk, min(tokens, longest_text(config) or tokens) // chunk * chunk)
    if any(base.__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values() for base in type(model).__mro__):
        size: tuple[int, ...] = (batch, 2, tokens)
    else:
        size = (batch, tokens)
    generator = torch.Generator().manual_seed(0)
    ids, mask = _text(config, size, generator)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if both and "decoder_input_ids" in names:
        # Of another length: the decoder's tokens are not the encoder's.
        size = (batch, tokens - chunk if tokens > chunk else tokens)
        ids, mask = _text(_side(whole, "decoder"), size, generator)
        inputs.update(decoder_input_ids=ids, decoder_attention_mask=mask)
    limit = getattr(config, "max_2d_position_embeddings", None)
    if "bbox" in names and isinstance(limit, int):
        inputs["bbox"] = _boxes(inputs["input_ids"].shape, limit, generator)
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    if getattr(config, "add_cross_attention", False) and "encoder_hidden_states" in names:
        states = torch.randn(batch, tokens + 1, config.hidden_size, generator=generator)
        inputs["encoder_hidden_states"] = states.to(model.device, model.dtype)
    open_ended = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values())
    if (both or getattr(config, "is_decoder", False)) and ("use_cache" in names or open_ended):
        inputs["use_cache"] = False  # a head that does not name it hands it on
    return {name: value for name, value in inputs.items() if open_ended or name in names}


def _side(config: Any, name: str) -> Any:
    """The config of an encoder or a decoder: its own, or the one that both share."""
    own = getattr(config, name, None)
    return own if hasattr(own, "vocab_size") else config


def _text(config: Any, size: tuple[int, ...], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ordinary tokens, and a mask that leaves the last one of the last row out."""
    special = {
        value
        for name in ("pad_token_id", "eos_token_id", "bos_token_id", "mask_token_id")
        if isinstance(value := getattr(config, name, None), int)
    }
    ordinary = torch.tensor([token for token in range(min(config.vocab_size, 4096)) if token not in special] or [0])
    mask = torch.ones(size, dtype=torch.long)
    mask[-1, ..., -1:] = 0
    return ordinary[torch.randint(len(ordinary), size, generator=generator)], mask


def _boxes(size: tuple[int, ...], limit: int, generator: torch.Generator) -> torch.Tensor:
    """Where each token stands on its page: left, top, right, bottom, below ``limit``; no two of a row alike."""
    half = max(1, min(limit, 1000) // 2)
    corner, extent = (torch.randint(half, (*size, 2), generator=generator) for _ in range(2))
    return torch.cat([corner, corner + extent], dim=-1)


def checked_examples(model: PreTrainedModel, inputs: Mapping[str, Any], what: str = "example_inputs") -> dict[str, Any]:
    """The user's inputs, on the model's device.

    Args:
        what: How a message calls them.

    Raises:
        ModelError: They are no mapping from argument names, or name an argument that the model does not have.
    """
    if not isinstance(inputs, Mapping):
        raise ModelError(
            f"{what} is a {type(inputs).__name__}; pass a dict such as tokenizer(text, return_tensors='pt')"
        )
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in inputs:
        if name not in parameters and not open_ended:
            raise ModelError(f"{what} has '{name}', which {type(model).__name__}.forward does not take")
    made = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }
    decodes = getattr(model.config, "is_decoder", False) or getattr(model.config, "is_encoder_decoder", False)
    if decodes and ("use_cache" in parameters or open_ended):
        made.setdefault("use_cache", False)  # blocks that are handed a cache have no graph
    return made


def without_mask(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with no padding and no mask."""
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def resized(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same inputs in other shapes, in the order in which to try them.

    The batch is doubled. The length grows by one, or shrinks by one, or stays: not every model takes every length.
    Growing repeats the last token and shrinking drops the first, so that padding stays padding.
    """
    ids = next((v for v in inputs.values() if isinstance(v, torch.Tensor) and v.ndim >= 2), None)
    if ids is None:
        return
    batch, length = (
        int(ids.shape[0]),
        int(ids.shape[-2] if ids.is_floating_point() and ids.ndim == 3 else ids.shape[-1]),
    )
    for by in (1, -1, 0):
        if length + by > 0:
            yield {name: _resize(value, batch, length, by) for name, value in inputs.items()}


def _resize(value: Any, batch: int, length: int, by: int) -> Any:
    if not isinstance(value, torch.Tensor) or value.ndim == 0:
        return value
    if value.shape[0] == batch:
        value = torch.cat([value, value])
    # In states (batch, tokens, width) the width may be as large as the length; it stays.
    axes = [1] if value.is_floating_point() and value.ndim == 3 else range(1, value.ndim)
    for axis in axes:
        if value.shape[axis] == length and by > 0:
            value = torch.cat([value, value.narrow(axis, length - 1, 1)], dim=axis)
        elif value.shape[axis] == length and by < 0:
            value = value.narrow(axis, 1, length - 1)
    return value
