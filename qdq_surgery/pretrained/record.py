"""What a saved model says about its quantizers: where they are, and what their rules do not say about them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from torch import nn

from qdq_surgery.converted import plan_of, quantizers
from qdq_surgery.errors import ModelError
from qdq_surgery.layered import expand, fold
from qdq_surgery.making import Defaults
from qdq_surgery.plan import Plan
from qdq_surgery.pretrained.descriptors import descriptor_from_data, descriptor_to_data, grid_of
from qdq_surgery.quantizer import TensorQuantizer
from qdq_surgery.version import __version__

__all__ = ["Record", "record_of", "versions"]

#: Starred name to layers, see :mod:`~qdq_surgery.layered`.
Folded = Mapping[str, "str | None"]


def versions() -> dict[str, str]:
    """Of this package and of those that decide where an operator stands."""
    others = {name: version(name) for name in ("transformers", "torch", "pytorch-quantization")}
    return {"qdq-surgery": __version__, **others}


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
    """

    model: str
    versions: Mapping[str, str]
    sites: Folded
    descriptors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    disabled: Folded = field(default_factory=dict)
    quant_disabled: Folded = field(default_factory=dict)
    learned: Folded = field(default_factory=dict)
    without_range: Folded = field(default_factory=dict)

    def to_data(self) -> dict[str, Any]:
        """As JSON-able data; what is empty is left out."""
        return {name: value for name, value in asdict(self).items() if value}

    def names(self, what: str = "sites") -> list[str]:
        """The quantizers in one of the attributes."""
        return expand(getattr(self, what))

    def defaults(self) -> Defaults | None:
        """What ``default`` meant; ``None`` where no rule says it.

        Raises:
            ModelError: The descriptors are none.
        """
        if not self.descriptors:
            return None
        now = asdict(Defaults.now())
        return Defaults(**now | {role: descriptor_from_data(data) for role, data in self.descriptors.items()})


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

    def those(test: str) -> dict[str, str | None]:
        return fold({name: layers[name] for name, each in found.items() if _TESTS[test](each)})

    return Record(
        model=type(qmodel).__name__,
        versions=versions(),
        sites=fold({site.quantizer: site.layer for site in plan.sites}),
        descriptors={role: descriptor_to_data(descriptor) for role, descriptor in descriptors.items()},
        **{test: those(test) for test in _TESTS},
    )


_TESTS: dict[str, Callable[[TensorQuantizer], bool]] = {
    "disabled": lambda quantizer: not quantizer.enabled,
    "quant_disabled": lambda quantizer: not quantizer._if_quant,
    "learned": lambda quantizer: quantizer.learns,
    "without_range": lambda quantizer: quantizer.amax is None,
}


def _descriptors(plan: Plan, found: Mapping[str, TensorQuantizer]) -> dict[str, Any]:
    """The default descriptors by role, after a check that every quantizer is still as its rule made it."""
    descriptors: dict[str, Any] = {}
    for site in plan.sites:
        quantizer = found[site.quantizer]
        if site.spec is None:
            descriptors.setdefault(site.role, quantizer.default)
            wanted = grid_of(quantizer.default)
        else:
            axes = None if site.spec.axis is None else (site.spec.axis,)
            wanted = site.spec.num_bits, axes, site.spec.unsigned, site.spec.narrow_range, True
        if grid_of(quantizer) != wanted:
            raise ModelError(
                f"{site.quantizer} was changed by hand: (bits, axes, unsigned, narrow range, fake) are "
                f"{grid_of(quantizer)}, and its rule '{site.rule}' makes {wanted}; a model is saved with its rules, "
                "so say it in a rule file and convert the float model by it"
            )
    return descriptors
