"""How many tokens a model takes: the one place that knows."""

from __future__ import annotations

from typing import Any

__all__ = ["longest_text"]

#: Their positions begin behind the padding token's number.
_COUNTS_ON = frozenset(
    """
    camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm roberta roberta-prelayernorm
    xlm-roberta xlm-roberta-xl xmod
    """.split()
)
#: Their positions begin at a number of their own, whatever the padding token is.
_BEGINS_AT = {"mpnet": 2}


def longest_text(config: Any) -> int | None:
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
