"""What a forward calls without torch telling anyone, and how a recording sees it all the same.

No mode and no profile function is told when a function begins that ``torch.jit.script`` made; nor what an autograd
function is called with, where ``Function.apply`` is a function of C. So a recording runs copies: the same code, over
globals in which something else lies where such a function lay. Only what reaches one is copied, and the modeling file
stays as it is.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from types import BuiltinMethodType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from qdq_surgery.trace.autograd_watch import applied_function, sees_functions

__all__ = ["Applied", "Copies", "autograd_function", "products_inside"]

#: Where nothing is scripted that a modeling file calls by name, or what is scripted is one operator.
_NOT_ENTERED = frozenset({"torch", "qdq_surgery", "pytorch_quantization", "numpy", *sys.stdlib_module_names})

#: What the recipe quantizes the operands of, as TorchScript calls it.
_PRODUCTS = frozenset(f"aten::{name}" for name in "linear matmul mm bmm addmm addbmm baddbmm einsum conv1d".split()) | {
    "aten::scaled_dot_product_attention"
}
_SUMS = frozenset({"aten::add", "aten::add_"})

_Instead = Callable[[Any], Any]


class Copies:
    """Functions that call something else where the originals call what is hidden.

    Args:
        instead: What is to lie where a scripted function, an autograd function or its ``apply`` lay.
    """

    def __init__(self, instead: _Instead) -> None:
        self._instead = instead
        self._made: dict[Any, Any] = {}  # what has nothing hidden below it stands for itself

    def of(self, value: Any) -> Any:
        """What runs in place of ``value``: what is hidden, a function or a method; anything else is itself."""
        if isinstance(value, MethodType) and not _is_hidden(value):
            function = self.of(value.__func__)
            return value if function is value.__func__ else MethodType(function, value.__self__)
        if not _is_function(value):
            return value
        if value not in self._made:
            self._make(value)
        return self._made[value]

    def _make(self, value: Any) -> None:
        below = _everything_below(value)
        reaching = _those_that_reach(below)
        for each in below:
            if _is_hidden(each):
                self._made.setdefault(each, self._instead(each))
            else:
                self._made.setdefault(each, _shell(each) if each in reaching else each)
        for each in reaching:
            self._fill(each, self._made[each])

    def _fill(self, function: FunctionType, copy: FunctionType) -> None:
        """Put what is to be called into the globals and the cells of a copy."""
        names = _names(function.__code__)
        for name in names & function.__globals__.keys():
            value = function.__globals__[name]
            copy.__globals__[name] = self._view(value, names) if _is_entered(value) else self._made_for(value)
        for cell, own in zip(function.__closure__ or (), copy.__closure__ or (), strict=True):
            if cell is not own:
                own.cell_contents = self._made_for(cell.cell_contents)

    def _view(self, module: ModuleType, names: frozenset[str]) -> ModuleType:
        """``module`` with the copies in it."""
        changed = {name: self._made_for(value) for name, value in vars(module).items() if name in names}
        if all(value is vars(module)[name] for name, value in changed.items()):
            return module
        view = ModuleType(module.__name__)
        vars(view).update({**vars(module), **changed})
        return view

    def _made_for(self, value: Any) -> Any:
        return self._made.get(value, value) if _is_function(value) else value


class Applied:
    """What stands for an autograd function in globals: its ``apply`` is another, all else is its own."""

    def __init__(self, function: type[torch.autograd.Function], apply: Callable[..., Any]) -> None:
        self._function, self.apply = function, apply

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)


def products_inside(scripted: Any) -> list[str]:
    """The operators in a scripted function, as TorchScript calls them, that could take quantizers at their operands."""
    found = []
    for node in scripted.inlined_graph.nodes():
        nodes = [node, *(inner for block in node.blocks() for inner in _inner_nodes(block))]
        found += [each.kind() for each in nodes if each.kind() in _PRODUCTS or _adds_tensors(each)]
    return found


def _inner_nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _inner_nodes(inner)


def _adds_tensors(node: Any) -> bool:
    return node.kind() in _SUMS and all(str(each.type()) == "Tensor" for each in list(node.inputs())[:2])


def _is_hidden(value: Any) -> bool:
    return isinstance(value, torch.jit.ScriptFunction) or autograd_function(value) is not None


def autograd_function(value: Any) -> type[torch.autograd.Function] | None:
    """The autograd function that ``value`` is, or is the ``apply`` of, where the watch does not see it begin."""
    if sees_functions():
        return None
    if isinstance(value, type):
        return value if issubclass(value, torch.autograd.Function) else None
    return applied_function(value) if isinstance(value, (MethodType, BuiltinMethodType)) else None


def _is_function(value: Any) -> bool:
    return isinstance(value, FunctionType) or _is_hidden(value)


def _is_entered(value: Any) -> bool:
    return isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in _NOT_ENTERED


def _everything_below(value: Any) -> dict[Any, list[Any]]:
    """Each function that ``value`` may call by a name, itself included, with those that it names itself."""
    below: dict[Any, list[Any]] = {}
    waiting = [value]
    while waiting:
        each = waiting.pop()
        if each not in below:
            below[each] = list(_named_by(each)) if isinstance(each, FunctionType) else []
            waiting += below[each]
    return below


def _those_that_reach(below: dict[Any, list[Any]]) -> list[FunctionType]:
    """The Python functions that something hidden is below of."""
    callers: dict[Any, list[Any]] = {}
    for each, named in below.items():
        for callee in named:
            callers.setdefault(callee, []).append(each)
    found: dict[Any, None] = {}
    waiting = [each for each in below if _is_hidden(each)]
    while waiting:
        for caller in callers.get(waiting.pop(), []):
            if caller not in found:
                found[caller] = None
                waiting.append(caller)
    return list(found)


def _named_by(function: FunctionType) -> Iterator[Any]:
    """The functions that ``function`` finds by a global name, as an attribute of a module, or in a cell."""
    if str(function.__globals__.get("__name__")).partition(".")[0] in _NOT_ENTERED:
        return
    names = _names(function.__code__)
    for name in names & function.__globals__.keys():
        value = function.__globals__[name]
        if _is_function(value):
            yield value
        elif _is_entered(value):
            yield from (found for name in names & vars(value).keys() if _is_function(found := vars(value)[name]))
    yield from (cell.cell_contents for cell in function.__closure__ or () if _holds_function(cell))


@functools.lru_cache(maxsize=4096)
def _names(code: CodeType) -> frozenset[str]:
    """The names of globals and attributes in ``code`` and in the functions that it makes."""
    inner = (_names(constant) for constant in code.co_consts if isinstance(constant, CodeType))
    return frozenset(code.co_names).union(*inner)


def _holds_function(cell: CellType) -> bool:
    try:
        return _is_function(cell.cell_contents)
    except ValueError:  # it is empty: what it is for has not been made yet
        return False


def _shell(function: FunctionType) -> FunctionType:
    """A function with the code of ``function`` and globals of its own, and cells of its own for functions."""
    cells = tuple(CellType() if _holds_function(cell) else cell for cell in function.__closure__ or ())
    copy = FunctionType(
        function.__code__, dict(function.__globals__), function.__name__, function.__defaults__, cells or None
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__qualname__, copy.__module__ = function.__qualname__, function.__module__
    vars(copy).update(vars(function))
    return copy
