"""A model looked at and matched: the plan that a rule set makes for it, and the graphs that the plan edits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_quantization import nn as quant_nn
from torch.fx import Graph
from transformers import PreTrainedModel

from qdq_surgery.errors import AlreadyConvertedError, MatchError, ModelError, TraceError
from qdq_surgery.graph.block_graph import BlockGraph, DecisionChangedError, join_path
from qdq_surgery.graph.compiled_graph import compile_graph
from qdq_surgery.graph.replay import check_replay, copied
from qdq_surgery.hf.example_inputs import SHAPES, checked_examples, make_examples, resized, without_mask
from qdq_surgery.hf.wrappers import is_decoder_only, remedy_for
from qdq_surgery.match.matcher import match
from qdq_surgery.match.plan import Plan
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.safety.random_state import kept_random
from qdq_surgery.trace.units import Survey, survey

__all__ = ["Look", "analyse", "recordings_of"]


@dataclass(frozen=True)
class Look:
    """A model seen on two examples of different shape, so that what only holds for one shape shows."""

    inputs: dict[str, Any]
    others: dict[str, Any]
    first: Survey
    second: Survey


def analyse(model: PreTrainedModel, rules: RuleSet, example_inputs: Mapping[str, Any] | None) -> tuple[Look, Plan]:
    _check(model)
    if example_inputs is None:
        inputs = make_examples(model, SHAPES[0])
        candidates: Iterable[dict[str, Any]] = [make_examples(model, SHAPES[1])]
    else:
        inputs = checked_examples(model, example_inputs)
        candidates = resized(inputs)
    first = survey(model, inputs)
    others, second = _second(model, candidates)
    _compare(first, second)
    try:
        return Look(inputs, others, first, second), match(model, first, rules)
    except MatchError as error:
        if not is_decoder_only(model):
            raise
        raise ModelError(
            f"{type(model).__name__} is a decoder, and a decoder is not supported: the rules are for encoders, such as "
            "BERT's family; give one of those"
        ) from error


def _second(model: PreTrainedModel, candidates: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], Survey]:
    """The first of the candidates that the model takes, and what it shows."""
    failure: ModelError | None = None
    for inputs in candidates:
        try:
            return inputs, survey(model, inputs)
        except ModelError as error:
            failure = failure or error
    raise failure or ModelError("example_inputs has no tensor of token ids or states, (batch, tokens, ...)")


def _check(model: PreTrainedModel) -> None:
    if not isinstance(model, PreTrainedModel):
        found = f"found a {type(model).__name__}, wanted a Hugging Face PreTrainedModel"
        raise ModelError(f"{found}; {remedy_for(model)}")
    for name, module in model.named_modules():
        if isinstance(module, quant_nn.TensorQuantizer):
            raise AlreadyConvertedError(
                f"this {type(model).__name__} holds quantizers already (first: {name}); convert the float model"
            )
    other = getattr(model, "hf_quantizer", None)
    if other is not None:
        raise ModelError(
            f"this {type(model).__name__} is quantized by the method '{_method(other)}' already; load its float weights"
        )
    if getattr(model, "_hf_peft_config_loaded", False) or getattr(model, "peft_config", None):
        raise ModelError("the model has adapters; convert it first and add them then, or merge them")
    for name, tensor in model.named_parameters():
        if tensor.is_meta:
            raise ModelError(f"the parameter {name} has no data (meta device); load the weights first")


def _method(hf_quantizer: Any) -> str:
    method = hf_quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def _compare(first: Survey, other: Survey) -> None:
    """Mark the routines of ``first`` whose graph is another one for another batch and length: a size is baked in."""
    seen: set[int] = set()
    for unit, again in zip(first.units, other.units, strict=True):
        if unit.tree is None or again.tree is None or id(unit.tree) in seen:
            continue
        seen.add(id(unit.tree))
        twins = {(twin.path, twin.kind): twin for twin in again.tree.walk()}
        for routine in unit.tree.walk():
            twin = twins.get((routine.path, routine.kind))
            if routine.failure is not None:
                continue
            difference = "in another one it has none"
            if twin is not None and twin.failure is None:
                same = routine.signature == twin.signature
                difference = (_difference(routine.graph, twin.graph) or "") if same else "another is called otherwise"
                # (Another number of steps, for chunks, is decided by their count. A size that leaves as a plain number
                # would need a graph for each size.)
                steps = len(routine.graph.nodes) != len(twin.graph.nodes)
                if same and steps and _tells(routine, twin) and _tells(twin, routine):
                    continue
            if difference:
                routine.baked_size = (
                    f"the graph holds only for the example's shape ({difference}), so it cannot take quantizers"
                )


def _tells(routine: BlockGraph, other: BlockGraph) -> bool:
    """Whether a recorded decision of ``routine`` (on the number of chunks, say) turns the other's example away."""
    if other.example is None:
        return False
    values = copied(other.example[0].values)
    try:
        with kept_random([torch.device("cuda", index) for index in other.example[0].random[1]]), torch.no_grad():
            compile_graph(routine).run(routine.owner, values)
    except DecisionChangedError:
        return True
    except Exception:
        return False
    return False


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


def recordings_of(model: PreTrainedModel, look: Look, made: Plan) -> dict[tuple[str, str], list[BlockGraph]]:
    """The routines of all blocks that the plan rewrites: with and without a mask, in eval and in training mode.

    Raises:
        TraceError: A block has a graph in one of these that holds for one shape only, or none at all.
    """
    wanted = {(site.owner, site.routine) for site in made.sites if site.routine != "module"}
    if not wanted:
        return {}
    surveys = {"eval mode": look.first}
    pairs = [("training mode", look.inputs, look.others, look.first.calls, look.second.calls)]
    if "attention_mask" in look.inputs:
        bare, other = without_mask(look.inputs), without_mask(look.others)
        surveys["eval mode without a mask"] = survey(model, bare)
        calls = survey(model, other)
        _compare(surveys["eval mode without a mask"], calls)
        pairs.append(
            ("training mode without a mask", bare, other, surveys["eval mode without a mask"].calls, calls.calls)
        )
    for name, inputs, others, calls_first, calls_second in pairs:
        surveys[name] = survey(model, inputs, training=True, calls=calls_first)
        _compare(surveys[name], survey(model, others, training=True, calls=calls_second))
    found: dict[tuple[str, str], list[BlockGraph]] = {key: [] for key in wanted}
    for mode, taken in surveys.items():
        for unit in taken.units:
            for routine in unit.tree.walk() if unit.tree is not None else ():
                key = (join_path(unit.path, routine.path), routine.kind)
                if key not in wanted:
                    continue
                if routine.failure is not None or routine.baked_size is not None:
                    raise TraceError(f"{key[0]}, in {mode}: {routine.failure or routine.baked_size}")
                found[key].append(routine)
    kept = {key: _distinct(routines) for key, routines in found.items()}
    for (path, _), routines in kept.items():
        for routine in routines:
            try:
                check_replay(routine, lambda each: compile_graph(each).run)
            except TraceError as error:
                raise TraceError(f"{path}: {error}") from error
    return kept


def _distinct(routines: list[BlockGraph]) -> list[BlockGraph]:
    """One routine for each kind of call."""
    kept: list[BlockGraph] = []
    for routine in routines:
        if not any(
            (one.signature, one.argument_paths, one.reads) == (routine.signature, routine.argument_paths, routine.reads)
            for one in kept
        ):
            kept.append(routine)
    return kept
