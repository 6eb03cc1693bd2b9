"""What a node calls: torch functions in a form that the generated code can write down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qdq_surgery.graph.operators import callable_name
from qdq_surgery.safety.torch_private import qualified_name

__all__ = ["apply_of", "function_target", "is_in_place", "tensor_method"]

#: Dunder methods that change their first operand.
_IN_PLACE = frozenset(
    f"__i{stem}__" for stem in "add sub mul div truediv floordiv mod pow and or xor lshift rshift matmul".split()
)

# Some methods have another name than the one that they are known by: Tensor.__pow__ is called "pow".
_METHODS = {
    id(method): name for name in sorted(dir(torch.Tensor)) if callable(method := getattr(torch.Tensor, name, None))
}

_HELD: dict[Callable[..., Any], Callable[..., Any]] = {}


def tensor_method(function: Callable[..., Any]) -> str | None:
    """The name under which ``function`` is a method of every tensor; ``None`` for free functions."""
    name = getattr(function, "__name__", None)
    if name is not None and getattr(torch.Tensor, name, None) is function:
        return str(name)
    name = _METHODS.get(id(function))
    return name if name is not None and getattr(torch.Tensor, name, None) is function else None


def is_in_place(name: str) -> bool:
    """Whether a function called so changes its first operand, by torch's own way of naming."""
    return name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))


def function_target(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, or one that calls it where the name that fx would write for it means nothing, or another one."""
    if _is_resolved(function):
        return function
    if function not in _HELD:
        _HELD[function] = _holder(function, callable_name(function))
    return _HELD[function]


def apply_of(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What a node calls for an autograd function: all of it, with the backward that it brings."""
    return _holder(function.apply, function.__name__)


def _holder(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    call.__name__ = call.__qualname__ = name
    return call


def _is_resolved(function: Callable[..., Any]) -> bool:
    """Whether the name that fx gives to ``function`` means it."""
    try:
        first, *rest = qualified_name(function).split(".")
        found: Any = torch if first == "torch" else None
        for part in rest:
            found = getattr(found, part)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return found is function
