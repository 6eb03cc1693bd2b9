"""The steps in order: check, record, match, operate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from qdq_surgery.checkpoint.plugin import adopt
from qdq_surgery.errors import ModelError
from qdq_surgery.match.analyze import analyze, recordings_of
from qdq_surgery.match.plan import Plan
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.rules.yaml_file import load_rules
from qdq_surgery.safety.given_flags import check_flags
from qdq_surgery.safety.random_state import alone
from qdq_surgery.safety.transaction import all_or_nothing
from qdq_surgery.surgery.apply import Recordings, operate

__all__ = ["convert", "plan"]

_Model = TypeVar("_Model", bound=PreTrainedModel)


def convert(
    model: _Model,
    rules: str | Path | RuleSet = "qdqbert",
    *,
    example_inputs: Mapping[str, Any] | None = None,
    inplace: bool = False,
) -> _Model:
    """Put quantizers into a loaded model, where the rules say.

    Args:
        model: Any Hugging Face encoder that takes token ids, with any head.
        rules: A shipped rule set (``qdqbert``, ``linear-only``, ``fuse-qkv``), the path of a rule file, or a rule set.
        example_inputs: Keyword arguments of the model's forward, if none can be made from its config.
        inplace: Change ``model`` itself, or nothing of it if anything goes wrong. Otherwise it stays, and a copy
            is returned.

    Returns:
        A model of the same class with the same config, forward and weights. Until it is calibrated, each quantizer
        takes the range of the tensor it is given.

    Raises:
        RuleFileError: The rule file is wrong.
        MatchError: The rules do not fit the model.
        AlreadyConvertedError: It holds quantizers.
        ModelError: It is no model that can be converted, or the example inputs are wrong.
        TraceError: A block that is to be rewritten cannot be, in training mode or without a mask.
        OptionError: ``inplace`` is neither true nor false.
    """
    check_flags(inplace=inplace)
    made, recordings = _recorded(model, load_rules(rules), example_inputs)
    target = model if inplace else _copied(model)
    with all_or_nothing(target):
        operate(target, made, recordings)
        adopt(target)
    return target


def plan(
    model: PreTrainedModel,
    rules: str | Path | RuleSet = "qdqbert",
    *,
    example_inputs: Mapping[str, Any] | None = None,
) -> Plan:
    """What :func:`convert` would do with these ``rules`` and ``example_inputs``: edits nothing, and raises the same."""
    return _recorded(model, load_rules(rules), example_inputs)[0]


def _copied(model: _Model) -> _Model:
    try:
        with torch.inference_mode(False):  # what was copied in it could not be trained
            return copy.deepcopy(model)
    except Exception as error:  # it holds a lock, an open file, a tensor of a graph
        raise ModelError(
            f"this {type(model).__name__} cannot be copied ({type(error).__name__}: {error}); pass inplace=True"
        ) from error


def _recorded(
    model: PreTrainedModel, rules: RuleSet, example_inputs: Mapping[str, Any] | None
) -> tuple[Plan, Recordings]:
    with alone():
        look, made = analyze(model, rules, example_inputs)
        return made, recordings_of(model, look, made)
