"""The quantizers of a plan: one for each site, as its rule says, before they are in the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pytorch_quantization import nn as quant_nn
from pytorch_quantization import tensor_quant
from torch import nn
from transformers import PreTrainedModel

from qdq_surgery.match.plan import Plan, Site
from qdq_surgery.quantize.descriptors import grid_of, kept_axes
from qdq_surgery.quantize.provenance import Provenance
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import QuantSpec

__all__ = ["Defaults", "Maker", "device_of", "make_quantizer"]


@dataclass(frozen=True)
class Defaults:
    """What a rule's ``default`` means: pytorch-quantization's descriptors for activations and for weights."""

    input: Any
    weight: Any

    @classmethod
    def now(cls) -> Defaults:
        """What ``set_default_quant_desc_input`` and ``_weight`` were given last."""
        return cls(
            quant_nn.QuantLinear.default_quant_desc_input,
            quant_nn.QuantLinear.default_quant_desc_weight,
        )


class Maker:
    """Makes the quantizers of one plan.

    Args:
        defaults: What the rules' ``default`` means.
    """

    def __init__(self, plan: Plan, defaults: Defaults) -> None:
        self.plan, self.defaults = plan, defaults
        self.rules = {rule.name: rule for rule in plan.rules.rules}
        self.makes: dict[tuple[Any, ...], TensorQuantizer] = {}
        self.words: dict[tuple[int, int], str] = {}

    def make(self, site: Site, device: torch.device, training: bool) -> TensorQuantizer:
        """The quantizer of ``site``; ``device`` and ``training`` are those of the module that gets it."""
        default = self.defaults.weight if site.role == "weight" else self.defaults.input
        rule = self.rules[site.rule]
        provenance = Provenance(
            quantizer=site.quantizer,
            role=site.role,
            rule=rule.name,
            rules=self.plan.rules.name,
            why=rule.why,
            declared=rule.source,
            operand=f"{site.operator}({site.capture})",
            source=site.source,
            descriptor=self._words(site, default),
        )
        # Most sites of a model have one of two makes.
        make = (id(site.spec), id(default), device, training)
        first = self.makes.get(make)
        if first is not None:
            return first.sibling(provenance)
        quantizer = make_quantizer(site.spec, default, provenance, device)
        quantizer.train(training)
        if quantizer.amax is None and not quantizer._modules:
            self.makes[make] = quantizer
        return quantizer

    def _words(self, site: Site, default: Any) -> str:
        key = id(site.spec), id(default)
        if key not in self.words:
            self.words[key] = _describe(default) if site.spec is None else str(site.spec)
        return self.words[key]


def _describe(descriptor: Any) -> str:
    axes = kept_axes(descriptor.axis)
    where = "per-tensor" if axes is None else f"axis {', '.join(map(str, axes))}"
    return f"{grid_of(descriptor)} {where} {descriptor.calib_method} (default)"


def device_of(owner: nn.Module, model: PreTrainedModel) -> torch.device:
    """Where the quantizers of a module belong: where it computes."""
    own = [tensor.device for each in owner.modules() for tensor in each._parameters.values() if tensor is not None]
    # A frozen linear has no weight while it is loaded, and a bias that has its place.
    device = next((each for each in own if each.type != "meta"), own[0] if own else model.device)
    if device.type == "meta":  # not loaded yet, or kept elsewhere and brought in by a hook of accelerate for each call
        hook = getattr(owner, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu")
    return torch.device(device)


def make_quantizer(
    spec: QuantSpec | None, default: tensor_quant.QuantDescriptor, provenance: Provenance, device: torch.device
) -> TensorQuantizer:
    """A new quantizer.

    Args:
        spec: What the rule says; ``None`` where it says ``default``.
        default: pytorch-quantization's default descriptor for this kind of operand.
    """
    if spec is None:
        made = TensorQuantizer(default, provenance=provenance, device=device)
        made.default = default
        return made
    descriptor = tensor_quant.QuantDescriptor(
        num_bits=spec.num_bits,
        axis=kept_axes(spec.axis),
        unsigned=spec.unsigned,
        narrow_range=spec.narrow_range,
        calib_method="histogram" if spec.calibrator.is_histogram and spec.axis is None else "max",
    )
    return TensorQuantizer(descriptor, spec=spec, provenance=provenance, device=device)
