"""A converted model whose specs are exchanged and put back: what another spec of some sites does to its output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import activation_quantizers, collect, weight_quantizers
from qdq_surgery.calibration.ranges import find_ranges, own_method, set_ranges, share_ranges_found
from qdq_surgery.match.plan import Site
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer, make_quantizer
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.surgery.model_state import plan_of, quantizers

__all__ = ["Kind", "Operator", "Trial"]

_HOLDERS = itertools.count()
_MAX = CalibratorSpec("max")


@dataclass(frozen=True)
class Kind:
    """The sites of one operand of one rule: what a rule file can say a spec of.

    Attributes:
        rule, capture: The rule, and the capture of its pattern.
        quantizers: Their names.
    """

    rule: str
    capture: str
    quantizers: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.rule}({self.capture})"


@dataclass(frozen=True)
class Operator:
    """One operator of the model with all its quantized operands: what is left in float together.

    Attributes:
        owner: Path of the module that holds the quantizers.
        operator: ``linear``, ``matmul`` or another.
        quantizers: Their names.
        work: Multiply-adds on the batches' first; an add has none.
    """

    owner: str
    operator: str
    quantizers: tuple[str, ...]
    work: int


class Trial:
    """A model that its own rules have calibrated, to be changed.

    Args:
        qmodel: A converted model that nobody else uses.
        batches: What it is calibrated on.

    Raises:
        CalibrationError: The batches cannot be used.
    """

    def __init__(self, qmodel: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> None:
        self.qmodel = qmodel
        self._sites = {site.quantizer: site for site in plan_of(qmodel).sites}
        self._holder = next(_HOLDERS)
        data = list(batches)
        self._work = _Work()
        with self._work.watched(qmodel):
            self._by_spec = collect(qmodel, data)
        # Those with a scale for each channel have no histogram yet.
        scaled = {name: each.spec for name, each in activation_quantizers(qmodel).items() if each.scaled}
        self._by_tensor = self._by_spec
        if scaled:
            plain = {name: replace(spec, axis=None, calibrator=_MAX) for name, spec in scaled.items() if spec}
            before = self._exchanged(plain)
            self._by_tensor = collect(qmodel, data)
            self._put_back(before)
        self._set(set(quantizers(qmodel)))

    def kinds(self) -> list[Kind]:
        """In the order of the model; a rule's operand that no site has is none."""
        found: dict[tuple[str, str], list[str]] = {}
        for name in quantizers(self.qmodel):
            site = self._sites.get(name)
            if site is not None:
                found.setdefault((site.rule, site.capture), []).append(name)
        return [Kind(rule, capture, tuple(names)) for (rule, capture), names in found.items()]

    def operators(self) -> list[Operator]:
        """In the order of the model."""
        qmodel, found = self.qmodel, dict[tuple[Any, ...], list[Site]]()
        for name in quantizers(qmodel):
            site = self._sites.get(name)
            if site is not None:
                found.setdefault((site.owner, site.routine, site.origin), []).append(site)
        return [
            Operator(sites[0].owner, sites[0].operator, tuple(s.quantizer for s in sites), self._work.of(qmodel, sites))
            for sites in found.values()
        ]

    def spec(self, kind: Kind) -> QuantSpec:
        """The spec of a kind; that of a default descriptor, too."""
        quantizer = quantizers(self.qmodel)[kind.quantizers[0]]
        if quantizer.spec is not None:
            return quantizer.spec
        grid, axes = quantizer.grid, quantizer.axes
        return QuantSpec(
            num_bits=grid.bits,
            axis=None if axes is None else axes[0],
            unsigned=grid.unsigned,
            narrow_range=grid.narrow_range,
            calibrator=own_method(quantizer),
        )

    @contextmanager
    def tried(self, kind: Kind, spec: QuantSpec) -> Iterator[None]:
        """While this holds, a kind has another spec, with the ranges that follow from it."""
        before, amax = self._take(kind, spec)
        try:
            yield
        finally:
            self._put_back(before)
            self._give_back(amax)

    def take(self, kind: Kind, spec: QuantSpec) -> None:
        """Give a kind another spec for good."""
        self._take(kind, spec)

    @contextmanager
    def in_float(self, names: Iterable[str]) -> Iterator[None]:
        """While this holds, these quantizers let their inputs pass."""
        found = quantizers(self.qmodel)
        held = [found[name] for name in names if found[name].enabled]
        for each in held:
            each.hold_off(self._holder)
        try:
            yield
        finally:
            for each in held:
                each.let_go(self._holder)

    def leave_in_float(self, names: Iterable[str]) -> None:
        """Let these quantizers' inputs pass for good."""
        found = quantizers(self.qmodel)
        for name in names:
            found[name].disable()

    def _take(
        self, kind: Kind, spec: QuantSpec
    ) -> tuple[dict[str, TensorQuantizer], dict[str, tuple[TensorQuantizer, Tensor]]]:
        before = self._exchanged(dict.fromkeys(kind.quantizers, spec))
        return before, self._set(set(kind.quantizers))

    def _exchanged(self, specs: Mapping[str, QuantSpec]) -> dict[str, TensorQuantizer]:
        """New quantizers with these specs in place of those by the same names, which are returned."""
        found = quantizers(self.qmodel)
        before: dict[str, TensorQuantizer] = {}
        for name, spec in specs.items():
            old = before[name] = found[name]
            assert old.provenance is not None
            provenance = old.provenance._replace(descriptor=str(spec))
            made = make_quantizer(spec, old.default, provenance, old._device)
            made.train(old.training)
            self._place(name, made)
        return before

    def _place(self, name: str, quantizer: TensorQuantizer) -> None:
        owner, _, own = name.rpartition(".")
        module: nn.Module = self.qmodel.get_submodule(owner)
        module._modules[own] = quantizer

    def _put_back(self, before: Mapping[str, TensorQuantizer]) -> None:
        for name, quantizer in before.items():
            self._place(name, quantizer)

    def _give_back(self, amax: Mapping[str, tuple[TensorQuantizer, Tensor]]) -> None:
        for quantizer, value in amax.values():
            quantizer.set_range(value)

    def _set(self, names: set[str]) -> dict[str, tuple[TensorQuantizer, Tensor]]:
        """Find the ranges of these and of what depends on them; what the others had before is returned."""
        for group in plan_of(self.qmodel).shared:
            if names & set(group):
                names |= set(group)
        activations = {n: each for n, each in activation_quantizers(self.qmodel).items() if n in names}
        chosen = {id(each) for each in activations.values()}
        weights = {
            name: (quantizer, linear)
            for name, (quantizer, linear) in weight_quantizers(self.qmodel).items()
            if name in names or id(linear._input_quantizer) in chosen
        }
        before = {
            name: (quantizer, quantizer.amax.detach().clone())
            for name, quantizer in (*activations.items(), *((n, q) for n, (q, _) in weights.items()))
            if quantizer.amax is not None
        }
        seen = {
            name: (self._by_spec if each.scaled or name not in self._by_tensor.seen else self._by_tensor).seen[name]
            for name, each in activations.items()
        }
        methods = {name: own_method(each) for name, each in activations.items()}
        data = replace(self._by_spec, seen=seen)
        found = find_ranges(self.qmodel, data, activations, methods, weights)
        share_ranges_found(self.qmodel, found)
        set_ranges(found.values())
        return before


class _Work:
    """Multiply-adds of the operators, from the shapes of what they are called with."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}

    @contextmanager
    def watched(self, qmodel: nn.Module) -> Iterator[None]:
        """While this holds, the first shape that each quantizer and each linear sees is kept."""
        modules = {
            name: each for name, each in qmodel.named_modules() if isinstance(each, (QuantLinear, TensorQuantizer))
        }
        hooks = [each.register_forward_pre_hook(self._keeper(name)) for name, each in modules.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keeper(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            self._shapes.setdefault(name, tuple(given[0].shape))

        return keep

    def of(self, qmodel: nn.Module, sites: Sequence[Site]) -> int:
        """Of the operator whose operands these are; 0 of an add."""
        first = sites[0]
        if first.operator == "add":
            return 0
        if first.routine == "module":
            linear = qmodel.get_submodule(first.owner)
            assert isinstance(linear, nn.Linear)
            return math.prod(self._shapes.get(first.owner, (0,))) * linear.out_features
        shapes = {site.position: self._shapes.get(site.quantizer, ()) for site in sites}
        left = shapes.get(0, shapes.get("input", ()))
        right = shapes.get(1, shapes.get("other", shapes.get("mat2", ())))
        if not left or not right:  # the other operand is not quantized: taken for a square one
            known = left or right
            return math.prod(known) * (known[-1] if known else 0)
        return math.prod(left) * right[-1]
