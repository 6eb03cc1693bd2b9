"""The steps in order: check, record, match, operate. And what one asks a converted model."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pytorch_quantization import nn as quant_nn
from torch import nn
from torch.fx import Graph
from transformers import PreTrainedModel

from qdq_surgery.errors import AlreadyConvertedError, ModelError
from qdq_surgery.examples import SHAPES, checked_examples, make_examples, resized, without_mask
from qdq_surgery.matching import match
from qdq_surgery.plan import Plan
from qdq_surgery.quantizer import TensorQuantizer
from qdq_surgery.routine import Routine, join_path
from qdq_surgery.rule_file import load_rules
from qdq_surgery.spec import RuleSet
from qdq_surgery.surgery import PLAN_ATTRIBUTE, operate
from qdq_surgery.survey import Survey, survey

__all__ = ["convert", "plan", "plan_of", "quantization_disabled", "quantizers"]

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
        rules: A shipped rule set (``qdqbert``, ``linear-only``), the path of a rule file, or a rule set.
        example_inputs: Keyword arguments of the model's forward, if none can be made from its config.
        inplace: Change ``model`` itself. Otherwise it stays as it is, and a copy is returned.

    Returns:
        A model of the same class with the same config, forward and weights. Until it is calibrated, each quantizer
        takes the range of the tensor it is given.

    Raises:
        RuleFileError: The rule file is wrong.
        MatchError: The rules do not fit the model.
        AlreadyConvertedError: It holds quantizers.
        ModelError: It is no model that can be converted, or the example inputs are wrong.
    """
    rule_set = load_rules(rules)
    first, made, inputs = _analyse(model, rule_set, example_inputs)
    target = model if inplace else copy.deepcopy(model)
    operate(target, made, _recordings(model, first, made, inputs))
    return target


def plan(
    model: PreTrainedModel,
    rules: str | Path | RuleSet = "qdqbert",
    *,
    example_inputs: Mapping[str, Any] | None = None,
) -> Plan:
    """What :func:`convert` would do. Edits nothing; same arguments and errors."""
    return _analyse(model, load_rules(rules), example_inputs)[1]


def plan_of(qmodel: nn.Module) -> Plan:
    """The plan that a converted model was made by.

    Raises:
        ModelError: The model was not made by :func:`convert`.
    """
    made = vars(qmodel).get(PLAN_ATTRIBUTE)
    if not isinstance(made, Plan):
        raise ModelError(f"this {type(qmodel).__name__} is not converted; call qdq_surgery.convert(model) first")
    return made


def quantizers(qmodel: nn.Module) -> dict[str, TensorQuantizer]:
    """All quantizers of a converted model by qualified name; a module that is shared has one name."""
    return {name: module for name, module in qmodel.named_modules() if isinstance(module, TensorQuantizer)}


@contextmanager
def quantization_disabled(qmodel: nn.Module) -> Iterator[None]:
    """While this holds, every quantizer lets its input pass; then each is as it was."""
    found = quantizers(qmodel)
    if not found:
        raise ModelError(f"this {type(qmodel).__name__} has no quantizers; call qdq_surgery.convert(model) first")
    before = {name: quantizer._disabled for name, quantizer in found.items()}
    try:
        for quantizer in found.values():
            quantizer.disable()
        yield
    finally:
        for name, quantizer in found.items():
            quantizer._disabled = before[name]


def _analyse(
    model: PreTrainedModel, rules: RuleSet, example_inputs: Mapping[str, Any] | None
) -> tuple[Survey, Plan, dict[str, Any]]:
    _check(model)
    if example_inputs is None:
        inputs, other = make_examples(model, SHAPES[0]), make_examples(model, SHAPES[1])
    else:
        inputs = checked_examples(model, example_inputs)
        other = resized(inputs)
    first = survey(model, inputs)
    _compare(first, survey(model, other))
    return first, match(model, first, rules), inputs


def _check(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        remedy = "convert it before torch.compile" if hasattr(model, "_orig_mod") else "load it with transformers"
        raise ModelError(f"found a {type(model).__name__}, wanted a Hugging Face PreTrainedModel; {remedy}")
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            raise AlreadyConvertedError(
                f"this {type(model).__name__} holds quantizers already (first: {name}); convert the float model"
            )
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ModelError(f"the parameter {name} has no data (meta device); load the weights first")


def _compare(first: Survey, other: Survey) -> None:
    """Mark the routines of ``first`` whose graph is another one for another batch and length: a size is baked in."""
    seen: set[int] = set()
    for unit, again in zip(first.units, other.units, strict=True):
        if unit.tree is None or again.tree is None or id(unit.tree) in seen:
            continue
        seen.add(id(unit.tree))
        for routine, twin in zip(unit.tree.walk(), again.tree.walk(), strict=False):
            if routine.failure is None and twin.failure is None:
                difference = _difference(routine.graph, twin.graph)
                if difference is not None:
                    routine.specialised = (
                        f"the graph holds only for the example's shape ({difference}), so it cannot take quantizers"
                    )


def _difference(graph: Graph, other: Graph) -> str | None:
    lines, others = (str(g.python_code("self").src).splitlines() for g in (graph, other))
    if lines == others:
        return None
    first = next((pair for pair in zip(lines, others, strict=False) if pair[0] != pair[1]), None)
    return (
        f"{len(lines)} lines, then {len(others)}"
        if first is None
        else f"'{first[0].strip()}', then '{first[1].strip()}'"
    )


def _recordings(
    model: PreTrainedModel, first: Survey, made: Plan, inputs: dict[str, Any]
) -> dict[tuple[str, str], list[Routine]]:
    """The routines of all blocks that the plan rewrites: with and without a mask, in eval and in training mode."""
    wanted = {(site.owner, site.routine) for site in made.sites if site.routine != "module"}
    if not wanted:
        return {}
    surveys = [first, survey(model, inputs, training=True, calls=first.calls)]
    if "attention_mask" in inputs:
        bare = survey(model, without_mask(inputs))
        surveys += [bare, survey(model, inputs, training=True, calls=bare.calls)]
    found: dict[tuple[str, str], list[Routine]] = {key: [] for key in wanted}
    for taken in surveys:
        for unit in taken.units:
            for routine in unit.tree.walk() if unit.tree is not None else ():
                path = join_path(unit.path, routine.path)
                if (path, routine.kind) in wanted and routine.failure is None:
                    found[path, routine.kind].append(routine)
    return {key: _distinct(routines) for key, routines in found.items()}


def _distinct(routines: list[Routine]) -> list[Routine]:
    """One routine for each kind of call."""
    kept: dict[tuple[Any, ...], Routine] = {}
    for routine in routines:
        reads = tuple(sorted(routine.reads.items(), key=lambda item: item[0]))
        kept.setdefault((routine.signature, routine.argument_paths, reads), routine)
    return list(kept.values())
