"""Changes to a model that are made whole or not at all, and states that are put back, also where an interrupt comes.

An interrupt can come before any line. So what puts a state back can be done again, and is: once more after it was done,
in case that it was not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["all_or_nothing", "kept_modes", "put_back_after"]

#: Tables of a module that are changed in place.
_TABLES = ("_parameters", "_buffers", "_modules")

#: The range of a quantizer, whose values are overwritten in place.
_RANGE = "_amax"


@contextmanager
def put_back_after(put_back: Callable[[], None]) -> Iterator[None]:
    """When the block ends, however it does, ``put_back`` has been called to its end.

    Args:
        put_back: Puts a state back. It may be called twice, and again after it was interrupted.
    """
    try:
        try:
            yield
        finally:
            put_back()
    finally:
        put_back()


@contextmanager
def kept_modes(*models: nn.Module) -> Iterator[None]:
    """When the block ends, each module is in training mode if it was before, whatever mode the block put it in."""
    before = [(module, module.training) for model in models for module in model.modules()]

    def put_back() -> None:
        for module, mode in before:
            module.training = mode

    with put_back_after(put_back):
        yield


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """If the block raises, whatever it raises, ``model`` is as it was before.

    That is: the classes of its modules, their attributes, parameters, buffers and children, the attributes of their
    configs, and the values of ranges. (Not the values of weights: nothing here changes them.)
    """
    before = _Snapshot(model)
    try:
        yield
    except BaseException:
        with put_back_after(before.put_back):
            raise


class _Snapshot:
    def __init__(self, model: nn.Module) -> None:
        self.modules = [(module, type(module), *_contents(module)) for module in model.modules()]
        configs = {
            id(config): config for module in model.modules() if (config := vars(module).get("config")) is not None
        }
        self.configs = [
            (vars(config), dict(vars(config))) for config in configs.values() if hasattr(config, "__dict__")
        ]
        self.ranges = [(amax, amax.detach().clone()) for module in model.modules() for amax in _ranges(module)]

    def put_back(self) -> None:
        for module, cls, attributes, tables in self.modules:
            if type(module) is not cls:
                object.__setattr__(module, "__class__", cls)
            for name, content in tables.items():
                _restore(attributes[name], content)
            _restore(vars(module), attributes)
        for own, content in self.configs:
            _restore(own, content)
        # Outside of inference mode, in which what was not made there cannot be written to.
        with torch.inference_mode(False), torch.no_grad():
            for amax, value in self.ranges:
                amax.data.copy_(value)


def _contents(module: nn.Module) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    attributes = dict(vars(module))
    return attributes, {name: dict(attributes[name]) for name in _TABLES}


def _restore(own: dict[str, Any], content: dict[str, Any]) -> None:
    # By identity: tensors have no truth in an equality, and most modules were not changed.
    if list(own) != list(content) or any(own[name] is not value for name, value in content.items()):
        own.clear()
        own.update(content)


def _ranges(module: nn.Module) -> list[Tensor]:
    found = (table.get(_RANGE) for table in (module._buffers, module._parameters))
    return [amax for amax in found if amax is not None and not amax.is_meta]
