"""What torch keeps to itself and this package needs: all of it here, so that a new release is met in one place.

Nothing public does the same. Beside each name stands what it is for; what must be true of it is in its test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.eager_transforms as function_transforms
import torch._functorch.functional_call as functional_calls
import torch._functorch.vmap as vmap_calls

# In a recording, copies are made behind the recorder's back.
from torch._C import DisableTorchFunction

# torch.no_grad() and its like end in this function: it is what a recorder sees of them, and what a graph repeats.
from torch._C import _set_grad_enabled as set_grad_enabled

# An operator in a graph of torch.export, which has a name and a namespace.
from torch._ops import OpOverload

# Inside torch.export there are no values to compare.
from torch._subclasses import FakeTensor

# The way to a function of torch in Python, for generated code.
from torch.fx.node import _get_qualified_name as qualified_name

# What a run computes, operator by operator, is seen through it: a receipt counts.
from torch.utils._python_dispatch import TorchDispatchMode

try:
    # The exporter's second try goes through dynamo, where torch.onnx.is_in_onnx_export() is a constant False.
    from torch.onnx._internal.exporter import _flags as onnx_flags
except ImportError:  # pragma: no cover (another release of torch)
    onnx_flags = None  # type: ignore[assignment]

#: A cast, of which ``Tensor.to`` is made in a graph that torch has taken apart.
to_copy = torch.ops.aten._to_copy.default

#: int8 times int8 to int32. Inductor has templates for this function on GPUs.
int_mm = torch._int_mm

__all__ = [
    "ONNX_EXPORTER_LOG",
    "DisableTorchFunction",
    "FakeTensor",
    "OpOverload",
    "TorchDispatchMode",
    "function_transforms",
    "functional_calls",
    "has_global_hooks",
    "int_mm",
    "is_exporting",
    "onnx_flags",
    "python_function",
    "qualified_name",
    "set_grad_enabled",
    "to_copy",
    "vmap_calls",
]

#: The name of the exporter's logger.
ONNX_EXPORTER_LOG = "torch.onnx._internal.exporter"


def has_global_hooks() -> bool:
    """Whether hooks look at every module's forward, as by ``register_module_forward_hook``."""
    module = torch.nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def is_exporting() -> bool:
    """Whether ``torch.export`` is tracing; ``torch.compiler.is_exporting()``.

    That is a constant ``True`` for dynamo, and so in each compiled model, in releases before 2.13 (seen in 2.11), whose
    flag it is for all else.
    """
    return bool(torch.compiler._is_exporting_flag)


def python_function(scripted: Any) -> Callable[..., Any] | None:
    """The function that ``torch.jit.script`` was given, which it keeps for dynamo; ``None`` for one from a file."""
    found = getattr(scripted, "_torchdynamo_inline", None)
    return found if callable(found) else None
