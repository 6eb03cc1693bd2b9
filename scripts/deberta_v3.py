"""What the released DeBERTa-v3 checkpoints have in their configs, and transformers' defaults have not."""

from __future__ import annotations

from typing import Any

__all__ = ["OPTIONS"]

OPTIONS: dict[str, Any] = {
    "relative_attention": True,
    "position_buckets": 8,  # 256 there
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
