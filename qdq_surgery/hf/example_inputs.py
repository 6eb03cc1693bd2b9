"""The inputs that a model is recorded, traced and checked with: made from its config, or the user's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES,
    MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
)

from qdq_surgery.errors import ExportError, ModelError, QdqSurgeryError
from qdq_surgery.hf.arguments import named_arguments, takes_any
from qdq_surgery.hf.config_facts import chunk_size, decodes, max_tokens
from qdq_surgery.hf.other_inputs import make_others, make_pixels

__all__ = ["SHAPES", "checked_examples", "make_examples", "resized", "sample_inputs", "without_mask"]

#: (batch, tokens) of the recorded run and of the run that checks it. Small, and no two numbers alike.
SHAPES = ((2, 7), (3, 11))

#: (batch, tokens) of an export: no two numbers alike, and none that is likely to stand in a config.
_EXPORTED = (2, 21)

#: Arguments of a text model that change what it is asked, and not what it looks at: a file need not take them. Labels
#: neither.
_TEXT_ALONE = frozenset(
    """input_ids attention_mask token_type_ids position_ids head_mask inputs_embeds cache_position past_key_values
    encoder_hidden_states encoder_attention_mask encoder_outputs decoder_input_ids decoder_attention_mask
    decoder_head_mask cross_attn_head_mask decoder_inputs_embeds decoder_position_ids use_cache output_attentions
    output_hidden_states output_router_logits return_dict start_positions end_positions is_impossible cls_index p_mask
    global_attention_mask langs lengths cache lang_ids task_type_ids logits_to_keep num_logits_to_keep""".split()
)


def make_examples(model: PreTrainedModel, shape: tuple[int, int]) -> dict[str, Any]:
    """Keyword arguments for ``model``'s forward.

    Args:
        shape: Batch and tokens.

    Returns:
        ``input_ids`` and ``attention_mask`` (its last row is padded), the same for the decoder of an encoder-decoder,
        boxes for a model of texts on pages, and what a decoder with cross-attention needs.

    Raises:
        ModelError: The model does not take token ids, or its config says nothing of use; pass ``example_inputs``.
    """
    try:
        return _make_examples(model, shape)
    except QdqSurgeryError:
        raise
    except Exception as error:  # a config is anybody's: a name may be missing from it, or a number may be a list
        raise ModelError(
            f"no example can be made from the config of {type(model).__name__} ({type(error).__name__}: {error}); "
            "pass example_inputs={name: tensor, ...}"
        ) from error


def _make_examples(model: PreTrainedModel, shape: tuple[int, int]) -> dict[str, Any]:
    whole = model.config
    both = bool(getattr(whole, "is_encoder_decoder", False))
    config = _side(whole, "encoder") if both else whole.get_text_config()
    names = named_arguments(model)
    # (CANINE looks characters up by their hashes.)
    vocabulary = getattr(config, "vocab_size", None) or getattr(config, "num_hash_buckets", None)
    if "input_ids" not in names and model.main_input_name in ("pixel_values", "input_values"):
        return _images(model, shape[0]) if model.main_input_name == "pixel_values" else _sounds(model, shape)
    if "input_ids" not in names or vocabulary is None:
        raise ModelError(
            f"{type(model).__name__} takes '{model.main_input_name}', for which its config gives no example; "
            "pass example_inputs={name: tensor, ...}"
        )
    batch, tokens = shape
    # A feed-forward network in chunks takes only lengths that its chunks divide.
    chunk = chunk_size(config)
    tokens *= chunk
    tokens = max(chunk, min(tokens, max_tokens(config) or tokens) // chunk * chunk)
    if any(base.__name__ in MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES.values() for base in type(model).__mro__):
        size: tuple[int, ...] = (batch, 2, tokens)
    else:
        size = (batch, tokens)
    generator = torch.Generator().manual_seed(0)
    ids, mask = _text(config, vocabulary, size, generator)
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if _judges_with_both(model):
        # The model hands the same tokens to its decoder, and looks at the last one that ends a text.
        inputs["input_ids"][..., -min(tokens, 2)] = getattr(config, "eos_token_id", None) or 0
    elif "decoder_input_ids" in names:
        # Of another length: the decoder's tokens are not the encoder's.
        size = (batch, tokens - chunk if tokens > chunk else tokens)
        other = _side(whole, "decoder") if both else config
        ids, mask = _text(other, other.vocab_size, size, generator)
        inputs.update(decoder_input_ids=ids, decoder_attention_mask=mask)
    inputs.update(make_others(model, config, tuple(inputs["input_ids"].shape), generator))
    inputs = {name: _like(model, value) for name, value in inputs.items()}
    if getattr(config, "add_cross_attention", False) and "encoder_hidden_states" in names:
        states = torch.randn(batch, tokens + 1, config.hidden_size, generator=generator)
        inputs["encoder_hidden_states"] = _like(model, states)
    inputs = {name: value for name, value in inputs.items() if takes_any(model) or name in names}
    return _without_cache(model, inputs, config)


def _judges_with_both(model: PreTrainedModel) -> bool:
    """Whether it judges a text by an encoder and a decoder, where the model's other heads write one."""
    if not getattr(model.config, "is_encoder_decoder", False):
        return False
    heads = {
        *MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.values(),
        *MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES.values(),
        *MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES.values(),
    }
    return any(base.__name__ in heads for base in type(model).__mro__)


def _without_cache(model: PreTrainedModel, inputs: dict[str, Any], *parts: Any) -> dict[str, Any]:
    """``inputs``, with ``use_cache=False`` for a decoder if they leave it open: blocks with a cache have no graph.

    Args:
        parts: Configs of the model's parts that may be one.
    """
    named = "use_cache" in named_arguments(model)
    # A head that does not name it hands it on, but for those of T5Gemma, which do without a cache by themselves.
    if decodes(model.config, *parts) and (named or (takes_any(model) and not _judges_with_both(model))):
        inputs.setdefault("use_cache", False)
    return inputs


def _side(config: Any, name: str) -> Any:
    """The config of an encoder or a decoder: its own, or the one that both share."""
    own = getattr(config, name, None)
    return own if hasattr(own, "vocab_size") else config


def _images(model: PreTrainedModel, batch: int) -> dict[str, Any]:
    pixels = make_pixels(model.config, batch, torch.Generator().manual_seed(0))
    if pixels is None:
        raise ModelError(
            f"{type(model).__name__} takes 'pixel_values', for which its config gives no size; "
            "pass example_inputs={'pixel_values': tensor}"
        )
    return {"pixel_values": _like(model, pixels)}


def _sounds(model: PreTrainedModel, shape: tuple[int, int]) -> dict[str, Any]:
    """Sound waves, (batch, samples), as many as make that many frames."""
    samples = math.prod(getattr(model.config, "conv_stride", None) or (320,)) * (shape[1] + 1)
    waves = torch.randn(shape[0], samples, generator=torch.Generator().manual_seed(0))
    return {"input_values": _like(model, waves)}


def _like(model: PreTrainedModel, value: Tensor) -> Tensor:
    """On the model's device; what is no integer in the model's precision."""
    return value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)


def _text(config: Any, vocabulary: int, size: tuple[int, ...], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ordinary tokens, and a mask that leaves the last one of the last row out."""
    special = {
        value
        for name in ("pad_token_id", "eos_token_id", "bos_token_id", "mask_token_id")
        if isinstance(value := getattr(config, name, None), int)
    }
    ordinary = torch.tensor([token for token in range(min(vocabulary, 4096)) if token not in special] or [0])
    mask = torch.ones(size, dtype=torch.long)
    mask[-1, ..., -1:] = 0
    ids = ordinary[torch.randint(len(ordinary), size, generator=generator)]
    separator = getattr(config, "sep_token_id", None)
    if getattr(config, "model_type", None) == "longformer" and isinstance(separator, int):
        ids[..., 1:4] = separator  # its heads look for a question in front of three of them
    question = getattr(config, "question_token_id", None)  # Splinter answers at this token
    if isinstance(question, int) and question < vocabulary:
        ids[..., 0] = question
    return ids, mask


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
    parameters = named_arguments(model)
    open_ended = takes_any(model)
    for name in inputs:
        if name not in parameters and not open_ended:
            raise ModelError(f"{what} has '{name}', which {type(model).__name__}.forward does not take")
    made = {name: value.to(model.device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    return _without_cache(model, made)


def without_mask(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The same inputs with no padding and no mask."""
    return {name: value for name, value in inputs.items() if name != "attention_mask"}


def resized(inputs: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The same inputs in other shapes, in the order in which to try them.

    The batch is doubled. The length grows by one, or shrinks by one, or stays: not every model takes every length.
    Growing repeats the last token and shrinking drops the first, so that padding stays padding.
    """
    ids = next((v for v in inputs.values() if isinstance(v, Tensor) and v.ndim >= 2), None)
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
    if not isinstance(value, Tensor) or value.ndim == 0:
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


def sample_inputs(qmodel: PreTrainedModel, given: Mapping[str, Any] | None, dynamic: bool) -> dict[str, Any]:
    """Keyword arguments of the model's forward.

    Args:
        given: The user's; a single row is doubled where the batch stays open, because torch takes 1 for a constant.
            Left out, they are made from the config: with everything that the model's tokenizer gives, and boxes.

    Raises:
        ModelError: They do not fit the model, or none can be made from its config; names what it takes beside text.
        ExportError: They are too short to keep the length open.
    """
    if given is None:
        made = make_examples(qmodel, _EXPORTED)
        takes = named_arguments(qmodel)
        _check_made(qmodel, [name for name in takes if name not in made])
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


def _check_made(qmodel: PreTrainedModel, left_out: Sequence[str]) -> None:
    """Whether a file without these arguments is the model that is meant: pixels, entities and the like are not made."""
    parameters = named_arguments(qmodel)
    beyond = [
        name
        for name in left_out
        if name not in _TEXT_ALONE
        and "label" not in name
        and parameters[name].kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    if beyond:
        raise ModelError(
            f"{type(qmodel).__name__} takes '{beyond[0]}', for which its config gives no example, and a file that is "
            f"exported without takes none; pass example_inputs= with it, or without it for a file of text alone"
        )
