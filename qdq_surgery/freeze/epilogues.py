"""The activation function behind a product moves into its epilogue.

    linear -> GELU    becomes    linear with GELU

The function's module becomes one that lets everything pass; so whatever calls it, recorded graph or original code,
finds it done.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qdq_surgery.freeze.dataflow import readers
from qdq_surgery.freeze.linear import IntegerLinear, hooked
from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.graph.operators import is_leaf
from qdq_surgery.integers.product import ACTIVATIONS
from qdq_surgery.match.subgraph import Value

__all__ = ["Done", "Epilogue", "activations", "find_epilogues", "fuse"]

#: Where functions are compared: closely around 0, and far away, where some are cut off.
_PROBE = torch.cat([torch.linspace(-12.0, 12.0, 4801), *(sign * torch.logspace(-4, 5, 400) for sign in (-1.0, 1.0))])

#: Largest difference of two functions that count as one, beside the last bits of large values.
_ALIKE = 2e-6


@dataclass(frozen=True)
class Epilogue:
    """A linear, and the function that alone reads what it gives.

    Attributes:
        linear, function: Paths in the model.
    """

    linear: str
    function: str


class Done(nn.Module):
    """In the place of a function that the product before it computes in its epilogue; lets everything pass."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.words = f"{type(function).__name__}, done in the product before"
        self.train(function.training)

    def forward(self, values: Tensor) -> Tensor:
        """``values`` themselves."""
        return values

    def extra_repr(self) -> str:
        """What was here."""
        return self.words


def find_epilogues(model: nn.Module, recorded: Iterable[tuple[str, BlockGraph]]) -> list[Epilogue]:
    """All places where what follows an integer linear can move into it.

    Args:
        recorded: The path of each unit and its tree, for each kind of call that was looked at. A place counts if every
            call of its linear and of its function, in all of them, is this one.
    """
    found: dict[str, list[Epilogue | None]] = {}
    for path, tree in recorded:
        for graph in tree.walk():
            for node in graph.graph.nodes if graph.failure is None else ():
                if node.op == "call_module":
                    where = join_path(path, graph.path, str(node.target))
                    found.setdefault(where, []).append(_epilogue(model, path, Value(graph, node), where))
    # A module that hangs in two places has two paths: the function, or the linear, is then somebody else's, too.
    seen = [id(module) for _, module in model.named_modules(remove_duplicate=False)]
    made = []
    for places in found.values():
        first = places[0]
        if first is None or any(place != first for place in places):
            continue
        modules = [model.get_submodule(path) for path in (first.linear, first.function)]
        calls = found.get(first.function, [])
        if all(seen.count(id(module)) == 1 for module in modules) and len(calls) == len(places):
            made.append(first)
    return made


def _epilogue(model: nn.Module, unit: str, value: Value, path: str) -> Epilogue | None:
    if not isinstance(_module(model, path), IntegerLinear):
        return None
    after = readers(value)
    if after is None or len(after) != 1 or after[0].node.op != "call_module":
        return None
    function = _path(unit, after[0])
    if _activation(_module(model, function)) is None or any(
        map(hooked, (_module(model, path), _module(model, function)))
    ):
        return None
    return Epilogue(path, function)


def _path(unit: str, value: Value) -> str:
    return join_path(unit, value.graph.path, str(value.node.target))


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:  # a leaf that stands alone was recorded in a block around it
        return None


def _activation(module: nn.Module | None) -> str | None:
    """The name of what a module computes, found by what it computes; ``None`` if products do not compute it."""
    if module is None or not is_leaf(module) or any(True for _ in module.parameters()) or isinstance(module, nn.Linear):
        return None
    with torch.no_grad():
        try:
            found = module(_PROBE.clone())  # which it may change in place
        except Exception:  # it takes something else than one tensor
            return None
    if not isinstance(found, Tensor) or found.shape != _PROBE.shape or found.dtype != _PROBE.dtype:
        return None
    near = (name for name, wanted in _wanted().items() if torch.allclose(found, wanted, rtol=1e-6, atol=_ALIKE))
    return next(near, None)


@functools.cache
def _wanted() -> dict[str, Tensor]:
    """What each function that products compute makes of the probe; asked for once for each layer that is loaded."""
    return {name: function(_PROBE) for name, function in ACTIVATIONS.items()}


def activations(model: nn.Module, epilogues: Iterable[Epilogue]) -> dict[str, str]:
    """What the products are to compute, by the paths of their linears.

    An epilogue that cannot be, whoever says so, is left out: there is no integer linear, or no such function.
    """
    linears = {each: isinstance(_module(model, each.linear), IntegerLinear) for each in epilogues}
    found = {each.linear: _activation(_module(model, each.function)) for each, known in linears.items() if known}
    return {linear: name for linear, name in found.items() if name is not None}


def fuse(model: nn.Module, epilogues: Iterable[Epilogue], computed: Mapping[str, str]) -> None:
    """Move functions into products, in place.

    Args:
        computed: What :func:`activations` says of them.
    """
    for each in epilogues:
        linear = model.get_submodule(each.linear)
        assert isinstance(linear, IntegerLinear)
        linear.activation = computed[each.linear]
        parent, _, name = each.function.rpartition(".")
        model.get_submodule(parent)._modules[name] = Done(model.get_submodule(each.function))
