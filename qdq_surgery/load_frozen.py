"""Frozen models from files: int8 weights, packed for this machine where they are loaded.

The folder is that of the quantized model, with integers in the place of float weights. So it is converted as that is,
by the plan in its files or by its rules, and then its linears and tables take their integers in place of a weight.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantizer
from transformers.utils import logging

from qdq_surgery.checkpoint.config import FROZEN_METHOD, FrozenConfig
from qdq_surgery.checkpoint.plan_cache import DIGEST, METADATA
from qdq_surgery.checkpoint.plugin import Patterns, QDQQuantizer
from qdq_surgery.checkpoint.reconcile import Names
from qdq_surgery.errors import ModelError
from qdq_surgery.freeze.checks import reasons_kept
from qdq_surgery.freeze.epilogues import Epilogue, activations
from qdq_surgery.freeze.freeze import assemble, assemble_as
from qdq_surgery.freeze.frozen_state import NOTES, FrozenOrigin, FrozenState
from qdq_surgery.freeze.handovers import Handover, can_hand, in_one_role
from qdq_surgery.freeze.linear import IntegerLinear, make_integer
from qdq_surgery.graph.shell_copy import real_tensors
from qdq_surgery.integers.choice import unsupported
from qdq_surgery.match.site_names import INTEGERS_SUFFIX, MODULE_PATH
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.integer_embedding import make_integer_embedding
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.safety.random_state import kept_random
from qdq_surgery.safety.untrusted import DamagedError, Item, parse_json, quoted
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.text.layer_names import expand

__all__ = ["FrozenLoader"]

logger = logging.get_logger(__name__)

#: Names of integers in a state dict.
_INTEGERS_PATTERN = rf"^(?s:.*){re.escape(INTEGERS_SUFFIX)}$"

#: Where transformers looks up which names may be missing in a file, and which may be there for nothing.
_IGNORED = "_keys_to_ignore_on_load_missing", "_keys_to_ignore_on_load_unexpected"

#: Words of a device map that are devices; the others are wishes, or a disk.
_DEVICES = ("cpu", "cuda", "mps", "xpu", "meta")

#: A path, which is empty for the model itself, or the place of an argument.
_WORDS = re.compile(rf"(?:{MODULE_PATH.pattern})?")

_CHANGED = "its files are not those that were saved together, or were changed"


@register_quantizer(FROZEN_METHOD)
class FrozenLoader(QDQQuantizer):
    """How transformers loads a frozen model; what is loaded has another handle."""

    quantization_config: FrozenConfig

    def __init__(self, quantization_config: FrozenConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._by_lock = False
        #: By the name of the weight's quantizer: file, name in it, module.
        self._integers: dict[str, tuple[str, str, nn.Module]] = {}

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        for device in _asked_for(kwargs.get("device_map")):
            _check_device(model, device)
        super()._process_model_before_weight_loading(model, checkpoint_files, **kwargs)
        self._integers = self._found(model)
        for *_, module in self._integers.values():
            # There is nothing to load, and nothing to initialize: not every class of transformers takes None for that.
            nothing: Any = nn.Parameter(torch.empty(0, dtype=model.dtype, device="cpu"), requires_grad=False)
            module._parameters["weight"] = nothing
            module._is_hf_initialized = nothing._is_hf_initialized = True  # type: ignore[assignment]
        paths = [re.escape(name.rpartition(".")[0]) for name in self._integers]
        missing, unexpected = (getattr(model, name) or () for name in _IGNORED)
        model._keys_to_ignore_on_load_missing = Patterns([*missing, rf"^(?:{'|'.join(paths)})\.weight$"])
        model._keys_to_ignore_on_load_unexpected = Patterns([*unexpected, _INTEGERS_PATTERN])
        return model

    def _prepare_by_lock(self, model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> bool:
        self._by_lock = super()._prepare_by_lock(model, modules)
        return self._by_lock

    def _found(self, model: PreTrainedModel) -> dict[str, tuple[str, str, nn.Module]]:
        """Where the integers of each weight are.

        Raises:
            ModelError: The files hold others than the config says, or those of something that takes none.
        """
        owners = {each.site.quantizer: each.owner for each in self._implants if each.site is not None}
        names = Names(model, owners)
        stored = {names.loaded(key.removesuffix("._integers")): (path, key) for path, key in _keys(self._files)}
        stated = {names.here(name) for name in expand(self.quantization_config.integers)}
        for what, odd in (
            ("no integers of {}, which its config says are there", stated - stored.keys()),
            ("integers of {}, of which its config says nothing", stored.keys() - stated),
        ):
            here = sorted(name for name in odd if name in owners)
            if here:
                raise ModelError(f"the checkpoint has {what.format(here[0])}; {_CHANGED}")
        found = {name: (*stored[name], owners[name]) for name in stored if name in owners}
        for name, (*_, module) in found.items():
            if not name.endswith("._weight_quantizer") or not isinstance(module, (QuantLinear, QuantEmbedding)):
                raise ModelError(f"the checkpoint has integers of {name}, which is not that of a weight; {_CHANGED}")
        return found

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for *_, module in self._integers.values():
            shape = _shape(module)
            module._parameters["weight"] = nn.Parameter(torch.empty(shape, device="meta", dtype=model.dtype), False)
        metadata = self._stored.metadata
        vars(model).pop(_IGNORED[0], None)
        super()._process_model_after_weight_loading(model, **kwargs)
        for device in {_device(module) for *_, module in self._integers.values() if isinstance(module, QuantLinear)}:
            _check_device(model, device)
        model.eval()
        with kept_random([]), torch.no_grad():
            if self._by_lock:
                lock = {name: text for name, text in metadata.items() if name in (METADATA, DIGEST)}
                origin = FrozenOrigin(self.quantization_config, lock)
            else:  # it is of another class, or was saved by another release
                origin = FrozenOrigin.of(model, [name.rpartition(".")[0] for name in self._integers])
            self._take_integers()
            found = _state_in(metadata, model, origin) if self._by_lock else None
            if found is None:
                assemble(model, reasons_kept(model), origin, None)
            else:
                assemble_as(model, *found)
        self._integers = {}
        return model

    def _take_integers(self) -> None:
        by_file: dict[str, list[str]] = {}
        for name, (path, *_) in self._integers.items():
            by_file.setdefault(path, []).append(name)
        for path, names in by_file.items():
            with safe_open(path, framework="pt") as file:
                for name in names:
                    _, key, module = self._integers[name]
                    _make(module, name, _read(file, key, _shape(module)))


def _asked_for(device_map: Any) -> set[torch.device]:
    """The devices that a model is to be loaded on, as far as they are known before: some words leave them open."""
    if device_map is None:
        return {torch.device("cpu")}
    places = set(device_map.values() if isinstance(device_map, Mapping) else [device_map])
    named = {f"cuda:{each}" if isinstance(each, int) else str(each) for each in places}
    return {torch.device(each) for each in named if each.split(":")[0] in _DEVICES}


def _device(linear: QuantLinear) -> torch.device:
    """Where a linear without a weight is to multiply: its ranges are there."""
    assert linear._weight_quantizer is not None
    amax = linear._weight_quantizer.amax
    return torch.device("cpu") if amax is None else amax.device  # None is refused with words, later


def _check_device(model: PreTrainedModel, device: torch.device) -> None:
    with real_tensors():  # transformers builds models without any
        problem = unsupported(device, model.dtype)
    if problem is not None:
        raise ModelError(
            f"this frozen {type(model).__name__} does not run here: {problem}; load it on another device or in another "
            "dtype, or load the quantized model that it is of, or the float model"
        )


def _keys(files: Iterable[str]) -> list[tuple[str, str]]:
    """File and name of all integers in the files."""
    found = []
    for path in files:
        if not path.endswith(".safetensors"):
            raise ModelError(f"{path} is no safetensors file, in which weights of frozen models are; save it again")
        try:
            with safe_open(path, framework="pt") as file:
                found += [(path, key) for key in file.keys() if key.endswith(INTEGERS_SUFFIX)]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read: {str(error)[:300]}") from error
    return found


def _shape(module: nn.Module) -> tuple[int, int]:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    linear = cast("nn.Linear", module)
    return linear.out_features, linear.in_features


def _read(file: Any, key: str, shape: tuple[int, int]) -> Tensor:
    """The integers under a name, if they are such.

    Raises:
        ModelError: They have another type or shape.
    """
    part = file.get_slice(key)
    found = tuple(part.get_shape())
    if part.get_dtype() != "I8" or found != shape:
        raise ModelError(
            f"the checkpoint has {quoted(key)} as {part.get_dtype()} of the shape {str(found)[:80]}, wanted int8 of "
            f"{shape}; {_CHANGED}"
        )
    tensor: Tensor = file.get_tensor(key)
    return tensor


def _make(module: nn.Module, name: str, integers: Tensor) -> None:
    """Give a module its integers.

    Raises:
        ModelError: Its quantizers are not those of a frozen module.
    """
    sides = {"weight": module._modules.get("_weight_quantizer")}
    if isinstance(module, QuantLinear):
        sides["input"] = module._modules.get("_input_quantizer")
    for side, quantizer in sides.items():
        known: Any = quantizer
        if (
            known is None
            or known.amax is None
            or not known.quantizes
            or known.grid.bits != 8
            or (side == "weight" and known.grid.unsigned)
        ):
            raise ModelError(
                f"{name} is of integers, and the quantizer of its {side} is none of 8 bits that is on; {_CHANGED}"
            )
    if isinstance(module, QuantLinear):
        make_integer(module, integers)
    elif isinstance(module, QuantEmbedding):
        make_integer_embedding(module, integers.clone())  # what is a view of the whole file else


def _state_in(
    metadata: Mapping[str, str], model: PreTrainedModel, origin: FrozenOrigin
) -> tuple[FrozenState, dict[str, str]] | None:
    """What was found when the model was frozen, and what its products compute, by the paths of their linears.

    ``None`` if there is nothing, or nothing that fits the model.
    """
    text = metadata.get(NOTES)
    if text is None:
        return None
    try:
        notes = parse_json(text, f"what is stored under '{NOTES}'").fields(("epilogues", "shared", "handovers"))
        items = notes["epilogues"].items()
        epilogues = tuple(_epilogue(item) for item in items)
        if len({each.linear for each in epilogues} | {each.function for each in epilogues}) < 2 * len(epilogues):
            notes["epilogues"].refuse("each linear and each function once")
        computed = activations(model, epilogues)
        for item, each in zip(items, epilogues, strict=True):
            if each.linear not in computed:
                item.refuse("an integer linear, and a function that its product can compute")
        modules = dict(model.named_modules())
        shared = {block: _groups(item, block, modules) for block, item in notes["shared"].entries().items()}
        handed = tuple(_handover(item, model, computed) for item in notes["handovers"].items())
        reading = {path for groups in shared.values() for group in groups for path in group}
        if len({each.linear for each in handed}) < len(handed) or in_one_role(handed, reading) != handed:
            notes["handovers"].refuse("each linear once, and none that reads integers otherwise")
    except DamagedError as error:
        logger.warning(f"{error}; the model is looked at anew, which needs none")
        return None
    return FrozenState(plan_of(model), reasons_kept(model), epilogues, shared, handed, origin), computed


def _epilogue(item: Item) -> Epilogue:
    parts = item.items()
    if len(parts) != 2:
        item.refuse("a linear and a function")
    return Epilogue(*(each.text(pattern=MODULE_PATH, wanted="the path of a module") for each in parts))


def _handover(item: Item, model: nn.Module, computed: Mapping[str, str]) -> Handover:
    parts = [each.text(pattern=_WORDS, wanted="a path, or the place of an argument") for each in item.items()]
    if len(parts) != len(fields(Handover)):
        item.refuse(f"{len(fields(Handover))} words")
    made = Handover(*parts)
    if not can_hand(model, made, computed.get(made.linear, "")):
        item.refuse("two integer linears in a block, of which one can round for the other")
    return made


def _groups(item: Item, block: str, modules: Mapping[str, nn.Module]) -> tuple[tuple[str, ...], ...]:
    """Groups of linears that lie in one block."""
    made = tuple(
        tuple(path.text(pattern=MODULE_PATH, wanted="the path of a module") for path in group.items())
        for group in item.items()
    )
    inside = all(
        path.startswith(f"{block}.") and isinstance(modules.get(path), IntegerLinear) for g in made for path in g
    )
    if not made or not inside or block not in modules or isinstance(modules[block], nn.ModuleList):
        item.refuse(f"integer linears in the block {quoted(block)}")
    return made
