"""Every model type of transformers' registries that encodes text: a tiny model of each, or why there is none.

What counts as one is asked of the registries themselves (:func:`candidates`), so that a type which a new release of
transformers brings is not in these lists yet; ``tests/ecosystem/test_lineage.py`` then fails and says what to do.
``scripts/sweep_models.py`` takes each of them through every stage and writes ``docs/models.md``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from qdq_surgery.hf.example_inputs import make_examples

__all__ = ["KIN", "OUTSIDE", "Kin", "build", "candidates", "heads", "padded", "with_labels"]

#: The mappings whose types read text and are no mere decoders.
_TASKS = (
    "MASKED_LM",
    "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "TEXT_ENCODING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "DOCUMENT_QUESTION_ANSWERING",
    "TABLE_QUESTION_ANSWERING",
)
#: Of these mappings, the types that are in none of causal language models.
_TASKS_OF_ANY = ("QUESTION_ANSWERING", "TOKEN_CLASSIFICATION", "SEQUENCE_CLASSIFICATION")


@dataclass(frozen=True)
class Kin:
    """A model type, and what makes it tiny beyond :data:`_TINY`."""

    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)


#: Names that configs have for the same few sizes.
_TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "emb_dim", "dim_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "ffn_dim"), 48),
    **dict.fromkeys(("d_kv", "head_dim", "d_head", "kv_channels"), 8),
    "num_key_value_heads": 4,
    "hidden_dim": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "embedding_size": 16,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "decoder_start_token_id": 1,
}


def candidates() -> list[str]:
    """Every model type of transformers that encodes text, by its registries."""

    def types(task: str) -> set[str]:
        return set(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))

    found = set().union(*map(types, _TASKS))
    found |= set().union(*map(types, _TASKS_OF_ANY)) - types("CAUSAL_LM")
    return sorted(found)


def tiny(config: PreTrainedConfig, options: Mapping[str, Any]) -> PreTrainedConfig:
    """The same config with everything small."""
    for name, value in {**_TINY, **options}.items():
        if isinstance(getattr(config, name, None), PreTrainedConfig):
            continue
        if name in options or getattr(config, name, None) is not None:
            setattr(config, name, value)
    for name, inner in list(vars(config).items()):
        if isinstance(inner, PreTrainedConfig):
            tiny(inner, options.get(name, {}))
    return config


def config_of(kin: Kin) -> PreTrainedConfig:
    """A config of its type with the sizes above."""
    return tiny(AutoConfig.for_model(kin.model_type), kin.options)


def heads(model_type: str) -> list[str]:
    """The classes of all heads that transformers' auto classes know for a type, the bare model first."""
    names: dict[str, None] = {}
    for attribute, mapping in vars(modeling_auto).items():
        if attribute.startswith("MODEL_") and attribute.endswith("_MAPPING_NAMES"):
            found = mapping.get(model_type, ())
            names.update(dict.fromkeys((found,) if isinstance(found, str) else found))
    return list(names)


def build(kin: Kin, head: str, seed: int = 0) -> PreTrainedModel:
    """A model with random weights and eager attention, in eval mode; its weights are spread so that layers differ."""
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, head)._from_config(config_of(kin), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(3.0)
    return model.eval()
