"""From a calibrated model to one that runs its quantized linears on integers, in PyTorch: the steps in order."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from qdq_surgery.errors import ModelError, QdqSurgeryError
from qdq_surgery.freeze.checks import Choice, choose
from qdq_surgery.freeze.epilogues import activations, find_epilogues, fuse
from qdq_surgery.freeze.forward import FrozenForward
from qdq_surgery.freeze.frozen_state import FrozenOrigin, FrozenState, declare
from qdq_surgery.freeze.handovers import Handover, find_handovers, link, steps_of
from qdq_surgery.freeze.linear import make_integer
from qdq_surgery.freeze.shared_inputs import groups, makes
from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.hf.example_inputs import SHAPES, checked_examples, make_examples, resized, without_mask
from qdq_surgery.match.analyze import mark_baked_sizes
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.integer_embedding import make_integer_embedding
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.safety.given_flags import check_flags
from qdq_surgery.safety.random_state import alone, kept_random
from qdq_surgery.safety.transaction import all_or_nothing
from qdq_surgery.surgery.apply import base_class, quantized_class
from qdq_surgery.surgery.model_state import plan_of, quantized_forwards
from qdq_surgery.surgery.quantized_forward import CompiledGraphs
from qdq_surgery.trace.attention import QUANTIZED_FORWARDS
from qdq_surgery.trace.units import Survey, structure, survey

__all__ = ["assemble", "assemble_as", "freeze"]

_Model = TypeVar("_Model", bound=PreTrainedModel)


def freeze(qmodel: _Model, *, example_inputs: Mapping[str, Any] | None = None, inplace: bool = False) -> _Model:
    """Make the quantized linears of a calibrated model run on integers, for inference on a CPU or an NVIDIA GPU.

    Their weights are stored once, as int8 in the layout of their kernel: oneDNN's on a CPU, that of ``torch._int_mm``
    on a GPU. Scales per channel are folded; linears that read one tensor quantize it once; a GELU or ReLU is computed
    with the product before it. What no integer kernel of PyTorch takes stays as it is, fake quantization included:
    :func:`~qdq_surgery.frozen_receipt` lists it.

    Args:
        qmodel: A converted, calibrated model in float32 or bfloat16, or float16 on a GPU, in which what is not an
            integer product is computed.
        example_inputs: Keyword arguments of the model's forward, if none can be made from its config.
        inplace: Change ``qmodel`` itself, or nothing of it if anything goes wrong. Otherwise it stays as it is, and
            shares nothing with what is returned.

    Returns:
        A model of the same Hugging Face class with the same config, in eval mode, on the same device, whose outputs are
        those of ``qmodel`` but for ties: where a value lies between two integers to the last bit of a float, it may
        become the other one. (A product that rounds for the next one does so from float32, in a bfloat16 model, too.)
        It can be moved between CPU and GPU.

    Raises:
        ModelError: The model is not converted, is on another device, holds no linear that can be frozen, or one with a
            grid of other than 8 bits, or integer products do not run on this machine or in this dtype.
        CalibrationError: A quantizer has no range.
        OptionError: ``inplace`` is neither true nor false.
    """
    check_flags(inplace=inplace)
    choice = choose(qmodel)
    target = qmodel if inplace else _copied(qmodel, choice)
    with alone(), all_or_nothing(target), kept_random([]), torch.no_grad():
        origin = FrozenOrigin.of(target, (*choice.integer, *choice.tables))
        target.eval()
        for name in choice.integer:
            linear = target.get_submodule(name)
            assert isinstance(linear, QuantLinear)
            make_integer(linear)
        for name in choice.tables:
            embedding = target.get_submodule(name)
            assert isinstance(embedding, QuantEmbedding)
            make_integer_embedding(embedding)
        assemble(target, choice.kept, origin, example_inputs)
    return target


def assemble(
    target: PreTrainedModel, kept: dict[str, str], origin: FrozenOrigin, example_inputs: Mapping[str, Any] | None
) -> None:
    """All that freezing is, once weights are integers: look at the model, and say what it is.

    Args:
        target: In eval mode; it is changed.
        kept: Of what stays in float, why.

    Raises:
        ModelError: It does not run on the examples.
    """
    plan, calls = plan_of(target), _calls(target, example_inputs)
    surveys = [survey(target, inputs) for inputs in calls]
    _mark_baked_sizes(target, surveys[0], calls[0], example_inputs is None)
    units = [(unit.path, unit.tree) for each in surveys for unit in each.units if unit.tree is not None]
    fused = tuple(find_epilogues(target, units))
    fuse(target, fused, activations(target, fused))
    blocks = _rewritable(target, surveys[0])
    shared = _shared(target, blocks)
    reading = [path for together in shared.values() for group in together for path in group]
    found, paths = find_handovers(target, units, fused, reading), {path for path, _ in blocks}
    handed = tuple(each for each in found if each.block in paths)
    _rewrite(target, shared, handed)
    declare(target, FrozenState(plan, kept, fused, shared, handed, origin))
    # What the surveys have not recorded as it will be called is recorded now, and it is seen to run.
    for inputs in calls:
        _run(target, inputs)
    target.requires_grad_(False)


def assemble_as(target: PreTrainedModel, state: FrozenState, computed: Mapping[str, str]) -> None:
    """The same by what was found before, of the same model: it is looked at when it is first called.

    Args:
        computed: What products are to compute, by the paths of their linears.
    """
    fuse(target, state.epilogues, computed)
    _rewrite(target, state.shared, state.handovers)
    declare(target, state)
    target.requires_grad_(False)


def _copied(qmodel: _Model, choice: Choice) -> _Model:
    """A copy that shares with ``qmodel`` only the weights that it is about to lose."""
    lost = {f"{name}.weight" for name in (*choice.integer, *choice.tables)}
    holders: dict[int, list[str]] = {}
    for name, parameter in qmodel.named_parameters(remove_duplicate=False):
        holders.setdefault(id(parameter), []).append(name)
    # (One that is tied to what stays in float is copied like all else.)
    weights = [each for each in qmodel.parameters() if lost.issuperset(holders[id(each)])]
    try:
        return copy.deepcopy(qmodel, {id(weight): weight for weight in weights})
    except Exception as error:  # it holds a lock, an open file, a tensor of a graph
        raise ModelError(
            f"this {type(qmodel).__name__} cannot be copied ({type(error).__name__}: {error}); pass inplace=True"
        ) from error


def _calls(model: PreTrainedModel, given: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The calls that are looked at: with a mask, and without one."""
    first = make_examples(model, SHAPES[0]) if given is None else checked_examples(model, given)
    return [first, without_mask(first)] if "attention_mask" in first else [first]


def _mark_baked_sizes(model: PreTrainedModel, seen: Survey, inputs: dict[str, Any], made: bool) -> None:
    """Mark graphs that hold for one shape only, by another shape that the model takes; they are not rewritten."""
    for other in [make_examples(model, SHAPES[1])] if made else resized(inputs):
        try:
            mark_baked_sizes(seen, survey(model, other))
            return
        except ModelError:  # of inputs of one's own not every other shape is one
            if made:
                raise


def _rewritable(model: PreTrainedModel, seen: Survey) -> list[tuple[str, BlockGraph]]:
    """The blocks that may run another graph than their code, by path, each with what was recorded of it."""
    found = []
    for path, graph in seen.graphs():
        block = model.get_submodule(path) if path else model
        runs = graph.kind == "forward" and not graph.failure and not graph.baked_size
        if runs and _is_of(block, graph) and "forward" not in vars(block):
            found.append((path, graph))
    return found


def _shared(model: PreTrainedModel, blocks: list[tuple[str, BlockGraph]]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The linears that share what they read, by block."""
    shared: dict[str, tuple[tuple[str, ...], ...]] = {}
    for path, graph in blocks:
        if path in shared:
            continue
        found = groups(graph.graph, model.get_submodule(path))
        if found:
            shared[path] = tuple(tuple(join_path(path, str(node.target)) for node in calls) for calls in found)
    return shared


def _is_of(block: nn.Module, graph: BlockGraph) -> bool:
    """Whether the graph is of the block itself, not of what was recorded around a leaf that stands alone."""
    return type(graph.owner).__name__ == type(block).__name__


def _rewrite(model: nn.Module, shared: Mapping[str, tuple[tuple[str, ...], ...]], handed: tuple[Handover, ...]) -> None:
    """Rewrite the blocks in which linears share what they read, or one rounds for the next."""
    link(model, handed)
    made: dict[tuple[Any, ...], CompiledGraphs] = {}
    for path in dict.fromkeys((*shared, *(each.block for each in handed))):
        block = model.get_submodule(path)
        base, steps = base_class(type(block)), steps_of(path, handed)
        before = quantized_forwards(block).get("forward")
        original = base.forward if before is None else before.original
        edits, known = ((), frozenset()) if before is None else (before.edits, before.known)
        # Blocks that are alike share their graphs, if their linears also share the same, and hand over alike.
        make = (base, edits, known, structure(block), makes(block), steps)
        forward = FrozenForward.of(original, edits, known, made.setdefault(make, CompiledGraphs()), steps)
        object.__setattr__(block, "__class__", quantized_class(base))
        vars(block)[QUANTIZED_FORWARDS["forward"]] = forward


def _run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> None:
    try:
        model(**inputs)
    except QdqSurgeryError:
        raise
    except Exception as error:  # whatever a model's code makes of them
        raise ModelError(
            f"the frozen {type(model).__name__} does not run on the example inputs ({', '.join(inputs)}): "
            f"{type(error).__name__}: {error}; pass example_inputs= that it takes"
        ) from error
