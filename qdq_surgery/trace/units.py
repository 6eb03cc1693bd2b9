"""A model, recorded: which units it has, the tree of routines of each, and which layers are alike.

A *unit* is an encoder layer (an entry of an outermost ``ModuleList``) or another block outside the layers. Layers that
have the same structure, get the same kind of arguments and read the same attributes are recorded once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeGuard

import torch
from torch import nn
from torch.fx import Node
from transformers import PreTrainedModel

from qdq_surgery.errors import ModelError, TraceError
from qdq_surgery.graph.block_graph import BlockGraph, Leaf, describe_leaf, flatten_call, join_path, rebuild_call
from qdq_surgery.graph.operators import is_leaf
from qdq_surgery.graph.replay import copied
from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.hf.config_facts import set_attention
from qdq_surgery.safety.random_state import kept_random
from qdq_surgery.trace.attention import QDQ_ATTENTION
from qdq_surgery.trace.pass_through import BlockCall, failed
from qdq_surgery.trace.recorder import Wanted, look_for

__all__ = ["RESIDUAL", "Call", "LoneLeaf", "Survey", "Unit", "find_units", "structure", "survey"]

#: Set in the ``meta`` of an add: whether it takes something back to the residual stream.
RESIDUAL = "residual"

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Unit:
    """An encoder layer, or a block outside the layers.

    Attributes:
        path: Where it lies in the model.
        layer: Index of the encoder layer; ``None`` outside the layers.
        tree: What was recorded; shared by layers that are alike. ``None`` if the example never reached it.
    """

    path: str
    layer: int | None
    tree: BlockGraph | None


@dataclass
class Survey:
    """All units of a model, recorded on one example.

    Attributes:
        calls: The arguments of each unit.
        attention: The attention function that the model ran with.
        linears: Paths of the linears that the run which found the calls came to, in units or between them.
    """

    units: list[Unit]
    calls: dict[str, Call] = field(default_factory=dict, repr=False)
    attention: str = QDQ_ATTENTION
    linears: frozenset[str] = frozenset()

    def graphs(self) -> Iterator[tuple[str, BlockGraph]]:
        """Path of each block that was reached, and its graph: one that layers share comes once for each of them."""
        for unit in self.units:
            for graph in unit.tree.walk() if unit.tree is not None else ():
                yield join_path(unit.path, graph.path), graph

    def drop_examples(self, but: Collection[BlockGraph] = ()) -> None:
        """Let go of the examples: no graph is tried on its own any more, except ``but`` these."""
        for _, graph in self.graphs():
            if graph not in but:
                graph.example = None


def find_units(model: nn.Module) -> Iterator[tuple[str, int | None]]:
    """Path and layer index of every unit, in the order of the model. A layer that stands twice is one unit."""
    seen: set[int] = set()

    def visit(module: nn.Module, path: str) -> Iterator[tuple[str, int | None]]:
        for name, child in module.named_children():
            where = f"{path}.{name}" if path else name
            if isinstance(child, nn.ModuleList):
                entries = list(_entries(child, where))
                # A list of single operators (the linears of a multi-label head) is no list of encoder layers.
                layers = any(not is_leaf(entry) for _, entry in entries)
                for index, (place, entry) in enumerate(entries):
                    if isinstance(entry, PreTrainedModel) and _has_list(entry):
                        yield from visit(entry, place)  # a list of encoders, each with layers of its own
                    elif id(entry) not in seen:
                        seen.add(id(entry))
                        yield place, index if layers else None
            elif isinstance(child, PreTrainedModel) or _is_dict(child) or (not is_leaf(child) and _has_list(child)):
                yield from visit(child, where)
            else:
                yield where, None

    yield from visit(model, "")


def _entries(modules: nn.ModuleList | nn.ModuleDict, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The entries of a list, with their paths; of a list of lists (Funnel's blocks) or dicts, those of each in turn."""
    for name, entry in modules.items() if isinstance(modules, nn.ModuleDict) else enumerate(modules):
        where = f"{path}.{name}"
        if isinstance(entry, nn.ModuleList) or _is_dict(entry):
            yield from _entries(entry, where)
        else:
            yield where, entry


def _is_dict(module: nn.Module) -> TypeGuard[nn.ModuleDict]:
    """Whether it only holds modules: nobody calls it, and what it holds is called."""
    return isinstance(module, nn.ModuleDict) and type(module).forward is nn.ModuleDict.forward


def _has_list(module: nn.Module) -> bool:
    return any(isinstance(child, nn.ModuleList) for child in module.modules())


def survey(
    model: PreTrainedModel,
    inputs: dict[str, Any],
    *,
    training: bool = False,
    like: Survey | None = None,
    only: Wanted | None = None,
) -> Survey:
    """Run ``model`` once on a shadow and record its units.

    Args:
        inputs: Keyword arguments of the model's forward.
        training: Record what the blocks do in training mode. The run that finds their arguments is in eval mode.
        like: A survey of the same model on the same inputs, if there is one: it has found the units' arguments.
        only: Path and kind of each block to record; ``None``: all of them. The others that lie in a unit with one of
            these have empty graphs, and other units have no tree. The model has no quantizers then.

    Raises:
        ModelError: The model cannot run on these inputs.
    """
    ghost = shadow(model)
    for module in ghost.modules():
        vars(module)["training"] = False
    paths = list(find_units(ghost))
    devices = [device for device in {p.device for p in model.parameters()} if device.type == "cuda"]
    with kept_random(devices), torch.no_grad():
        if like is None:
            calls, linears, attention = _find_calls_with(ghost, [path for path, _ in paths], inputs)
        else:
            calls, linears, attention = like.calls, like.linears, like.attention
            _choose(ghost, attention)
        if training:
            for module in ghost.modules():
                vars(module)["training"] = True
        if only is None:
            units = _record_units(ghost, paths, calls, None)
        else:
            within = {path: _within(path, only) for path, _ in paths}
            wanted = {path: call for path, call in calls.items() if within[path]}
            # (One set for all: layers that are alike share a tree, though rules may tell them apart.)
            units = _record_units(ghost, paths, wanted, frozenset().union(*within.values()))
    if only is None:
        for unit in units:
            _mark_residual_adds(unit, calls)
    return Survey(units, calls, attention, linears)


def _within(unit: str, only: Wanted) -> set[tuple[str, str]]:
    """Of ``only`` those that lie in a unit, by their paths in it."""
    below = {(path[len(unit) + 1 :], kind) for path, kind in only if path.startswith(f"{unit}.")}
    return below | {("", kind) for path, kind in only if path == unit}


def _choose(ghost: nn.Module, attention: str) -> None:
    for module in ghost.modules():
        set_attention(getattr(module, "config", None), attention)


def _find_calls_with(
    ghost: nn.Module, paths: list[str], inputs: dict[str, Any]
) -> tuple[dict[str, Call], frozenset[str], str]:
    """What :func:`_find_calls` finds, and the attention function that the model takes."""
    _choose(ghost, QDQ_ATTENTION)
    try:
        return *_find_calls(ghost, paths, inputs), QDQ_ATTENTION
    except ModelError as error:
        if error.__cause__ is None:  # it ran, and is refused for what it did
            raise
        # Where transformers' interface is not used, a modeling file may look the name up in a table of its own. The
        # eager function in it is then a function like any other, recorded in the block that calls it.
        _choose(ghost, "eager")
        try:
            return *_find_calls(ghost, paths, inputs), "eager"
        except ModelError:
            raise error from error.__cause__


def _find_calls(ghost: nn.Module, paths: list[str], inputs: dict[str, Any]) -> tuple[dict[str, Call], frozenset[str]]:
    """What each unit is first handed, and the linears that the example comes to."""
    calls: dict[str, Call] = {}
    linears: set[str] = set()
    notes: list[tuple[nn.Module, Callable[[Call], object]]] = [
        (ghost.get_submodule(path), functools.partial(calls.setdefault, path)) for path in paths
    ]
    notes += [
        (module, functools.partial(_add, linears, name))
        for name, module in ghost.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear)
    ]
    # (One module may be noted more than once, in all the places where it stands.)
    noted = {module: vars(module).get("forward") for module, _ in notes}
    for module, note in notes:
        vars(module)["forward"] = _noting(module.forward, note)
    before = [(name, type(module)) for name, module in ghost.named_modules()]
    try:
        ghost(**inputs)
    except Exception as error:
        raise ModelError(
            f"{type(ghost).__name__} does not run on the example inputs ({', '.join(inputs)}): "
            f"{type(error).__name__}: {error}; pass example_inputs= that it takes"
        ) from error
    finally:
        for module, own in noted.items():
            if own is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = own
    _check_unchanged(ghost, before)
    return calls, frozenset(linears)


def _check_unchanged(ghost: nn.Module, before: list[tuple[str, type[nn.Module]]]) -> None:
    for (name, kind), (now_name, now_kind) in zip_longest(
        before, [(name, type(module)) for name, module in ghost.named_modules()], fillvalue=("", type(None))
    ):
        if (name, kind) != (now_name, now_kind):
            raise ModelError(
                f"{type(ghost).__name__} changes its own modules while it runs: '{name}' was a {kind.__name__} and is "
                f"a {now_kind.__name__} now; run the model on such inputs once, then convert it"
            )


def _noting(forward: Callable[..., Any], note: Callable[[Call], object]) -> Callable[..., Any]:
    """``forward``, which notes what it is handed. No hook does: SqueezeBERT calls its layers' ``forward``."""

    @functools.wraps(forward)
    def noting(*args: Any, **kwargs: Any) -> Any:
        note((args, kwargs))
        return forward(*args, **kwargs)

    return noting


def _add(names: set[str], name: str, _: Call) -> None:
    names.add(name)  # what a linear is handed is not kept


def _record_units(
    ghost: nn.Module, paths: list[tuple[str, int | None]], calls: dict[str, Call], wanted: Wanted | None
) -> list[Unit]:
    units: list[Unit] = []
    recorded: dict[tuple[Any, ...], list[BlockGraph]] = {}
    for path, layer in paths:
        call = calls.get(path)
        if call is None:
            units.append(Unit(path, layer, None))
            continue
        module = ghost.get_submodule(path)
        values, names = flatten_call(*call)
        key = (structure(module), tuple(map(_describe_example, values)), tuple(names))
        tree = next((tree for tree in recorded.get(key, []) if _reads_same(tree, module)), None)
        if tree is None:
            tree = _record_unit(module, call, wanted)
            recorded.setdefault(key, []).append(tree)
        units.append(Unit(path, layer, tree))
    return units


def _record_unit(module: nn.Module, call: Call, wanted: Wanted | None) -> BlockGraph:
    look = look_for(wanted)
    if is_leaf(module):
        # A linear that stands alone: its caller is never recorded, so it gets a routine around it.
        module, look = LoneLeaf(module), look_for(None)
    # (A layer that changes its arguments must not change those that the next recording is to get.)
    args, kwargs = (rebuild_call(part, iter(copied(flatten_call((part,), {})[0]))) for part in call)
    made = BlockCall(module, type(module).forward, args, kwargs, "", "forward")
    try:
        return look(made)[0]
    except TraceError as error:
        return failed(made, error)


class LoneLeaf(nn.Module):
    """The block around a linear, or another leaf, that stands outside of all blocks; ``leaf`` is the leaf."""

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf = leaf

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the leaf makes of the arguments."""
        return self.leaf(*args, **kwargs)


def structure(module: nn.Module) -> tuple[Any, ...]:
    """What two blocks must share to be recorded once: classes, names and shapes all the way down."""
    return tuple(
        (
            name,
            type(child),
            id(vars(child).get("config")),
            *((key, tuple(p.shape), p.dtype) for key, p in child._parameters.items() if p is not None),
        )
        for name, child in module.named_modules(remove_duplicate=False)
    )


def _describe_example(value: Any) -> Leaf:
    return (*describe_leaf(value), tuple(value.shape)) if isinstance(value, torch.Tensor) else describe_leaf(value)


def _reads_same(tree: BlockGraph, module: nn.Module) -> bool:
    for routine in tree.walk():
        if routine.failure is not None:
            return False
        for (path, name), value in routine.reads.items():
            whole = join_path(routine.path, path)
            owner = module.get_submodule(whole) if whole else module
            if getattr(owner, name, None) != value:
                return False
    return True


def _mark_residual_adds(unit: Unit, calls: dict[str, Call]) -> None:
    """Mark the adds of two activations that have the shape of the layer's hidden states."""
    if unit.layer is None or unit.tree is None:
        return
    hidden = _hidden_shape(unit.tree, flatten_call(*calls[unit.path])[0])
    for graph in unit.tree.walk():
        for node in graph.graph.nodes:
            if node.meta.get("op") == "add":
                operands = [tuple(arg.meta.get("shape") or ()) for arg in node.args if isinstance(arg, Node)]
                same = len(operands) == 2 and operands[0] == operands[1] and len(operands[0]) == 3
                node.meta[RESIDUAL] = same and operands[0][:2] == hidden


def _hidden_shape(tree: BlockGraph, values: list[Any]) -> tuple[int, ...] | None:
    """(batch, tokens) of what a layer is handed and hands on; a mask may come before it, as an argument."""
    shapes = [tuple(value.shape) for value in values if isinstance(value, torch.Tensor) and value.is_floating_point()]
    shapes = [shape for shape in shapes if len(shape) == 3]
    handed_on = {each.meta.get("shape") for each in flatten_call((tree.output,), {})[0] if isinstance(each, Node)}
    found = next((shape for shape in shapes if shape in handed_on), None) or next(iter(shapes), None)
    return None if found is None else found[:2]
