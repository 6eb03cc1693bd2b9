"""What a recorded call is called in patterns: torch functions, tensor methods and modules -> operator names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytorch_quantization.nn import TensorQuantizer
from torch import nn

from qdq_surgery.rules.pattern import OPERATORS

__all__ = [
    "INSIDE",
    "PRODUCTS",
    "callable_name",
    "function_operator",
    "is_leaf",
    "is_plain_embedding",
    "is_plain_linear",
    "module_operator",
]

#: Matrix products. (The recipe has no rule for those that are neither a linear nor a plain matmul.)
PRODUCTS = frozenset({"linear", "matmul", "baddbmm", "einsum", "sdpa", "conv1d"})

#: Set in the ``meta`` of an autograd function that holds such a product: its operator.
INSIDE = "inside"

#: Functions whose own name is not the operator's.
_ALIASES = {
    "add_": "add",
    "iadd": "add",
    "__add__": "add",
    "__iadd__": "add",
    "__radd__": "add",
    "sub_": "sub",
    "__rsub__": "sub",
    "subtract": "sub",
    "mul_": "mul",
    "multiply": "mul",
    "div_": "div",
    "divide": "div",
    "true_divide": "div",
    "bmm": "matmul",
    "mm": "matmul",
    "__matmul__": "matmul",
    "__rmatmul__": "matmul",
    "addbmm": "baddbmm",
    "scaled_dot_product_attention": "sdpa",
    "masked_fill_": "masked_fill",
    "softmax_": "softmax",
    "_softmax": "softmax",
    "dropout_": "dropout",
    "relu_": "relu",
    "concat": "cat",
    "concatenate": "cat",
    "view_as": "view",
    "reshape_as": "reshape",
    "expand_as": "expand",
    "repeat_interleave": "repeat",
    "movedim": "permute",
    "narrow": "select",
    "__getitem__": "select",
    "tensor_split": "split",
    "to": "cast",
    "float": "cast",
    "half": "cast",
    "bfloat16": "cast",
    "type_as": "cast",
    "type": "cast",
    "logsigmoid": "sigmoid",
}

#: Functions that swap two axes; which operator they are depends on the axes.
_SWAPS = frozenset({"transpose", "swapaxes", "swapdims", "t", "T", "mT", "adjoint"})

_MODULES: tuple[tuple[type[nn.Module], str], ...] = (
    (TensorQuantizer, "quantizer"),
    (nn.Linear, "linear"),
    (nn.Conv1d, "conv1d"),
    (nn.LayerNorm, "layer_norm"),
    (nn.Dropout, "dropout"),
    (nn.Embedding, "embedding"),
    (nn.Softmax, "softmax"),
    (nn.Identity, "identity"),
    (nn.GELU, "gelu"),
    (nn.ReLU, "relu"),
    (nn.SiLU, "silu"),
    (nn.Tanh, "tanh"),
    (nn.Sigmoid, "sigmoid"),
)

_KINDS = tuple(kind for kind, _ in _MODULES)

#: Modules of these Python modules are operators in themselves; their insides are never traced.
_LEAF_HOMES = ("torch.nn.modules.", "transformers.activations", "pytorch_quantization.")


def module_operator(module: nn.Module) -> str:
    """The operator that calling ``module`` is; its class's name in small letters if it has none."""
    for kind, operator in _MODULES:
        if isinstance(module, kind):
            return operator
    home = type(module).__module__
    if home == "transformers.activations":
        name = type(module).__name__.lower()
        return "gelu" if "gelu" in name else "activation"
    if home == "torch.nn.modules.activation":
        return "activation"
    return type(module).__name__.lower()


def is_leaf(module: nn.Module) -> bool:
    """Whether a call of ``module`` is one operator, rather than a block with a graph of its own."""
    if isinstance(module, _KINDS):
        return True
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    return type(module).__module__.startswith(_LEAF_HOMES) and not isinstance(module, containers)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether ``module`` computes exactly what ``nn.Linear`` does, so that its class may be exchanged."""
    return (
        type(module) is nn.Linear  # a subclass would lose its class
        and "forward" not in vars(module)
        # A parametrized weight (weight norm, for one) is computed by the class that would be replaced.
        and "weight" in module._parameters
    )


def is_plain_embedding(module: nn.Module) -> bool:
    """The same of ``nn.Embedding``; one whose table is changed by looking things up (``max_norm``) is none."""
    return (
        type(module) is nn.Embedding
        and "forward" not in vars(module)
        and "weight" in module._parameters
        and module.max_norm is None
    )


def function_operator(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """The operator that calling the torch function or tensor method ``name`` with these tensors is."""
    if name in _SWAPS:
        return "transpose" if _swaps_last_axes(name, args, kwargs) else "permute"
    name = _ALIASES.get(name, name)
    if name == "add" and (kwargs.get("alpha", 1) != 1 or len(args) > 2):
        return "scaled_add"
    return name if name in OPERATORS else name.strip("_")


def _swaps_last_axes(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tensor = args[0]
    if name in ("mT", "t", "T", "adjoint"):
        return bool(tensor.ndim == 2) or name in ("mT", "adjoint")
    axes = [*args[1:], *kwargs.values()][:2]
    return sorted(axis % tensor.ndim for axis in axes) == [tensor.ndim - 2, tensor.ndim - 1]


def callable_name(function: Callable[..., Any]) -> str:
    """The bare name of a torch function, method or property getter."""
    name = getattr(function, "__name__", None) or type(function).__name__
    if name in ("__get__", "__set__"):
        return str(getattr(getattr(function, "__self__", None), "__name__", name))
    return str(name)
