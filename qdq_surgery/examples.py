"""Example inputs for a model, made from its config: small, with padding, and in two shapes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES

from qdq_surgery.errors import ModelError

__all__ = ["SHAPES", "checked_examples", "make_examples", "resized", "without_mask"]

#: (batch, tokens) of the recorded run and of the run that checks it. Small, and no two numbers alike.
SHAPES = ((2, 7), (3, 11))


def make_examples(model: PreTrainedModel, shape: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments for ``model``'s forward.

    Args:
        shape: Batch and tokens.

    Returns:
        ``input_ids`` and ``attention_mask`` (its last row is padded), and what a decoder with cross-attention needs.

    Raises:
        ModelError: The model does not take token ids; pass ``example_inputs``.
    """
    config = model.config.get_text_config()
    names = inspect.signature(model.forward).parameters
    vocabulary = getattr(config, "vocab_size", None)
    if model.main_input_name != "input_ids" or "input_ids" not in names or vocabulary is None:
        raise ModelError(
            f"{type(model).__name__} takes '{model.main_input_name}', for which its config gives no example; "
            "pass example_inputs={name: tensor, ...}"
        )
    batch, tokens = shape
    longest = getattr(config, "max_position_embeddings", None) or tokens
    tokens = max(1, min(tokens, longest - 2))
    if type(model).__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values():
        size: tuple[int, ...] = (batch, 2, tokens)
    else:
        size = (batch, tokens)
    generator = torch.Generator().manual_seed(0)
    special = {
        value
        for name in ("pad_token_id", "eos_token_id", "bos_token_id", "mask_token_id")
        if isinstance(value := getattr(config, name, None), int)
    }
    ordinary = torch.tensor([token for token in range(min(vocabulary, 4096)) if token not in special] or [0])
    ids = ordinary[torch.randint(len(ordinary), size, generator=generator)]
    mask = torch.ones(size, dtype=torch.long)
    mask[-1, ..., -1:] = 0
    inputs: dict[str, Any] = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    if getattr(config, "add_cross_attention", False) and "encoder_hidden_states" in names:
        states = torch.randn(batch, tokens + 1, config.hidden_size, generator=generator)
        inputs["encoder_hidden_states"] = states.to(model.device, model.dtype)
    if getattr(config, "is_decoder", False) and "use_cache" in names:
        inputs["use_cache"] = False
    return inputs


def checked_examples(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The user's example inputs, on the model's device.

    Raises:
        ModelError: They are no mapping from argument names, or name an argument that the model does not have.
    """
    if not isinstance(inputs, Mapping):
        raise ModelError(
            f"example_inputs is a {type(inputs).__name__}; pass a dict such as tokenizer(text, return_tensors='pt')"
        )
    parameters = inspect.signature(model.forward).parameters
    open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in inputs:
        if name not in parameters and not open_ended:
            raise ModelError(f"example_inputs has '{name}', which {type(model).__name__}.forward does not take")
    return {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }


def without_mask(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with no padding and no mask."""
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def resized(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs in another shape: the batch twice, and one token less where there are several."""
    ids = next((v for v in inputs.values() if isinstance(v, torch.Tensor) and v.ndim >= 2), None)
    if ids is None:
        return dict(inputs)
    batch, tokens = int(ids.shape[0]), int(ids.shape[-1] if not ids.is_floating_point() else ids.shape[-2])

    def resize(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        if value.shape[0] == batch:
            value = torch.cat([value, value])
        for axis in range(1, value.ndim):
            if tokens > 1 and value.shape[axis] == tokens:
                value = value.narrow(axis, 0, tokens - 1)
        return value

    return {name: resize(value) for name, value in inputs.items()}
