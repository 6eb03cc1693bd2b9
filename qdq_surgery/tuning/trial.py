"""A converted model whose specs are exchanged and put back: what another spec of some sites does to its output."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdq_surgery.calibration.batches import prepared
from qdq_surgery.calibration.collect import activation_quantizers, collect, weight_quantizers
from qdq_surgery.calibration.ranges import find_ranges, own_method, set_ranges, share_ranges_found
from qdq_surgery.match.plan import Site
from qdq_surgery.quantize.factory import make_quantizer
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import QuantSpec
from qdq_surgery.surgery.model_state import plan_of, quantization_disabled, quantizers

__all__ = ["Kind", "Operator", "Trial"]

_HOLDERS = itertools.count()

#: Quantizers with the ranges that they had.
_Ranges: TypeAlias = list[tuple[TensorQuantizer, Tensor]]


@dataclass(frozen=True)
class Kind:
    """The sites of one operand of one rule: what a rule file can say a spec of.

    Attributes:
        rule, capture: The rule, and the capture of its pattern.
        role: ``"weight"`` for what is constant, ``"input"`` for what is computed.
        quantizers: Their names.
    """

    rule: str
    capture: str
    role: str
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

    def __init__(self, qmodel: PreTrainedModel, batches: Sequence[Mapping[str, Any]]) -> None:
        self.qmodel = qmodel
        self._sites = {site.quantizer: site for site in plan_of(qmodel).sites}
        self._holder = next(_HOLDERS)
        self._statistics = collect(qmodel, batches)
        self._work = _Work()
        with self._work.watched(qmodel), quantization_disabled(qmodel), torch.no_grad():
            qmodel(**prepared(qmodel, batches[0], 0))
        self._set(set(quantizers(qmodel)))

    def kinds(self) -> list[Kind]:
        """In the order of the model; a rule's operand that no site has is none."""
        found: dict[tuple[str, str], list[Site]] = {}
        for site in self._own_sites():
            found.setdefault((site.rule, site.capture), []).append(site)
        return [Kind(*key, sites[0].role, tuple(site.quantizer for site in sites)) for key, sites in found.items()]

    def operators(self) -> list[Operator]:
        """In the order of the model."""
        found: dict[tuple[Any, ...], list[Site]] = {}
        for site in self._own_sites():
            found.setdefault((site.owner, site.routine, site.origin), []).append(site)
        return [
            Operator(
                sites[0].owner,
                sites[0].operator,
                tuple(site.quantizer for site in sites),
                self._work.of(self.qmodel, sites),
            )
            for sites in found.values()
        ]

    def _own_sites(self) -> Iterator[Site]:
        """Those that have a quantizer: a module that is shared has one name."""
        return (self._sites[name] for name in quantizers(self.qmodel) if name in self._sites)

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
        before, ranges = self._take(kind, spec)
        try:
            yield
        finally:
            for name, quantizer in before.items():
                self._place(name, quantizer)
            _give_back(ranges)

    def take(self, kind: Kind, spec: QuantSpec) -> None:
        """Give a kind another spec for good."""
        self._take(kind, spec)

    @contextmanager
    def in_float(self, names: Iterable[str]) -> Iterator[None]:
        """While this holds, these quantizers let their inputs pass, and have no part in a shared range."""
        found = quantizers(self.qmodel)
        held = [found[name] for name in names if found[name].enabled]
        for each in held:
            each.hold_off(self._holder)
        ranges = self._set(self._beside(names))
        try:
            yield
        finally:
            for each in held:
                each.let_go(self._holder)
            _give_back(ranges)

    def leave_in_float(self, names: Iterable[str]) -> None:
        """Let these quantizers' inputs pass for good."""
        found = quantizers(self.qmodel)
        for name in names:
            found[name].disable()
        self._set(self._beside(names))

    def _beside(self, names: Iterable[str]) -> set[str]:
        """Those that share a range with one of these."""
        return {other for group in plan_of(self.qmodel).shared if set(group) & set(names) for other in group}

    def _take(self, kind: Kind, spec: QuantSpec) -> tuple[dict[str, TensorQuantizer], _Ranges]:
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

    def _set(self, names: set[str]) -> _Ranges:
        """Find the ranges of these and of what depends on them; what the others had before is returned."""
        names = names | self._beside(names)
        if not names:
            return []
        activations = {n: each for n, each in activation_quantizers(self.qmodel).items() if n in names}
        chosen = {id(each) for each in activations.values()}
        weights = {
            name: (quantizer, linear)
            for name, (quantizer, linear) in weight_quantizers(self.qmodel).items()
            if name in names or id(linear._input_quantizer) in chosen
        }
        changed = [*activations.values(), *(quantizer for quantizer, _ in weights.values())]
        before = [(each, each.amax.detach().clone()) for each in changed if each.amax is not None]
        methods = {name: own_method(each) for name, each in activations.items()}
        found = find_ranges(self.qmodel, self._statistics, activations, methods, weights)
        share_ranges_found(self.qmodel, found)
        set_ranges(found.values())
        return before


def _give_back(ranges: _Ranges) -> None:
    for quantizer, amax in ranges:
        quantizer.set_range(amax)


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
        """Of the operator whose operands these are; 0 of an add, and of a lookup."""
        first = sites[0]
        if first.operator in ("add", "embedding"):
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
