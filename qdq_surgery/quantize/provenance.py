"""Which rule put a quantizer where it is, and why."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Provenance"]


class Provenance(NamedTuple):
    """Why a quantizer is where it is.

    Attributes:
        quantizer: Its qualified name in the model that was converted.
        role: ``"input"`` or ``"weight"``.
        rule: Name of the rule.
        rules: Name of the rule set.
        why: The rule's own reason.
        declared: The rule's place, ``file:line``.
        operand: What is quantized, such as ``matmul(q)``.
        source: Where the operator stands in the modeling file, ``file:line``.
        descriptor: The spec in words, such as ``int8 per-tensor max``.
    """

    quantizer: str
    role: str
    rule: str
    rules: str
    why: str
    declared: str
    operand: str
    source: str
    descriptor: str
