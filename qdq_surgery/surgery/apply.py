"""Applies a :class:`Plan` to a model, in place. The only file that edits models.

Nothing is decided here: which sites, under which names, is in the plan; which graphs, in the recorded routines.
"""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import PreTrainedModel

from qdq_surgery.errors import MatchError
from qdq_surgery.graph.block_graph import BlockGraph
from qdq_surgery.graph.compiled_graph import CompiledGraph
from qdq_surgery.graph.operators import PRODUCTS
from qdq_surgery.hf.config_facts import attention_of, set_attention
from qdq_surgery.match.edits import Edit, Origin
from qdq_surgery.match.plan import Plan, Site
from qdq_surgery.match.site_names import is_site_name
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.factory import Defaults, Maker, device_of
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.safety.untrusted import quoted
from qdq_surgery.surgery.model_state import ModelState, set_state
from qdq_surgery.surgery.quantized_forward import CompiledGraphs, QuantizedForward
from qdq_surgery.trace.attention import QDQ_ATTENTION, QUANTIZED_FORWARDS, check_not_bypassed, eager_function
from qdq_surgery.trace.units import structure

__all__ = [
    "Implant",
    "Known",
    "Recordings",
    "base_class",
    "implant",
    "operate",
    "prepare",
    "quantized_class",
    "restore",
]

_CPU = torch.device("cpu")

#: (path of the block, kind) -> the routines recorded for it, one for each kind of call.
Recordings = Mapping[tuple[str, str], Iterable[BlockGraph]]

#: (path of the block, kind) -> origins of all matmul-like calls in it: a block whose graphs are recorded at its first
#: call needs no more.
Known = Mapping[tuple[str, str], frozenset[Origin]]


class Implant(NamedTuple):
    """A quantizer, and the module that is to get it; ``None`` where a linear has one operand in float."""

    owner: nn.Module
    name: str
    site: Site | None
    quantizer: TensorQuantizer | None


def operate(model: PreTrainedModel, plan: Plan, recordings: Recordings) -> None:
    """Put the plan's quantizers into ``model``.

    Whatever goes wrong half-way leaves the model half-way: see :func:`~qdq_surgery.safety.transaction.all_or_nothing`.

    Args:
        recordings: For every block whose graph the plan edits. The graphs are edited.

    Raises:
        MatchError: A quantizer's name cannot be one, or is taken.
    """
    implant(prepare(model, plan, recordings))


def prepare(
    model: PreTrainedModel,
    plan: Plan,
    recordings: Recordings | None,
    known: Known | None = None,
    defaults: Defaults | None = None,
    *,
    modules: Mapping[str, nn.Module] | None = None,
) -> list[Implant]:
    """All of :func:`operate` but the last step, :func:`implant`, without which the model does not run.

    Between the two a model can be loaded, and whoever loads it sees the modules and the names of the float model.

    Args:
        recordings: As there. ``None``: each kind of call is recorded when it first comes.
        known: In place of the recordings.
        defaults: Left out, those of now.
        modules: The model's modules by name, if they are known.
    """
    by_name = dict(model.named_modules()) if modules is None else modules
    return _Surgeon(model, plan, recordings, known or {}, Maker(plan, defaults or Defaults.now()), by_name).run()


def implant(implants: Iterable[Implant]) -> None:
    """Put quantizers into the modules that were prepared for them."""
    for each in implants:
        each.owner._modules[each.name] = each.quantizer


@dataclass
class _Surgeon:
    model: PreTrainedModel
    plan: Plan
    recordings: Recordings | None
    known: Known
    maker: Maker
    modules: Mapping[str, nn.Module]
    compiled: dict[int, CompiledGraph] = field(default_factory=dict)
    edited: dict[int, tuple[Edit, ...]] = field(default_factory=dict)
    variants: dict[tuple[Any, ...], CompiledGraphs] = field(default_factory=dict)
    implants: list[Implant] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device = self.model.device

    def run(self) -> list[Implant]:
        self._own_configs(self.plan.attention)
        sites: dict[tuple[str, str], list[Site]] = {}
        for site in self.plan.sites:
            sites.setdefault((site.owner, site.routine), []).append(site)
        for (owner, kind), own in sites.items():
            if kind == "module":
                self._swap_module(self.modules[owner], own)
        for (owner, kind), own in sites.items():
            if kind != "module":
                self._rewrite(owner, kind, own)
        set_state(self.model, ModelState(self.plan))
        return self.implants

    def _own_configs(self, attention: str | None) -> None:
        # Two models made from one config object share it: this one gets a config of its own, with its attention.
        configs: dict[int, Any] = {}
        for module in self.modules.values():
            config = vars(module).get("config")
            if hasattr(config, "_attn_implementation"):
                own = copy.deepcopy(config, configs)
                if attention is not None:
                    set_attention(own, attention)
                vars(module)["config"] = own

    def _swap_module(self, module: nn.Module, sites: list[Site]) -> None:
        by_role = {site.role: site for site in sites}
        device = self._device_of(module)
        if isinstance(module, nn.Embedding):
            self._add(module, "_weight_quantizer", by_role["weight"], device)
            _set_class(module, QuantEmbedding)
            return
        _set_class(module, QuantLinear)
        self._add(module, "_input_quantizer", by_role.get("input"), device)
        self._add(module, "_weight_quantizer", by_role.get("weight"), device)

    def _rewrite(self, owner: str, kind: str, sites: list[Site]) -> None:
        block = self.modules[owner]
        edits: tuple[Edit, ...] = tuple(site.edit for site in sites)
        base = base_class(type(block))
        original = base.forward if kind == "forward" else eager_function(base)
        routines = [] if self.recordings is None else list(self.recordings[owner, kind])
        known = self.known.get((owner, kind), frozenset()) | frozenset(
            node.meta["origin"]
            for routine in routines
            for node in routine.graph.nodes
            if node.meta.get("op") in PRODUCTS
        )
        # Blocks of one make share what they record; every use asks again whether it holds for the block.
        make = (kind, edits, known, structure(block))
        variants = self.variants.setdefault(make, CompiledGraphs())
        rewritten = QuantizedForward(kind, original, edits, known, variants)
        for routine in routines:
            if self.edited.setdefault(id(routine), edits) != edits:
                continue  # edited for a block whose sites are others: this block's graph is recorded at its first call
            if id(routine) not in self.compiled:
                self.compiled[id(routine)] = rewritten.compile_recorded(routine)
            if self.compiled[id(routine)] not in variants.found:
                variants.found.append(self.compiled[id(routine)])
        _set_class(block, quantized_class(base))
        vars(block)[QUANTIZED_FORWARDS[kind]] = rewritten
        device = self._device_of(block)
        for site in sites:
            self._add(block, site.name, site, device)

    def _device_of(self, owner: nn.Module) -> torch.device:
        # What is not loaded yet is settled when it is.
        return _CPU if self.device.type == "meta" else device_of(owner, self.model)

    def _add(self, owner: nn.Module, name: str, site: Site | None, device: torch.device) -> None:
        if not is_site_name(name):  # it becomes an attribute, and a word in generated source
            raise MatchError(f"{quoted(name)} cannot be the name of a quantizer in a {type(owner).__name__}")
        if _is_taken(owner, name):
            raise MatchError(f"a quantizer is to be '{name}', which this {type(owner).__name__} has already; rename it")
        quantizer = None if site is None else self.maker.make(site, device, owner.training)
        self.implants.append(Implant(owner, name, site, quantizer))


def _is_taken(owner: nn.Module, name: str) -> bool:
    """``hasattr`` for a name that is not: nn.Module takes its time to say so."""
    own = vars(owner)
    return (
        name in own
        or name in own["_parameters"]
        or name in own["_buffers"]
        or name in own["_modules"]
        or hasattr(type(owner), name)
    )


def _set_class(target: nn.Module, cls: type[nn.Module]) -> None:
    object.__setattr__(target, "__class__", cls)  # a tenth of the time that nn.Module's own way takes


def restore(model: PreTrainedModel) -> None:
    """Make a converted model the float model again, with transformers' eager attention; weights stay as they are."""
    for module in model.modules():
        for name in [name for name, child in module._modules.items() if isinstance(child, TensorQuantizer)]:
            del module._modules[name]
        if isinstance(module, QuantLinear):
            for name in ("_input_quantizer", "_weight_quantizer"):
                module._modules.pop(name, None)  # None where a rule quantizes one operand only
            _set_class(module, nn.Linear)
        elif isinstance(module, QuantEmbedding):
            _set_class(module, nn.Embedding)
        elif (base := base_class(type(module))) is not type(module):
            _set_class(module, base)
            for name in QUANTIZED_FORWARDS.values():
                vars(module).pop(name, None)
        config = vars(module).get("config")
        if attention_of(config) == QDQ_ATTENTION:
            set_attention(config, "eager")
    set_state(model, None)


# ---------------------------------------------------------------------------------------------- rewritten classes

_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {}


def base_class(cls: type[nn.Module]) -> type[nn.Module]:
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
        **dict.fromkeys(QUANTIZED_FORWARDS.values()),
        "forward": forward,
    }
    made = cast("type[nn.Module]", types.new_class(cls.__name__, (cls,), exec_body=lambda own: own.update(members)))
    _QUANTIZED[cls] = made
    return made


def _revive(cls: type[nn.Module]) -> nn.Module:
    made = quantized_class(cls)
    instance: nn.Module = made.__new__(made)
    return instance
