"""What a model's forward takes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from transformers import PreTrainedModel

__all__ = ["named_arguments", "takes_any"]


def named_arguments(model: PreTrainedModel) -> Mapping[str, inspect.Parameter]:
    """The arguments of the forward, by name.

    One of a subclass that passes on whatever it is given (``*args, **kwargs``) names none: then those of the class
    above it.
    """
    forwards = [vars(each)["forward"].__get__(model) for each in type(model).__mro__ if "forward" in vars(each)]
    for forward in [model.forward, *forwards]:
        parameters = inspect.signature(forward).parameters
        if getattr(model, "main_input_name", None) in parameters or not _passes_on(parameters):
            return parameters
    return inspect.signature(model.forward).parameters


def takes_any(model: PreTrainedModel) -> bool:
    """Whether the model's forward takes arguments that it does not name."""
    return _passes_on(inspect.signature(model.forward).parameters)


def _passes_on(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
