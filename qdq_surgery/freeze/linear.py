"""The linear on integers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from qdq_surgery.errors import ModelError
from qdq_surgery.integers.arranged import Arrangement, arranged
from qdq_surgery.integers.choice import make_product, moved, unsupported
from qdq_surgery.integers.input_grid import InputGrid
from qdq_surgery.integers.onednn import OneDNNProduct
from qdq_surgery.integers.product import Product
from qdq_surgery.integers.weight import to_integers, weight_steps
from qdq_surgery.match.site_names import INTEGERS_SUFFIX
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.safety import torch_private

__all__ = ["FROZEN", "IntegerLinear", "hooked", "make_integer"]

#: What to do in place of what a frozen model cannot.
FROZEN = "this model is frozen, for inference only"


class IntegerLinear(nn.Linear):
    """What a quantized linear becomes, in place: same object, same hooks. Its weight is integers, and nothing else.

    Attributes:
        weight: ``None``; :meth:`quantized_weight` makes the float weight anew.
        input_grid: What rounds the input. Whoever has called it already hands on the integers that it gives.
        product: The integers of the weight, and the kernel that multiplies by them.
        scale: What an integer of each row is worth, float32, (out_features,).
        activation: What is done to the results in the product, a name of
            :data:`~qdq_surgery.integers.product.ACTIVATIONS`; empty if nothing is.
        dtype: Of the results.
        ranges: Those of its two quantizers, by their names in a state dict.
        next_grid: That of the linear that alone reads what it gives, where it was linked to one.
        between: Who would see what it gives, or what it is given, on the way between the two; ``None`` if nobody minds.
        arrangement: How its weight is sorted for that; ``None`` if it is not.
    """

    weight: None  # type: ignore[assignment]
    input_grid: InputGrid
    product: Product
    scale: Tensor
    activation: str
    dtype: torch.dtype
    ranges: Mapping[str, Tensor]
    next_grid: InputGrid | None
    between: tuple[nn.Module, ...] | None
    arrangement: Arrangement | None

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (the name that nn.Linear gives it)
        """(..., in_features), float or integers, to (..., out_features).

        Where it is linked to the next linear, and given integers, it gives the integers that that one reads.

        Raises:
            ModelError: It is asked for gradients, by training mode or by an input that wants them, or exported.
        """
        if self.training or (input.requires_grad and torch.is_grad_enabled()):
            _refuse_training(self.training)
        if torch_private.is_exporting():
            raise ModelError(
                f"{FROZEN}, and its integers are in no such file; export the quantized model it is made of"
            )
        stored: Tensor = self.input_grid(input)
        following = self.next_grid
        if following is not None and input.dtype == self.product.stored and self.product.rounds:
            return self.product.rounded(stored, self.bias, self.activation, following.factor, following.zero_point)
        return self.product(stored, self.bias, self.dtype, self.activation)

    def handed(self, values: Tensor, called: Iterable[nn.Module] = ()) -> Tensor:
        """What to give it so that it gives integers, (..., in_features); ``values`` if somebody would see them.

        Args:
            called: What is called from it to the next linear, which may not be what it was linked with.

        Raises:
            ModelError: It wants gradients.
        """
        if not self.product.rounds or (self.between is not None and _looked_at(called, self.between)):
            return values
        stored: Tensor = self.input_grid(values)
        return stored

    def hand_to(self, grid: InputGrid, between: tuple[nn.Module, ...]) -> None:
        """Round for the linear that has this grid, wherever integers are given.

        Args:
            between: Modules that are known to pass integers on, and would see them, had they hooks.
        """
        vars(self).update(next_grid=grid, between=between)

    def arrange(self, arrangement: Arrangement) -> None:
        """Sort its weight, wherever its product rounds; what it gives and is given as floats stays in its order."""
        vars(self)["arrangement"] = arrangement
        self.hold(self.product)

    def quantized_weight(self) -> Tensor:
        """The weight as it is multiplied with, (out_features, in_features), float32; a new tensor for each call.

        Its columns belong to inputs over their scales: ``x / m`` where fake quantization has ``W / m``.
        """
        return self.product.integers().float() * self.scale.unsqueeze(1)

    def extra_repr(self) -> str:
        """Sizes, and the activation."""
        activation = self.activation and f", {self.activation}"
        return f"{super().extra_repr()}, int8{activation}"

    def destination(self, fn: Callable[[Tensor], Tensor]) -> tuple[torch.device, torch.dtype]:
        """Where its product is after ``fn``, what ``to(...)`` does to each tensor, and the type of its results.

        Raises:
            ModelError: It goes where no integer products are.
        """
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.product.device))
        problem = unsupported(probe.device, probe.dtype)
        if problem is not None:
            raise ModelError(
                f"{FROZEN}, and is to be {probe.dtype} on {probe.device}: {problem}; use the quantized model there, or "
                "export it"
            )
        return probe.device, probe.dtype

    def hold(self, product: Product) -> None:
        """Multiply by this product from now on, sorted if it is to be and can be."""
        for name in self.product.buffers() if "product" in vars(self) else ():
            self._buffers.pop(name, None)
        self.input_grid.order = None
        if self.arrangement is not None and isinstance(product, OneDNNProduct):
            product = arranged(product, self.arrangement)
            self.input_grid.order = self.arrangement.columns
        buffers = product.buffers()
        vars(self)["product"] = product
        self._buffers.update(buffers)
        self._non_persistent_buffers_set = {*self._non_persistent_buffers_set, *buffers}
        self.input_grid.stored, self.input_grid.in_one_pass = product.stored, product.rounding()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> IntegerLinear:
        device, dtype = self.destination(fn)
        product = moved(self.product, device)  # what may not fit in memory comes first
        for name in self.product.buffers():  # which are not cast, and whose places another kernel has not
            del self._buffers[name]
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        except BaseException:
            self.hold(self.product)
            raise
        self.hold(product)
        self.dtype = dtype
        self.ranges = {name: amax.to(device) for name, amax in self.ranges.items()}
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}_weight{INTEGERS_SUFFIX}"] = self.product.integers()
        destination.update({f"{prefix}{name}": amax for name, amax in self.ranges.items()})

    def _load_from_state_dict(self, *_: Any, **__: Any) -> NoReturn:
        raise ModelError(f"{FROZEN}: its weights are fixed; load into the quantized model, and freeze it again")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        product = self.product  # a pickle may have come from another machine, and to another device
        problem = unsupported(product.device, self.dtype)
        if problem is not None:
            raise ModelError(f"this frozen model does not run here: {problem}; load the quantized model that it is of")
        self.hold(moved(product, product.device))


def _refuse_training(training: bool) -> NoReturn:
    found = "it is in training mode" if training else "its input wants gradients"
    raise ModelError(f"{FROZEN}, and {found}; call model.eval() and torch.no_grad(), or train the quantized model")


def hooked(module: nn.Module | None) -> bool:
    """Whether somebody looks at what a module is given or gives, which then has to stay what it was."""
    return module is not None and bool(module._forward_hooks or module._forward_pre_hooks)


def _looked_at(called: Iterable[nn.Module], known: tuple[nn.Module, ...]) -> bool:
    """Whether a hook would see what passes, or what was put in the place of a module or of its forward."""
    modules = [module for each in called for module in each.modules()]
    replaced = any(module not in known or "forward" in vars(module) for module in modules)
    # Whoever has a hook on a grid asks for what it makes.
    hooks = any(hooked(module) for module in known if not isinstance(module, InputGrid))
    return replaced or hooks or torch_private.has_global_hooks()


def make_integer(linear: QuantLinear, integers: Tensor | None = None) -> IntegerLinear:
    """Make ``linear`` an integer linear, in place.

    Args:
        integers: Those of its weight, int8, (out_features, in_features), on any device; rounded from the weight if left
            out.
    """
    assert linear._input_quantizer is not None
    assert linear._weight_quantizer is not None
    dtype = linear.weight.dtype
    if integers is None:
        integers, scale = to_integers(linear)
    else:
        scale = weight_steps(linear._weight_quantizer, linear.out_features)
    both = {"_input_quantizer": linear._input_quantizer, "_weight_quantizer": linear._weight_quantizer}
    ranges = {f"{name}._amax": each.amax.detach() for name, each in both.items() if each.amax is not None}
    grid = InputGrid(linear._input_quantizer)
    product = make_product(integers.to(scale.device), scale, grid.step, grid.zero_point)
    object.__setattr__(linear, "__class__", IntegerLinear)
    assert isinstance(linear, IntegerLinear)
    for name in both:
        linear._modules.pop(name, None)
    linear._parameters["weight"] = None
    linear._modules["input_grid"] = grid
    linear.__dict__.update(dtype=dtype, activation="", ranges=ranges)
    linear.__dict__.update(next_grid=None, between=(), arrangement=None)
    linear.hold(product)
    return linear
