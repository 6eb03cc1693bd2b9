"""A model looked at and matched: the plan that a rule set makes for it, and the graphs that the plan edits."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pytorch_quantization import nn as quant_nn
from torch.fx import Graph, Node
from transformers import PreTrainedModel

from qdq_surgery.errors import AlreadyConvertedError, MatchError, ModelError, TraceError
from qdq_surgery.graph.block_graph import BlockGraph, DecisionChangedError
from qdq_surgery.graph.compiled_graph import compile_graph
from qdq_surgery.graph.replay import check_replay, copied
from qdq_surgery.graph.shell_copy import foreign_forward
from qdq_surgery.hf.example_inputs import SHAPES, checked_examples, make_examples, resized, without_mask
from qdq_surgery.hf.wrappers import is_decoder_only, remedy_for
from qdq_surgery.match.matcher import match
from qdq_surgery.match.plan import Plan
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.safety.random_state import kept_random
from qdq_surgery.trace.recorder import Wanted
from qdq_surgery.trace.units import Survey, find_units, survey

__all__ = ["Look", "analyze", "mark_baked_sizes", "recordings_of"]


@dataclass(frozen=True)
class Look:
    """A model seen on two examples of different shape, so that what only holds for one shape shows."""

    inputs: dict[str, Any]
    others: dict[str, Any]
    first: Survey
    second: Survey


def analyze(model: PreTrainedModel, rules: RuleSet, example_inputs: Mapping[str, Any] | None) -> tuple[Look, Plan]:
    """Record ``model`` on two examples, and match the rules to what was recorded. The model stays as it is.

    Args:
        example_inputs: The first example; ``None``: both are made from the model's config.

    Raises:
        AlreadyConvertedError: It has quantizers.
        MatchError: The rules do not find what they must.
        ModelError: It is no Hugging Face encoder with weights, or does not run on the examples.
    """
    _check(model)
    if example_inputs is None:
        inputs = make_examples(model, SHAPES[0])
        candidates: Iterable[dict[str, Any]] = [make_examples(model, SHAPES[1])]
    else:
        inputs = checked_examples(model, example_inputs)
        candidates = resized(inputs)
    first = survey(model, inputs)
    others, second = _second(model, candidates)
    mark_baked_sizes(first, second)
    try:
        made = match(model, first, rules)
    except MatchError as error:
        if not is_decoder_only(model):
            raise
        raise ModelError(_DECODER.format(type(model).__name__)) from error
    return Look(inputs, others, first, second), made


_DECODER = (
    "{} is a decoder, and a decoder is not supported: the rules are for encoders, such as BERT's family; "
    "give one of those"
)


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
    if is_decoder_only(model) and type(model).__module__.startswith("transformers."):
        # (Somebody's own class may look both ways, whatever its config is called.)
        raise ModelError(_DECODER.format(type(model).__name__))
    _check_forwards(model)


def _check_forwards(model: PreTrainedModel) -> None:
    """Whatever calls the units must call those of a copy in the copy: else what is recorded there is never run."""
    around = {"": model}
    for unit, _ in find_units(model):
        *parents, _ = unit.split(".")
        for end in range(1, len(parents) + 1):
            path = ".".join(parents[:end])
            around[path] = model.get_submodule(path)
    for path, module in around.items():
        if foreign_forward(module):
            raise ModelError(
                f"this {type(module).__name__}{' at ' + path if path else ''} has a forward of its own, set on the "
                "instance, which goes on calling the original in a copy; convert the model before it gets one, or set "
                "a method of it: types.MethodType(function, module)"
            )


def _method(hf_quantizer: Any) -> str:
    method = hf_quantizer.quantization_config.quant_method
    return str(getattr(method, "value", method))


def mark_baked_sizes(first: Survey, other: Survey) -> None:
    """Mark the graphs of ``first`` that are others for another batch and length: a size is baked in.

    Of the others, mark the axes of tensors that have another size there.
    """
    seen: set[int] = set()
    for unit, again in zip(first.units, other.units, strict=True):
        if unit.tree is None or again.tree is None or id(unit.tree) in seen:
            continue
        seen.add(id(unit.tree))
        others = {(graph.path, graph.kind): graph for graph in again.tree.walk()}
        for graph in unit.tree.walk():
            twin = others.get((graph.path, graph.kind))
            difference = None if graph.failure is not None else _depends(graph, twin)
            if difference is None and graph.failure is None and twin is not None:
                _mark_open_axes(graph.graph, twin.graph)
            if difference is not None:
                graph.baked_size = (
                    f"the graph holds only for the example's shape ({difference}), so it cannot take quantizers"
                )
    other.drop_examples()


def _mark_open_axes(graph: Graph, other: Graph) -> None:
    if len(graph.nodes) != len(other.nodes):
        return  # chunks, of which there are more
    for one, two in zip(graph.nodes, other.nodes, strict=True):
        sizes, again = one.meta.get("shape"), two.meta.get("shape")
        if sizes and again and len(sizes) == len(again):
            pairs = enumerate(zip(sizes, again, strict=True))
            # (A size that was recorded itself would record that it is compared.)
            one.meta["open_axes"] = {axis for axis, both in pairs if {*map(type, both)} == {int} and both[0] != both[1]}


def _depends(graph: BlockGraph, other: BlockGraph | None) -> str | None:
    """How a graph depends on the example's shape, given what was recorded at another one."""
    if other is None or other.failure is not None:
        return "in another one it has none"
    if graph.signature != other.signature:
        return "another is called otherwise"
    # (Another number of steps, for chunks, is decided by their count. A size that leaves as a plain number would need
    # a graph for each size.)
    steps = len(graph.graph.nodes) != len(other.graph.nodes)
    if steps and _tells(graph, other) and _tells(other, graph):
        return None
    return _difference(graph.graph, other.graph)


def _tells(graph: BlockGraph, other: BlockGraph) -> bool:
    """Whether a recorded decision of ``graph`` (on the number of chunks, say) turns the other's example away."""
    if other.example is None:
        return False
    values = copied(other.example[0].values)
    try:
        with kept_random([torch.device("cuda", index) for index in other.example[0].random[1]]), torch.no_grad():
            compile_graph(graph).run(graph.owner, values)
    except Exception as error:
        return isinstance(error, DecisionChangedError)
    return False


def _alike(graph: Graph, other: Graph) -> bool:
    """Whether two graphs are the same, node by node; if not, their sources may still be."""
    twins: dict[Node, Node] = {}

    def same(one: Any, two: Any) -> bool:
        if isinstance(one, Node):
            return twins.get(one) is two
        if type(one) is not type(two):
            return False
        if isinstance(one, (tuple, list)):
            return len(one) == len(two) and all(map(same, one, two))
        if isinstance(one, dict):
            return one.keys() == two.keys() and all(same(value, two[name]) for name, value in one.items())
        if isinstance(one, slice):
            return same((one.start, one.stop, one.step), (two.start, two.stop, two.step))
        return bool(one == two)

    if len(graph.nodes) != len(other.nodes):
        return False
    for one, two in zip(graph.nodes, other.nodes, strict=True):
        if (one.op, one.target, one.name) != (two.op, two.target, two.name):
            return False
        if not same(one.args, two.args) or not same(one.kwargs, two.kwargs):
            return False
        twins[one] = two
    return True


def _difference(graph: Graph, other: Graph) -> str | None:
    if _alike(graph, other):
        return None
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
    """The graphs of all blocks that the plan rewrites: with and without a mask, in eval and in training mode.

    Raises:
        TraceError: A block has a graph in one of these that holds for one shape only, or none at all.
        MatchError: One of them lacks what gets a quantizer.
    """
    kept: dict[tuple[str, str], list[BlockGraph]] = {key: [] for key in made.edits() if key[1] != "module"}
    if not kept:
        look.first.drop_examples()
        return kept
    for mode, seen in _surveys(model, look, kept.keys()):
        for path, graph in seen.graphs():
            graphs = kept.get((path, graph.kind))
            if graphs is None:
                continue
            if graph.failure is not None or graph.baked_size is not None:
                raise TraceError(f"{path}, in {mode}: {graph.failure or graph.baked_size}")
            if not any(_same_call(graph, one) for one in graphs):
                graphs.append(graph)
        seen.drop_examples(but={graph for graphs in kept.values() for graph in graphs})
    for (path, _), graphs in kept.items():
        for graph in graphs:
            try:
                check_replay(graph)
            except TraceError as error:
                raise TraceError(f"{path}: {error}") from error
    _check_reached(made, kept)
    return kept


def _check_reached(made: Plan, recordings: Mapping[tuple[str, str], list[BlockGraph]]) -> None:
    """Whether every kind of call computes whatever gets a quantizer.

    Raises:
        MatchError: One does not.
    """
    computed = {
        key: [{node.meta.get("origin") for node in routine.graph.nodes} for routine in routines]
        for key, routines in recordings.items()
    }
    for site in made.sites:
        if not all(site.origin in origins for origins in computed.get((site.owner, site.routine), ())):
            raise MatchError(
                f"rule '{site.rule}' puts {site.quantizer} at {site.operator} ({site.source}), which some calls do not "
                "compute (another mask, cache or mode), and it would stay unused there; quantize what every call "
                "computes: write a longer pattern, or exclude this one"
            )


def _surveys(model: PreTrainedModel, look: Look, edited: Wanted) -> Iterator[tuple[str, Survey]]:
    """What the model does in each mode that its calls may have, after the mode's name; each is seen at two shapes.

    Args:
        edited: The blocks that are looked at again: recording all that no edit touches would take as long.
    """
    look_again = functools.partial(survey, model, only=edited)
    masks = [("", look)]
    if "attention_mask" in look.inputs:
        bare, other = without_mask(look.inputs), without_mask(look.others)
        masks.append((" without a mask", Look(bare, other, look_again(bare), look_again(other))))
        mark_baked_sizes(masks[1][1].first, masks[1][1].second)
    for mask, seen in masks:
        yield f"eval mode{mask}", seen.first
    for mask, seen in masks:
        first = look_again(seen.inputs, training=True, like=seen.first)
        mark_baked_sizes(first, look_again(seen.others, training=True, like=seen.second))
        yield f"training mode{mask}", first


def _same_call(graph: BlockGraph, other: BlockGraph) -> bool:
    """Whether the two graphs are of one kind of call."""
    kinds = [(one.signature, one.argument_paths, one.reads) for one in (graph, other)]
    return kinds[0] == kinds[1]
