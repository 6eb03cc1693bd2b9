"""How many tokens a model takes."""

from __future__ import annotations

from typing import Any

__all__ = ["longest_text"]

#: Their positions begin behind the padding token's number.
_COUNTS_ON = ("roberta", "xlm-roberta", "camembert", "roberta-prelayernorm", "mpnet")


def longest_text(config: Any) -> int | None:
    """The number of tokens that there are positions for; ``None`` if any number is taken."""
    positions = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) is not None
    if rotary or getattr(config, "position_biased_input", True) is False or not isinstance(positions, int):
        return None
    if config.model_type in _COUNTS_ON:
        positions -= config.pad_token_id + 1
    return positions if positions > 0 else None
