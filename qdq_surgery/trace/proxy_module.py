"""A module that stands in for a block while it is recorded: it reports what its forward reads and calls."""

from __future__ import annotations

import functools
import types
from typing import Any, Protocol, cast

import torch
from torch import nn

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import PLAIN
from qdq_surgery.graph.shell_copy import copy_module_shell

__all__ = ["ModuleRecorder", "make_stand_in"]

# Read by the wrapper that transformers puts around a layer's forward, never by the forward itself.
_NOT_READ = frozenset({"gradient_checkpointing"})

_FUNCTIONS = (types.FunctionType, torch.jit.ScriptFunction)
_CALLED = (*_FUNCTIONS, types.MethodType, types.BuiltinMethodType, type)


_DECIDING = (*PLAIN, *_FUNCTIONS, types.BuiltinFunctionType, functools.partial)


def _decides(value: object) -> bool:
    """Whether a graph depends on an attribute of this kind: plain values, sequences of them, functions."""
    if isinstance(value, (tuple, list)):
        return all(isinstance(item, PLAIN) for item in value)
    return isinstance(value, _DECIDING)


class _Told(dict[type, bool]):
    """Whether a recorder is told of the reads of a value, by its type. Found without a call: the watch sees each."""

    def __missing__(self, kind: type) -> bool:
        told = self[kind] = issubclass(kind, (*_DECIDING, *_CALLED, tuple, list))
        return told


_TOLD = _Told()


class ModuleRecorder(Protocol):
    """Who is told about attribute reads and calls of children."""

    def note_read(self, path: str, name: str, value: Any) -> None:
        """The plain attribute ``name`` of the module at ``path`` was read."""

    def to_call(self, value: Any) -> Any:
        """What runs where the forward reads the function or method ``value``."""

    def call_child(self, path: str, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The real module ``child`` at ``path`` is to be called."""


_STAND_INS: dict[type[nn.Module], type[nn.Module]] = {}


def _stand_in_class(cls: type[nn.Module]) -> type[nn.Module]:
    """A subclass of ``cls`` that reports attribute reads and calls to its recorder."""
    known = _STAND_INS.get(cls)
    if known is not None:
        return known

    def __getattribute__(self: nn.Module, name: str) -> Any:
        value = cls.__getattribute__(self, name)
        if not _TOLD[type(value)]:
            return value
        if _decides(value) and not name.startswith("__") and name not in _NOT_READ:
            own = object.__getattribute__(self, "__dict__")
            recorder = own.get("_qdq_recorder")
            if recorder is not None and name in own:
                recorder.note_read(own["_qdq_path"], name, list(value) if isinstance(value, list) else value)
        if isinstance(value, _CALLED):
            recorder = object.__getattribute__(self, "__dict__").get("_qdq_recorder")
            return value if recorder is None else recorder.to_call(value)
        return value

    def __call__(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = object.__getattribute__(self, "__dict__")
        return own["_qdq_recorder"].call_child(own["_qdq_path"], own["_qdq_real"], args, kwargs)

    def __setattr__(_: nn.Module, name: str, __: Any) -> None:
        raise TraceError(f"{cls.__name__}.forward sets its own attribute '{name}', which a graph cannot do")

    members = {
        "__getattribute__": __getattribute__,
        "__call__": __call__,
        "__setattr__": __setattr__,
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
    }
    stand_in = cast("type[nn.Module]", types.new_class(cls.__name__, (cls,), exec_body=lambda own: own.update(members)))
    _STAND_INS[cls] = stand_in
    return stand_in


def make_stand_in(module: nn.Module, path: str, recorder: ModuleRecorder) -> nn.Module:
    """A module in place of ``module``, whose reads of attributes and calls of children ``recorder`` is told.

    Args:
        path: Where the module lies in the block that is recorded.
    """
    shell = copy_module_shell(module, _stand_in_class(type(module)))
    own = vars(shell)
    own["_qdq_recorder"], own["_qdq_path"], own["_qdq_real"] = recorder, path, module
    prefix = f"{path}." if path else ""
    own["_modules"] = {
        name: None if child is None else make_stand_in(child, prefix + name, recorder)
        for name, child in module._modules.items()
    }
    return shell
