"""The receipt of a frozen model: what of it runs in INT8, counted while it runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel

from qdq_surgery.errors import ModelError
from qdq_surgery.freeze.frozen_state import FrozenState, frozen_state
from qdq_surgery.freeze.linear import IntegerLinear
from qdq_surgery.graph.block_graph import flatten_call
from qdq_surgery.graph.operators import PRODUCTS
from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.hf.config_facts import max_tokens
from qdq_surgery.hf.example_inputs import checked_examples, make_examples
from qdq_surgery.onnx_graph.executed import Leftover
from qdq_surgery.prove.receipt import Gemm, Receipt
from qdq_surgery.safety.torch_private import TorchDispatchMode
from qdq_surgery.surgery.model_state import quantizers
from qdq_surgery.trace.units import find_units

__all__ = ["frozen_receipt"]

_TOKENS = 128

#: Products of two matrices, by the place of the factor whose last axis is summed over.
_MATRICES = {"aten.mm": 0, "aten.addmm": 1, "aten.bmm": 0, "aten.baddbmm": 1, "aten.mv": 0, "aten.addmv": 1}
_ATTENTION = ("aten.bmm", "aten.baddbmm", "aten._scaled_dot_product")

_ROUNDED = "it is rounded in float, by fake quantization: no integer kernel of PyTorch reads it"


def frozen_receipt(
    model: PreTrainedModel,
    *,
    shape: tuple[int, int] | None = None,
    example_inputs: Mapping[str, Any] | None = None,
) -> Receipt:
    """Run a frozen model, and say what of it runs in INT8.

    Args:
        model: What :func:`~qdq_surgery.freeze` made. It stays as it is.
        shape: Batch and tokens to count multiply-adds for; (1, 128) if left out, or what the model takes.
        example_inputs: Keyword arguments of the model's forward to count with, in place of a shape.

    Returns:
        The receipt of a file, with ``runtime`` ``"pytorch"`` and the name of the model's class as ``path``: every
        matrix product with the kernel that runs it, the share of the multiply-adds that is in INT8, each product that
        is not with its reason, and the quantizers that are left (``leftover``).

    Raises:
        ModelError: The model is not frozen, or does not run on such inputs.
    """
    state = frozen_state(model)
    if shape is not None and (len(shape) != 2 or min(shape) < 1):
        raise ModelError(f"shape is {shape}; give batch and tokens, such as (1, 128)")
    if example_inputs is None:
        longest = max_tokens(model.config) or _TOKENS
        inputs = make_examples(model, shape or (1, min(_TOKENS, longest)))
    else:
        inputs = checked_examples(model, example_inputs)
    runs = _products(model, inputs)
    first = next(value for value in flatten_call((), inputs)[0] if isinstance(value, Tensor))
    sizes = tuple(map(int, first.shape[:2]))
    left = tuple(Leftover((name,), name, _ROUNDED) for name, each in quantizers(model).items() if each.enabled)
    gemms = tuple(_gemm(model, state, run, kind) for run, kind in _kinds(model, runs))
    return Receipt(
        Path(type(model).__name__),
        "pytorch",
        torch.__version__,
        (sizes[0], sizes[-1]),
        gemms,
        left,
        tuple(_steps(model, state)),
    )


@dataclass
class _Run:
    """One product that was run: the path of its module, torch's operator or a kernel, its multiply-adds, its types."""

    module: str
    operator: str
    macs: int
    types: str
    number: int = 0


@dataclass
class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Products of floats as torch's operators, those of integers as calls of their linears, whatever these do."""

    stack: list[str] = field(default_factory=lambda: [""])
    runs: list[_Run] = field(default_factory=list)
    inside: int = 0

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        macs = 0 if self.inside else _multiply_adds(func, args, kwargs or {}, result)
        if macs:
            last = [each for each in args if isinstance(each, Tensor)][-1]
            made = result[0] if isinstance(result, tuple) else result
            self.runs.append(_Run(self.stack[-1], str(func._overloadpacket), macs, _types(last.dtype, made.dtype)))
        return result

    def enter(self, module: nn.Module, name: str) -> None:
        """A module is called."""
        self.stack.append(name)
        self.inside += isinstance(module, IntegerLinear)

    def leave(self, module: nn.Module, result: Any) -> None:
        """It returns, or raises."""
        name = self.stack.pop()
        if isinstance(module, IntegerLinear):
            self.inside -= 1
            if isinstance(result, Tensor):
                macs, types = result.numel() * module.in_features, _types(module.product.stored, result.dtype)
                self.runs.append(_Run(name, module.product.kernel, macs, types))


def _types(first: torch.dtype, last: torch.dtype) -> str:
    return " -> ".join(str(each).removeprefix("torch.") for each in (first, last))


def _multiply_adds(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    name = str(func._overloadpacket)
    if name in _MATRICES:
        return int(result.numel()) * int(args[_MATRICES[name]].shape[-1])
    if name.startswith("aten._scaled_dot_product") and len(args) > 2:
        query, key, value = (each.shape for each in args[:3])
        return int(math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1]))
    count = flop_registry.get(func._overloadpacket)  # convolutions
    return int(count(*args, **kwargs, out_val=result)) // 2 if count is not None else 0


def _products(model: PreTrainedModel, inputs: dict[str, Any]) -> list[_Run]:
    """Every product of a run, in its order."""
    ghost = shadow(model)
    watch = _Watch()
    with _told(ghost, watch), torch.no_grad():
        try:
            ghost(**inputs)  # a kind of call that is new is recorded now, which is work of its own
            watch.runs.clear()
            with watch:
                ghost(**inputs)
        except Exception as error:  # whatever a model's code makes of the inputs
            raise ModelError(
                f"{type(model).__name__} does not run on the inputs to count with ({', '.join(inputs)}): "
                f"{type(error).__name__}: {error}; pass example_inputs= that it takes"
            ) from error
    counts: dict[tuple[str, str], int] = {}
    for run in watch.runs:
        run.number = counts[run.module, run.operator] = counts.get((run.module, run.operator), 0) + 1
    return watch.runs


@contextmanager
def _told(ghost: nn.Module, watch: _Watch) -> Iterator[None]:
    """While this holds, ``watch`` knows the module that runs. ``ghost`` is thrown away."""

    def enter(name: str) -> Callable[..., None]:
        return lambda module, *_: watch.enter(module, name)

    for name, module in ghost.named_modules():
        module.register_forward_pre_hook(enter(name))
        module.register_forward_hook(lambda module, _, result: watch.leave(module, result), always_call=True)
        if isinstance(module, IntegerLinear):
            module.between = None  # these hooks only count: it hands on integers as it does without them
    yield


def _kinds(model: nn.Module, runs: list[_Run]) -> Iterator[tuple[_Run, str]]:
    """Each product with its kind, one of :data:`~qdq_surgery.onnx_graph.products.KINDS`."""
    layers = tuple(f"{path}." for path, layer in find_units(model) if layer is not None)
    inside = [f"{run.module}.".startswith(layers) if layers else True for run in runs]
    for at, run in enumerate(runs):
        if run.operator.startswith(_ATTENTION) and not isinstance(_module(model, run.module), nn.Linear):
            yield run, "attention"
        elif inside[at] or isinstance(_module(model, run.module), IntegerLinear):
            yield run, "linear"
        else:
            yield run, "head" if any(inside[:at]) else "other"


def _module(model: nn.Module, path: str) -> nn.Module:
    return model.get_submodule(path) if path else model


def _gemm(model: nn.Module, state: FrozenState, run: _Run, kind: str) -> Gemm:
    module = _module(model, run.module)
    if isinstance(module, IntegerLinear):
        # An ALBERT has one layer, which runs more than once.
        again = f"#{run.number}" if run.number > 1 else ""
        post = module.activation and f", {module.activation}"
        kernel = f"{run.operator}, {run.types}{post}"
        return Gemm(f"{run.module}{again}", run.module, kind, run.macs, kernel, True, None)
    operator = run.operator.removeprefix("aten.")
    alone = isinstance(module, nn.Linear) and run.number == 1
    name = run.module if alone else f"{run.module}/{operator}#{run.number}".lstrip("/")
    return Gemm(name, run.module, kind, run.macs, f"{operator}, {run.types}", False, _reason(state, run.module, kind))


def _reason(state: FrozenState, module: str, kind: str) -> str:
    if module in state.kept:
        return f"quantized, but stays in float: {state.kept[module]}"
    sites = [site for site in state.plan.sites if site.owner == module and site.routine != "module"]
    if kind == "attention" and any(not site.name.startswith("add_") for site in sites):
        return "quantized, but in float on rounded values: PyTorch's integer product of two activations is not quicker"
    operators = PRODUCTS - {"linear"} if kind == "attention" else {"linear"}
    refusals = (each for each in state.plan.refusals if each.path == module and each.operator in operators)
    told = next((each.reason for each in refusals), None)
    return "not quantized: no quantizer on its inputs" if told is None else f"not quantized: {told}"


def _steps(model: nn.Module, state: FrozenState) -> Iterator[str]:
    """The linears whose input is rounded in a pass of its own."""
    later = {path for groups in state.shared.values() for group in groups for path in group[1:]}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, IntegerLinear)}
    later |= {each.reader for each in state.handovers if linears[each.linear].product.rounds}
    for name in linears:
        if name not in later:
            yield f"{name}._input_quantizer"
