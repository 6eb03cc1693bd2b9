"""A second skeleton over the same tensors: what is analysed in place of a user's model.

A shadow has modules of its own (same classes, same attributes) and shares every parameter and buffer, so it costs
microseconds per module and no memory for weights. It has no hooks, its quantizers let everything pass, and setting an
attribute on it does not reach the original. So examples can run through it without the user's model noticing.
"""

from __future__ import annotations

import copy
import functools
import types
from collections import OrderedDict
from typing import Any

from pytorch_quantization.nn import TensorQuantizer
from torch import nn

__all__ = ["copy_module_shell", "shadow"]

_TABLES = ("_parameters", "_buffers", "_modules")


def copy_module_shell(module: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """An instance of ``cls`` with the attributes of ``module``, values shared, with no hooks and no children yet.

    Args:
        cls: The class of ``module`` or a subclass that adds no state.
    """
    shell: nn.Module = cls.__new__(cls)
    attributes = dict(vars(module))
    for table in _TABLES:
        attributes[table] = dict(attributes[table])
    for name, value in attributes.items():
        if name.endswith("_hooks") or "_hooks_" in name:
            # Hook tables, and sets of hook ids, by nn.Module's own naming.
            attributes[name] = type(value)() if isinstance(value, (dict, OrderedDict, set)) else value
    attributes["_compiled_call_impl"] = None  # of module.compile(): it would run the original
    for name in ("forward", "_old_forward"):  # set by accelerate's hooks: bound to the original
        if name in attributes:
            attributes[name] = _bound_to(shell, module, attributes[name])
    # nn.Module.__setattr__ must not see these: it would register the tables themselves.
    vars(shell).update(attributes)
    return shell


def _bound_to(shell: nn.Module, module: nn.Module, function: Any) -> Any:
    """``function`` for ``shell`` where it was one for ``module``."""
    if isinstance(function, functools.partial) and function.args[:1] == (module,):
        return functools.partial(function.func, shell, *function.args[1:], **function.keywords)
    if isinstance(function, types.MethodType) and function.__self__ is module:
        return types.MethodType(function.__func__, shell)
    return function


def shadow(model: nn.Module) -> nn.Module:
    """The shadow of ``model``; modules and configs that are shared inside it are shared in the shadow too."""
    shells: dict[int, nn.Module] = {}
    configs: dict[int, Any] = {}

    def visit(module: nn.Module) -> nn.Module:
        known = shells.get(id(module))
        if known is not None:
            return known
        shell = shells[id(module)] = copy_module_shell(module, type(module))
        own = vars(shell)
        config = own.get("config")
        if config is not None:
            own["config"] = configs.setdefault(id(config), copy.copy(config))
        if isinstance(shell, TensorQuantizer):
            own["_disabled"] = True
        own["_modules"] = {name: None if child is None else visit(child) for name, child in own["_modules"].items()}
        return shell

    return visit(model)
