"""Applies a :class:`Plan` to a model, in place, all of it or nothing. The only file that edits models.

Nothing is decided here: which sites, under which names, is in the plan; which graphs, in the recorded routines.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from pytorch_quantization import nn as quant_nn
from torch import nn
from transformers import PreTrainedModel

from qdq_surgery.attention import check_not_bypassed, eager_function
from qdq_surgery.linear import QuantLinear
from qdq_surgery.plan import Plan, Site
from qdq_surgery.quantizer import Provenance, TensorQuantizer, make_quantizer
from qdq_surgery.rewritten import GUARDED, Edit, Rewritten, Variant
from qdq_surgery.routine import Routine

__all__ = ["PLAN_ATTRIBUTE", "Recordings", "operate", "quantized_class"]

#: Where a converted model keeps its plan.
PLAN_ATTRIBUTE = "_qdq_plan"

#: (path of the block, kind) -> the routines recorded for it, one for each kind of call.
Recordings = Mapping[tuple[str, str], Iterable[Routine]]


def operate(model: PreTrainedModel, plan: Plan, recordings: Recordings) -> None:
    """Put the plan's quantizers into ``model``.

    Args:
        recordings: For every block whose graph the plan edits. The graphs are edited.

    Raises:
        Exception: Whatever goes wrong half-way is raised again after every step was taken back.
    """
    undo: list[Callable[[], None]] = []
    try:
        _Surgeon(model, plan, recordings, undo).run()
    except BaseException:
        for step in reversed(undo):
            step()
        raise


class _Surgeon:
    def __init__(
        self, model: PreTrainedModel, plan: Plan, recordings: Recordings, undo: list[Callable[[], None]]
    ) -> None:
        self.model, self.plan, self.recordings, self.undo = model, plan, recordings, undo
        self.compiled: dict[int, Variant] = {}

    def run(self) -> None:
        if self.plan.attention is not None:
            self._switch_attention(self.plan.attention)
        blocks: dict[tuple[str, str], list[Site]] = {}
        linears: dict[str, list[Site]] = {}
        for site in self.plan.sites:
            if site.routine == "module":
                linears.setdefault(site.owner, []).append(site)
            else:
                blocks.setdefault((site.owner, site.routine), []).append(site)
        for owner, sites in linears.items():
            self._swap_linear(self.model.get_submodule(owner), sites)
        for (owner, kind), sites in blocks.items():
            self._rewrite(owner, kind, sites)
        self._set(self.model, PLAN_ATTRIBUTE, self.plan)

    def _switch_attention(self, implementation: str) -> None:
        # Two models made from one config object share it: this one gets a config of its own.
        configs: dict[int, Any] = {}
        for module in self.model.modules():
            config = vars(module).get("config")
            if config is not None and hasattr(config, "_attn_implementation_internal"):
                own = copy.deepcopy(config, configs)
                own._attn_implementation_internal = implementation
                self._set(module, "config", own)

    def _swap_linear(self, linear: nn.Module, sites: list[Site]) -> None:
        self._set_class(linear, QuantLinear)
        by_role = {site.role: site for site in sites}
        for role in ("input", "weight"):
            site = by_role.get(role)
            self._add(linear, f"_{role}_quantizer", None if site is None else self._quantizer(linear, site))

    def _rewrite(self, owner: str, kind: str, sites: list[Site]) -> None:
        block = self.model.get_submodule(owner)
        base = _base_class(type(block))
        original = base.forward if kind == "forward" else eager_function(base)
        routines = list(self.recordings[owner, kind])
        edits = tuple(Edit(site.origin, site.position, site.name) for site in sites)
        known = frozenset(
            node.meta["origin"]
            for routine in routines
            for node in routine.graph.nodes
            if node.meta.get("op") in GUARDED
        )
        rewritten = Rewritten(kind, original, edits, known, [])
        for site in sites:
            self._add(block, site.name, self._quantizer(block, site))
        for routine in routines:
            variant = self.compiled.get(id(routine))
            if variant is None:
                variant = self.compiled[id(routine)] = rewritten.specialised(routine)
            rewritten.variants.append(variant)
        self._set_class(block, quantized_class(base))
        self._set(block, f"_qdq_{kind}", rewritten)

    def _quantizer(self, owner: nn.Module, site: Site) -> TensorQuantizer:
        # The defaults are read now: what set_default_quant_desc_* was given last is what a rule's "default" means.
        weight = site.role == "weight"
        default = (
            quant_nn.QuantLinear.default_quant_desc_weight if weight else quant_nn.QuantLinear.default_quant_desc_input
        )
        rule = self.plan.rules.rule(site.rule)
        provenance = Provenance(
            quantizer=site.quantizer,
            role=site.role,
            rule=rule.name,
            rules=self.plan.rules.name,
            why=rule.why,
            declared=rule.source,
            operand=f"{site.operator}({site.capture})",
            source=site.source,
            descriptor=_describe(default) if site.spec is None else str(site.spec),
        )
        tensor = next((p for p in owner.parameters()), None)
        device = self.model.device if tensor is None else tensor.device
        quantizer = make_quantizer(site.spec, default, provenance, torch.device(device))
        quantizer.train(owner.training)
        return quantizer

    # -- steps that can be taken back --------------------------------------------------------------------------

    def _set(self, target: nn.Module, name: str, value: Any) -> None:
        own = vars(target)
        if name in own:
            before = own[name]
            self.undo.append(lambda: own.__setitem__(name, before))
        else:
            self.undo.append(lambda: own.pop(name, None))
        own[name] = value

    def _set_class(self, target: nn.Module, cls: type[nn.Module]) -> None:
        before = type(target)
        self.undo.append(lambda: setattr(target, "__class__", before))
        target.__class__ = cls

    def _add(self, target: nn.Module, name: str, child: nn.Module | None) -> None:
        self.undo.append(lambda: target._modules.__delitem__(name))
        target.register_module(name, child)


def _describe(descriptor: Any) -> str:
    grid = f"{'u' if descriptor.unsigned else ''}int{descriptor.num_bits}{' narrow' if descriptor.narrow_range else ''}"
    axis = descriptor.axis
    axes = axis if isinstance(axis, (tuple, list)) else [axis]
    where = "per-tensor" if axis is None else f"axis {', '.join(map(str, axes))}"
    return f"{grid} {where} {descriptor.calib_method} (default)"


# ---------------------------------------------------------------------------------------------- rewritten classes

_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {}


def _base_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The Hugging Face class of a block, rewritten or not."""
    return cast("type[nn.Module]", cls.__dict__.get("_qdq_base", cls))


def quantized_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``cls`` whose forward runs the rewritten graphs of the instance.

    It has the name of ``cls``: what looks blocks up by class name (device maps, FSDP policies) finds it as before.
    """
    known = _QUANTIZED.get(cls)
    if known is not None:
        return known

    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self._qdq_attention is not None:
            check_not_bypassed(self)
        if self._qdq_forward is None:
            return cls.forward(self, *args, **kwargs)
        return self._qdq_forward(self, args, kwargs)

    def __reduce_ex__(self: Any, _: Any) -> Any:
        # The class is made on the fly, so a pickle names the Hugging Face class and makes it again.
        return _revive, (cls,), self.__getstate__()

    members = {
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
        "__reduce_ex__": __reduce_ex__,
        "_qdq_base": cls,
        "_qdq_forward": None,
        "_qdq_attention": None,
        "forward": forward,
    }
    made = cast("type[nn.Module]", types.new_class(cls.__name__, (cls,), exec_body=lambda own: own.update(members)))
    _QUANTIZED[cls] = made
    return made


def _revive(cls: type[nn.Module]) -> nn.Module:
    made = quantized_class(cls)
    instance: nn.Module = made.__new__(made)
    return instance
