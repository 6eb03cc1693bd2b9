"""The inputs that a model is traced and checked with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.errors import ExportError, ModelError
from qdq_surgery.hf.example_inputs import checked_examples, make_examples

__all__ = ["sample_inputs"]

#: Arguments of a text model that change what it is asked, and not what it looks at: a file need not take them. Labels
#: neither.
_TEXT_ALONE = frozenset(
    """input_ids attention_mask token_type_ids position_ids head_mask inputs_embeds cache_position past_key_values
    encoder_hidden_states encoder_attention_mask encoder_outputs decoder_input_ids decoder_attention_mask
    decoder_head_mask cross_attn_head_mask decoder_inputs_embeds decoder_position_ids use_cache output_attentions
    output_hidden_states output_router_logits return_dict start_positions end_positions is_impossible cls_index p_mask
    global_attention_mask langs lengths cache lang_ids task_type_ids logits_to_keep num_logits_to_keep""".split()
)

#: Batch and tokens: no two numbers alike, and none that is likely to stand in a config.
_SHAPE = (2, 21)


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
        made = make_examples(qmodel, _SHAPE)
        takes = inspect.signature(qmodel.forward).parameters
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
    parameters = inspect.signature(qmodel.forward).parameters
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
