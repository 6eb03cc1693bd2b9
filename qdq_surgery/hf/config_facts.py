"""What a model's config says of its inputs: how many tokens, in which chunks, with a cache or without.

This is the one place that knows. Nothing here imports transformers: a config is whatever has its attributes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = [
    "attention_of",
    "chunk_size",
    "configs_of",
    "decodes",
    "max_tokens",
    "set_attention",
    "without_ffn_chunking",
]

#: Transformers' name for the number of tokens in a chunk, of a config and of each layer that has chunks.
_CHUNK = "chunk_size_feed_forward"

#: Where transformers 5 keeps the name of the attention function. It is private: the public ``_attn_implementation``
#: sets that of all inner configs, too, and ``set_attn_implementation`` refuses a model whose code it does not know.
_ATTENTION = "_attn_implementation_internal"

#: Their positions begin behind the padding token's number.
_COUNTS_ON = frozenset(
    """
    camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm roberta roberta-prelayernorm
    xlm-roberta xlm-roberta-xl xmod
    """.split()
)
#: Their positions begin at a number of their own, whatever the padding token is.
_BEGINS_AT = {"mpnet": 2}


def max_tokens(config: Any) -> int | None:
    """The number of tokens that there are positions for, special tokens included; ``None`` if any number is taken.

    Args:
        config: The model's; of a model of texts and something else, the part about texts counts.
    """
    text = getattr(config, "get_text_config", None)
    config = text() if callable(text) else config
    positions = getattr(config, "max_position_embeddings", None)
    if _has_no_table(config) or not isinstance(positions, int):
        return None
    kind = getattr(config, "model_type", None)
    if kind in _COUNTS_ON:
        padding = getattr(config, "pad_token_id", None)
        positions -= (padding if isinstance(padding, int) else 1) + 1
    positions -= _BEGINS_AT.get(str(kind), 0)
    return positions if positions > 0 else None


def _has_no_table(config: Any) -> bool:
    """Whether positions are computed, or only their distances are looked up."""
    if getattr(config, "rope_parameters", None) is not None or getattr(config, "position_biased_input", True) is False:
        return True
    if getattr(config, "model_type", None) == "tapas":  # it counts anew in each cell of a table
        return bool(getattr(config, "reset_position_index_per_cell", False))
    return getattr(config, "model_type", None) == "esm" and getattr(config, "position_embedding_type", "") == "rotary"


def configs_of(model: nn.Module) -> list[Any]:
    """The configs of a model and of the modules in it, each once."""
    found = (vars(module).get("config") for module in model.modules())
    return list({id(config): config for config in found if config is not None}.values())


def chunk_size(*configs: Any) -> int:
    """Tokens in a chunk of the feed-forward networks, which take only lengths that chunks divide; 1 without chunks."""
    return math.lcm(*(getattr(config, _CHUNK, 0) or 1 for config in configs))


@contextmanager
def without_ffn_chunking(model: nn.Module) -> Iterator[None]:
    """While this holds, every layer of ``model`` takes all its tokens at once.

    The values are the same: a linear has the same result for a token in whatever company. In chunks, which save memory
    in PyTorch and cost a kernel each in a file, the number of kernels depends on the length: none can stay open.
    """
    chunked = [
        (module, size) for module in model.modules() if isinstance(size := vars(module).get(_CHUNK), int) and size
    ]
    try:
        for module, _ in chunked:
            setattr(module, _CHUNK, 0)
        yield
    finally:
        for module, size in chunked:
            setattr(module, _CHUNK, size)


def decodes(*configs: Any) -> bool:
    """Whether a model of one of these configs has a decoder, which returns a cache unless it is told not to."""
    names = ("is_decoder", "is_encoder_decoder")
    return any(getattr(config, name, False) for config in configs for name in names)


def attention_of(config: Any) -> str | None:
    """The name of the attention function; ``None`` where it is open, or the config has none."""
    name: str | None = getattr(config, _ATTENTION, None)
    return name


def set_attention(config: Any, name: str) -> None:
    """Choose the attention function of this config alone, and not of those inside it; without one it stays so."""
    if hasattr(config, _ATTENTION):
        setattr(config, _ATTENTION, name)
