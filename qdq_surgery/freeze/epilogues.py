"""What follows a product moves into its epilogue: the activation function, and the rounding for the next product.

    linear -> GELU -> quantize -> linear    becomes    linear with GELU, uint8 out -> linear

The linears may lie in different blocks, as in BERT, where the parent hands the uint8 tensor on. The function's module
becomes one that lets everything pass; so whatever calls it, recorded graph or original code, finds it done.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from qdq_surgery.freeze.dataflow import readers
from qdq_surgery.freeze.input_grid import InputGrid
from qdq_surgery.freeze.linear import IntegerLinear
from qdq_surgery.graph.block_graph import BlockGraph, join_path
from qdq_surgery.graph.operators import is_leaf
from qdq_surgery.match.subgraph import Value

__all__ = ["Done", "Epilogue", "find_epilogues", "fuse"]

#: What oneDNN computes in an epilogue: its words, and the function.
_POST_OPS: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    ("gelu", "none"): functional.gelu,
    ("gelu", "tanh"): functools.partial(functional.gelu, approximate="tanh"),
    ("relu", ""): functional.relu,
}

#: Largest difference of two functions that count as one, on values from -12 to 12.
_ALIKE = 2e-6


@dataclass(frozen=True)
class Epilogue:
    """A linear, what follows it, and who reads that.

    Attributes:
        linear, function: Paths in the model.
        readers: Paths of the integer linears that are all that reads the function's result; empty if others do.
    """

    linear: str
    function: str
    readers: tuple[str, ...]


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
    if _post_op(_module(model, function)) is None or _hooked(model, path) or _hooked(model, function):
        return None
    behind = readers(after[0])
    paths = tuple(_path(unit, each) for each in behind or () if each.node.op == "call_module")
    whole = behind is not None and len(paths) == len(behind)
    rounds = whole and all(isinstance(_module(model, each), IntegerLinear) for each in paths)
    # Who looks at what a block around them gives or is given wants numbers, not integers.
    around = {each.rpartition(".")[0] for each in (path, function, *paths)}
    rounds = rounds and not any(_hooked(model, each) for each in (*around, *paths))
    return Epilogue(path, function, paths if rounds else ())


def _path(unit: str, value: Value) -> str:
    return join_path(unit, value.graph.path, str(value.node.target))


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:  # a leaf that stands alone was recorded in a block around it
        return None


def _hooked(model: nn.Module, path: str) -> bool:
    """Whether somebody looks at what a module is given or gives: that has to stay what it was."""
    module = _module(model, path)
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def _post_op(module: nn.Module | None) -> tuple[str, str] | None:
    """OneDNN's words for what a module computes, found by what it computes; ``None`` if it has none for it."""
    if module is None or not is_leaf(module) or any(True for _ in module.parameters()) or isinstance(module, nn.Linear):
        return None
    values = torch.linspace(-12.0, 12.0, 4801)
    with torch.no_grad():
        try:
            found = module(values)
        except Exception:  # it takes something else than one tensor
            return None
        if not isinstance(found, Tensor) or found.shape != values.shape or found.dtype != values.dtype:
            return None
        near = (
            words for words, function in _POST_OPS.items() if float((found - function(values)).abs().max()) < _ALIKE
        )
        return next(near, None)


def fuse(model: nn.Module, epilogues: Iterable[Epilogue]) -> Iterator[Epilogue]:
    """Move functions into products, in place; yields what was done, without readers where the roundings stay."""
    for each in epilogues:
        linear = model.get_submodule(each.linear)
        assert isinstance(linear, IntegerLinear)
        function = model.get_submodule(each.function)
        words = _post_op(function)
        assert words is not None
        linear.post_op, linear.algorithm = words
        parent, _, name = each.function.rpartition(".")
        model.get_submodule(parent)._modules[name] = Done(function)
        grids = [_grid_of(model.get_submodule(path)) for path in each.readers]
        one = len({grid.key for grid in grids}) == 1 and grids[0].single
        if one:
            linear.round_to(grids[0])
        yield each if one else Epilogue(each.linear, each.function, ())


def _grid_of(module: nn.Module) -> InputGrid:
    assert isinstance(module, IntegerLinear)
    return module.input_grid
