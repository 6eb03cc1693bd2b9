"""The state of a model, and of what is global, as values that can be compared."""

from __future__ import annotations

import hashlib
import logging
import random
import sys
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from qdq_surgery.surgery.apply import base_class
from qdq_surgery.surgery.model_state import ModelState

__all__ = ["global_state", "state_of"]

_TABLES = ("_parameters", "_buffers", "_modules")


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything about ``model`` by name: classes, modes, attributes, tensors, hooks, configs."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        kind = type(module)
        found[f"{path} class"] = kind.__module__, kind.__qualname__, base_class(kind) is not kind
        for table in _TABLES:
            found[f"{path} {table}"] = [*vars(module)[table]]
        for table in ("_parameters", "_buffers"):
            for name, tensor in vars(module)[table].items():
                found[f"{path}.{name}"] = _tensor(tensor)
        for name, value in vars(module).items():
            if name not in _TABLES:
                found[f"{path} {name}"] = _value(value)
    return found


def _tensor(tensor: Tensor | None) -> Any:
    if tensor is None:
        return None
    values = hashlib.sha256(tensor.detach().contiguous().numpy().tobytes()).hexdigest()
    grad = None if tensor.grad is None else _tensor(tensor.grad)
    return type(tensor).__name__, str(tensor.dtype), tuple(tensor.shape), tensor.requires_grad, values, grad


def _value(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)):
        return value
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, PretrainedConfig):
        return {name: _value(each) for name, each in vars(value).items()}
    if isinstance(value, ModelState):
        return [(name, type(each).__name__) for name, each in vars(value).items()]
    if isinstance(value, dict):
        return [(str(key), _value(each)) for key, each in value.items()]
    if isinstance(value, (list, tuple)):
        return [_value(each) for each in value]
    return type(value).__name__


def global_state() -> dict[str, Any]:
    """What of torch, Python and logging a call could leave in another state."""
    return {
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "modes": torch._C._len_torch_function_stack(),
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "python": random.getstate(),
        "numpy": _of_numpy(np.random.get_state(legacy=False)),
        "handlers": [*logging.root.handlers],
        "level": logging.root.level,
        "profile": sys.getprofile(),
    }


def _of_numpy(state: Any) -> Any:
    return {**state, "state": {**state["state"], "key": state["state"]["key"].tobytes()}}
