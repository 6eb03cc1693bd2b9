"""What a saved model says about its quantizers: where they are, and what their rules do not say about them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from importlib.metadata import version
from typing import Any, cast

from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from qdq_surgery.errors import ModelError
from qdq_surgery.match.plan import Plan
from qdq_surgery.match.site_names import LINEAR_NAMES, QUANTIZER_PATH
from qdq_surgery.quantize.descriptors import descriptor_from_data, descriptor_to_data, fields_of, kept_axes
from qdq_surgery.quantize.factory import Defaults
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.safety.untrusted import DamagedError, Item
from qdq_surgery.surgery.model_state import plan_of, quantizers
from qdq_surgery.text.layer_names import expand, fold
from qdq_surgery.version import __version__

__all__ = ["Folded", "Record", "expanded_names", "folded_names", "misfit", "record_of", "versions"]

_CLASS = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)

#: The longest text of layers: they need not be in runs.
_LONGEST = 20_000

#: Starred name to layers, see :mod:`~qdq_surgery.text.layer_names`.
Folded = Mapping[str, "str | None"]


def versions() -> dict[str, str]:
    """Of this package and of those that decide where an operator stands."""
    others = {name: _installed(name) for name in ("transformers", "torch", "pytorch-quantization")}
    return {"qdq-surgery": __version__, **others}


#: A version is read from a package's files, a twentieth of a conversion of a small model.
_installed = functools.cache(version)


@dataclass(frozen=True)
class Record:
    """The quantizers of a saved model.

    Attributes:
        model: The class that was saved; the names are those in it.
        sites: All quantizers.
        descriptors: What ``default`` meant in its rules, by role; empty where no rule says ``default``.
        disabled: Those that let everything pass.
        quant_disabled: Those that were told not to quantize (``disable_quant``).
        learned: Those whose range is a parameter.
        without_range: Those that find their range anew for each tensor.
        rounded: Those of weights whose rounding is adapted.
    """

    model: str
    versions: Mapping[str, str]
    sites: Folded
    descriptors: Mapping[str, QuantDescriptor] = field(default_factory=dict)
    disabled: Folded = field(default_factory=dict)
    quant_disabled: Folded = field(default_factory=dict)
    learned: Folded = field(default_factory=dict)
    without_range: Folded = field(default_factory=dict)
    rounded: Folded = field(default_factory=dict)

    @classmethod
    def from_data(cls, data: Item) -> Record:
        """What :meth:`to_data` gave.

        Raises:
            DamagedError: It is none; says where.
        """
        fields = data.fields(("model", "versions", "sites"), ("descriptors", *_TESTS))
        names: dict[str, Folded] = {}
        known: frozenset[str] = frozenset()
        for what in ("sites", *(each for each in _TESTS if each in fields)):
            names[what] = folded_names(fields[what])
            listed = frozenset(expanded_names(fields[what], names[what]))
            known = listed if what == "sites" else known
            if not listed <= known:
                raise DamagedError(f"{fields[what].where} has {min(listed - known)}, which is not in sites")
        roles = fields["descriptors"].fields((), ("input", "weight")) if "descriptors" in fields else {}
        return cls(
            model=fields["model"].text(pattern=_CLASS, wanted="the name of a class"),
            versions={name: each.text(100) for name, each in fields["versions"].entries(100).items()},
            descriptors={role: descriptor_from_data(each) for role, each in roles.items()},
            **names,
        )

    def to_data(self) -> dict[str, Any]:
        """As JSON-able data; what is empty is left out."""
        data = {each.name: getattr(self, each.name) for each in fields(self)}
        data["descriptors"] = {role: descriptor_to_data(each) for role, each in self.descriptors.items()}
        return {name: value for name, value in data.items() if value}

    def names(self, what: str = "sites") -> list[str]:
        """The quantizers in one of the attributes."""
        return expand(getattr(self, what))

    def defaults(self) -> Defaults | None:
        """What ``default`` meant; ``None`` where no rule says it."""
        return replace(Defaults.now(), **self.descriptors) if self.descriptors else None


def folded_names(item: Item) -> Folded:
    """Names of quantizers, starred, with their layers.

    Raises:
        DamagedError: They are none.
    """
    return {
        Item(name, f"a name in {item.where}").text(pattern=QUANTIZER_PATH, wanted="the path of a quantizer"): None
        if layers.value is None
        else layers.text(_LONGEST)
        for name, layers in item.entries().items()
    }


def expanded_names(item: Item, folded: Folded) -> list[str]:
    """The names in full; errors are those of :func:`folded_names`."""
    try:
        return expand(folded)
    except ValueError as error:
        raise DamagedError(f"{item.where}: {error}") from None


def record_of(qmodel: nn.Module) -> Record:
    """The record of a converted model as it is now.

    Raises:
        ModelError: It is not converted, or its quantizers are no longer those that its rules make.
    """
    plan, found = plan_of(qmodel), quantizers(qmodel)
    layers = {site.quantizer: site.layer for site in plan.sites}
    if layers.keys() != found.keys():
        changed = sorted(layers.keys() ^ found.keys())
        what = "lacks" if changed[0] in layers else "has"
        raise ModelError(
            f"the model {what} the quantizer {changed[0]}, which {'a' if what == 'lacks' else 'no'} rule of its own "
            f"({plan.rules.name}) puts there ({len(changed)} such places); a model is saved with its rules, so "
            "write a rule file that says so and convert the float model by it"
        )
    descriptors = _descriptors(plan, found)
    _check_ranges(qmodel, found)

    def those(test: str) -> dict[str, str | None]:
        return fold({name: layers[name] for name, each in found.items() if _TESTS[test](each)})

    return Record(
        model=type(qmodel).__name__,
        versions=versions(),
        sites=fold({site.quantizer: site.layer for site in plan.sites}),
        descriptors=descriptors,
        **{test: those(test) for test in _TESTS},
    )


_TESTS: dict[str, Callable[[TensorQuantizer], bool]] = {
    "disabled": lambda quantizer: quantizer._disabled,
    "quant_disabled": lambda quantizer: not quantizer._if_quant,
    "learned": lambda quantizer: quantizer.learns,
    "without_range": lambda quantizer: quantizer.amax is None,
    "rounded": lambda quantizer: quantizer.rounding is not None,
}


def _zero_range(amax: Tensor, weight: Tensor | None) -> str | None:
    """What is wrong with a range that is zero somewhere; ``None`` where the weight is zero, too.

    Args:
        weight: What is quantized, if it is a weight. Calibration gives no activation such a range.
    """
    if weight is None:
        return "it is zero, which makes everything zero"
    if weight.is_meta:
        return None
    by_axis = amax if amax.ndim else amax.reshape([1] * weight.ndim)
    zero = (by_axis.to(weight.device) == 0).expand(len(weight), *by_axis.shape[1:])
    # Most rows have a range above zero: of a table that is loaded they need not be read from the disk.
    rows = zero.flatten(1).any(1).nonzero()[:, 0]
    lost = zero[rows] & (weight.detach()[rows] != 0)
    return "it is zero in a channel whose weight is not, which makes that channel zero" if bool(lost.any()) else None


def misfit(quantizer: TensorQuantizer, name: str, amax: Tensor, owner: nn.Module, *, zeros: bool = True) -> str | None:
    """Why a range cannot be that of ``quantizer``, which ``owner`` has under ``name``; ``None`` if it can.

    Args:
        zeros: Whether it may be zero somewhere.
    """
    weight = cast("Tensor", owner.weight) if name == LINEAR_NAMES["weight"] else None
    channels = cast("int", owner.in_features) if name == LINEAR_NAMES["input"] else None
    problem = quantizer.misfit(amax.shape, None if weight is None else weight.shape, channels)
    if problem is not None or not zeros or amax.is_meta or amax.all():
        return problem
    return _zero_range(amax, weight)


def _check_ranges(qmodel: nn.Module, found: Mapping[str, TensorQuantizer]) -> None:
    for path, quantizer in found.items():
        owner, _, name = path.rpartition(".")
        amax = quantizer.amax
        problem = None if amax is None else misfit(quantizer, name, amax.detach(), qmodel.get_submodule(owner))
        if problem is not None:
            raise ModelError(f"the range of {path} is not saved: {problem}; calibrate the model, or set another")


def _descriptors(plan: Plan, found: Mapping[str, TensorQuantizer]) -> dict[str, Any]:
    """The default descriptors by role, after a check that every quantizer is still as its rule made it."""
    descriptors: dict[str, Any] = {}
    for site in plan.sites:
        quantizer = found[site.quantizer]
        if site.spec is None:
            descriptors.setdefault(site.role, quantizer.default)
            wanted = fields_of(quantizer.default)
        else:
            spec = site.spec
            wanted = spec.num_bits, kept_axes(spec.axis), spec.unsigned, spec.narrow_range, True
        if fields_of(quantizer) != wanted:
            raise ModelError(
                f"{site.quantizer} was changed by hand: (bits, axes, unsigned, narrow range, fake) are "
                f"{fields_of(quantizer)}, and its rule '{site.rule}' makes {wanted}; a model is saved with its rules, "
                "so say it in a rule file and convert the float model by it"
            )
    return descriptors
