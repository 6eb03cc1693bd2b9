"""What quantizers are called: as their rule says, or after operator and capture, numbered where a block has several."""

from __future__ import annotations

import re

from qdq_surgery.rules.spec import Place

__all__ = [
    "INTEGERS_SUFFIX",
    "LINEAR_NAMES",
    "MODULE_PATH",
    "QUANTIZER_PATH",
    "STATE_SUFFIXES",
    "is_site_name",
    "may_name",
    "site_name",
]

#: The quantizers of a linear, by role: pytorch-quantization's names.
LINEAR_NAMES = {"input": "_input_quantizer", "weight": "_weight_quantizer"}

#: How the names in a state dict end that are quantizers' own: ranges, and what weights are moved by.
STATE_SUFFIXES = ("_quantizer._amax", "_quantizer._rounding")

#: How the name of a weight's integers ends, which stand in the place of the weight in files of frozen models.
INTEGERS_SUFFIX = "_quantizer._integers"

#: What the path of a module, or of a quantizer, looks like; the number of its layer may be starred. Whether there is
#: one of that name is another question.
_PART = r"[^\s.*\"'\\]+"
MODULE_PATH = re.compile(rf"{_PART}(?:\.(?:{_PART}|\*))*")
QUANTIZER_PATH = re.compile(rf"{_PART}(?:\.(?:{_PART}|\*))*_quantizer")

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*_quantizer", re.ASCII)
_NUMBER = re.compile(r"_([1-9][0-9]{0,3})(?=(?:_input)?_quantizer)", re.ASCII)


def is_site_name(name: str) -> bool:
    """Whether ``name`` can be an attribute that holds a quantizer, in a module and in generated source."""
    return _NAME.fullmatch(name) is not None


def site_name(place: Place, operator: str, capture: str, number: int = 1) -> str:
    """The attribute name of the quantizer on the operand ``capture`` of an operator in a block's graph.

    Args:
        number: A block may have the same operator twice (DistilBERT's two residual adds): the second is numbered.
    """
    name = place.name or f"{operator}_{capture}_input_quantizer"
    if number == 1:
        return name
    end = "_input_quantizer" if "_input_quantizer" in name else "_quantizer"
    stem, _, rest = name.rpartition(end)
    return f"{stem}_{number}{end}{rest}"


def may_name(name: str, place: Place, operator: str, capture: str) -> bool:
    """Whether :func:`site_name` gives ``name``, for whatever number."""
    if name == site_name(place, operator, capture):
        return True
    numbers = [int(match[1]) for match in _NUMBER.finditer(name)]
    return any(number > 1 and name == site_name(place, operator, capture, number) for number in numbers)
