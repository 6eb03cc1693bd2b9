"""Saving a model whose config asks for attentions.

transformers gives attentions with the implementation called "eager" only, and checks the name when a config is saved.
A converted model computes them as eager does, under a name of its own, which is not saved.
"""

from __future__ import annotations

from typing import Any

from qdq_surgery.hf.config_facts import attention_of, set_attention
from qdq_surgery.trace.attention import QDQ_ATTENTION

__all__ = ["name_as_eager", "name_back"]


class _AsEager(str):
    """The name of our attention, while it may be taken for "eager"."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) is True or other == "eager"

    def __ne__(self, other: object) -> bool:
        return not self == other


_AS_EAGER = _AsEager(QDQ_ATTENTION)


def name_as_eager(config: Any) -> None:
    """Let ``config`` pass transformers' check, until :func:`name_back`. The model may run meanwhile."""
    ours = attention_of(config) == QDQ_ATTENTION
    if ours and getattr(config, "_output_attentions", False):
        set_attention(config, _AS_EAGER)


def name_back(config: Any) -> None:
    """Undo :func:`name_as_eager`."""
    if isinstance(attention_of(config), _AsEager):
        set_attention(config, QDQ_ATTENTION)
