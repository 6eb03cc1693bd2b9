"""A second skeleton over the same tensors: what is analyzed in place of a user's model.

A shadow has modules of its own (same classes, same attributes) and shares every parameter, so it costs microseconds per
module and no memory for weights. Buffers, and tensors and collections in attributes, are its own: a forward in training
mode may write to them (the statistics of a batch norm, the vectors of a spectral norm). It has no hooks, its quantizers
let everything pass, and setting an attribute on it does not reach the original. So examples can run through it without
the user's model noticing.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from pytorch_quantization.nn import TensorQuantizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdq_surgery.safety.transaction import put_back_after

__all__ = ["copy_module_shell", "foreign_forward", "hollow", "real_tensors", "shadow"]

#: What a forward may write to without setting an attribute, or hold such things in.
_STATE = (Tensor, dict, list, set, tuple, nn.Module)

_TABLES = ("_parameters", "_buffers", "_modules")

#: Set by accelerate's hooks, and bound to the original.
_FORWARDS = ("forward", "_old_forward")


def copy_module_shell(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """An instance of ``cls`` with the attributes of ``module``, values shared, with no hooks and no children yet.

    Args:
        cls: The class of ``module`` or a subclass that adds no state.
    """
    shell: nn.Module = cls.__new__(cls)
    attributes = dict(vars(module))
    for table in _TABLES:
        attributes[table] = dict(attributes[table])
    for name in _hooks_in(tuple(attributes)):
        if isinstance(attributes[name], (dict, set)):
            attributes[name] = type(attributes[name])()
    attributes["_compiled_call_impl"] = None  # of module.compile(): it would run the original
    for name in _FORWARDS:
        if name in attributes:
            attributes[name] = _bound_to(shell, module, attributes[name])
    # nn.Module.__setattr__ must not see these: it would register the tables themselves.
    vars(shell).update(attributes)
    return shell


@functools.lru_cache(maxsize=1024)
def _hooks_in(names: tuple[str, ...]) -> tuple[str, ...]:
    """The attributes that hold hooks or sets of their ids, by nn.Module's own naming."""
    return tuple(name for name in names if name.endswith("_hooks") or "_hooks_" in name)


@functools.lru_cache(maxsize=1024)
def _others_in(names: tuple[str, ...]) -> tuple[str, ...]:
    """The attributes that are neither tables nor hooks, which were made a moment ago."""
    known = {*_TABLES, *_hooks_in(names)}
    return tuple(name for name in names if name not in known)


def _bound_to(shell: nn.Module, module: nn.Module, function: Any) -> Any:
    """``function`` for ``shell`` where it was one for ``module``."""
    if isinstance(function, functools.partial) and function.args[:1] == (module,):
        return functools.partial(function.func, shell, *function.args[1:], **function.keywords)
    if isinstance(function, types.MethodType) and function.__self__ is module:
        return types.MethodType(function.__func__, shell)
    return function


def foreign_forward(module: nn.Module) -> bool:
    """Whether ``module`` has a forward of its own that no copy of it can have: a function around the original's."""
    own = [vars(module)[name] for name in _FORWARDS if name in vars(module)]
    return any(_bound_to(module, module, function) is function for function in own)


def shadow(model: nn.Module) -> nn.Module:
    """The shadow of ``model``; modules, buffers and configs that are shared inside it are shared in the shadow too."""
    return _Shadow().visit(model)


@functools.lru_cache(maxsize=4096)
def _holds_state(kind: type) -> bool:
    return issubclass(kind, _STATE) and not issubclass(kind, nn.Parameter)


class _Shadow:
    """One shadow being made: what stands for what, by identity."""

    def __init__(self) -> None:
        self.shells: dict[int, nn.Module] = {}
        self.configs: dict[int, Any] = {}
        self.values: dict[int, tuple[Any, Any]] = {}  # with the original: an id is one only while its object lives

    def visit(self, module: nn.Module) -> nn.Module:
        known = self.shells.get(id(module))
        if known is not None:
            return known
        shell = self.shells[id(module)] = copy_module_shell(module, type(module))
        own = vars(shell)
        config = own.get("config")
        if config is not None:
            own["config"] = self.configs.setdefault(id(config), copy.copy(config))
        if isinstance(shell, TensorQuantizer):
            own["_disabled"] = True
        own["_buffers"] = {name: self._own(buffer) for name, buffer in own["_buffers"].items()}
        own["_modules"] = {
            name: None if child is None else self.visit(child) for name, child in own["_modules"].items()
        }
        for name in _others_in(tuple(own)):
            own[name] = self._own(own[name])
        return shell

    def _own(self, value: Any) -> Any:
        """``value`` with tensors, collections and modules of the shadow's own in it."""
        kind: type = type(value)
        if not _holds_state(kind):
            return value
        return self.visit(value) if isinstance(value, nn.Module) else self._copy(value)

    def _copy(self, value: Any) -> Any:
        known = self.values.get(id(value))
        if known is not None:
            return known[1]
        made: Any = value
        if isinstance(value, Tensor):
            made = value.detach().clone() if type(value) is Tensor else value
            self.values[id(value)] = value, made
        elif type(value) in (list, dict, OrderedDict):
            made = type(value)()
            self.values[id(value)] = value, made  # before it is filled: it may hold itself
            if isinstance(value, list):
                made.extend(self._own(item) for item in value)
            else:
                made.update((key, self._own(item)) for key, item in value.items())
        elif type(value) in (set, tuple):
            made = type(value)(self._own(item) for item in value)
        return made


def hollow(model: PreTrainedModel) -> PreTrainedModel:
    """A shadow of ``model`` with zeros for whatever has no data.

    transformers builds a model on the meta device and loads its weights afterwards. Where quantizers go does not depend
    on the weights, so they are put in before, and the loading finds a converted model.

    The zeros cost no memory as long as they are only read: the operating system has one page for all of them.
    """
    ghost = shadow(model)
    made: dict[int, Tensor] = {}
    for module in ghost.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None and tensor.is_meta:
                    table[name] = made.setdefault(id(tensor), _zeros(tensor))  # type: ignore[assignment]
    assert isinstance(ghost, PreTrainedModel)
    return ghost


def _zeros(tensor: Tensor) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    zeros = torch.from_numpy(np.zeros(size, dtype=np.uint8)).view(tensor.dtype).reshape(tensor.shape)
    return nn.Parameter(zeros, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else zeros


@contextmanager
def real_tensors() -> Iterator[None]:
    """New tensors are in main memory and in float32: not on the meta device, nor in the dtype of what is loaded."""
    dtype = torch.get_default_dtype()
    with put_back_after(lambda: torch.set_default_dtype(dtype)):
        torch.set_default_dtype(torch.float32)
        with torch.device("cpu"):
            yield
