"""How transformers loads and saves converted models: its own plug-in for quantization methods.

``from_pretrained`` builds the model without weights and hands it over; the quantizers are put in, and the weights come
then; last come the ranges, from the same files. ``save_pretrained`` asks for the plan, to keep it with the weights.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.utils import logging

from qdq_surgery.analysis import analyse, recordings_of
from qdq_surgery.calibrate import CALIBRATION_ATTRIBUTE
from qdq_surgery.converted import plan_of, quantizers
from qdq_surgery.errors import AttentionBypassError, MatchError, ModelError
from qdq_surgery.layered import fold
from qdq_surgery.making import device_of
from qdq_surgery.plan import Plan
from qdq_surgery.pretrained.config import QUANT_METHOD, QDQConfig
from qdq_surgery.pretrained.hollow import hollow, real_tensors
from qdq_surgery.pretrained.lock import METADATA, lock_of, read_lock
from qdq_surgery.pretrained.ranges import RANGE_PATTERN, read_ranges
from qdq_surgery.pretrained.record import Record, record_of
from qdq_surgery.pretrained.report import restore_calibration, write_report
from qdq_surgery.quantizer import TensorQuantizer
from qdq_surgery.surgery import PLAN_ATTRIBUTE, Implant, implant, prepare, restore

__all__ = ["QDQQuantizer", "adopt"]

logger = logging.get_logger(__name__)

#: Attention implementations that a model with quantized attention may be asked for: they mean what it has.
_OWN_ATTENTION = (None, "eager", "qdq_eager")


@register_quantizer(QUANT_METHOD)
class QDQQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' handle on a converted model; ``model.hf_quantizer``."""

    quantization_config: QDQConfig

    def __init__(self, quantization_config: QDQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: list[str] = []
        self._attention: str | None = None
        self._implants: list[Implant] = []
        self._parts: list[PreTrainedModel] = []

    # -- what it says of itself --------------------------------------------------------------------------------

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether all of it can: fake quantization passes gradients."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works."""
        return True

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Nothing to do: parameters keep their names."""

    def _convert_model_for_quantization(self, model: PreTrainedModel) -> None:
        """Nothing to do: this would replace classes that transformers knows for other methods."""

    # -- loading -----------------------------------------------------------------------------------------------

    def update_attn_implementation(self, config: Any) -> Any:
        """Notes the attention that was asked for, before the model is built."""
        self._attention = getattr(config, "_attn_implementation_internal", None)
        return config

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        self._files = list(checkpoint_files or [])
        if config.record is not None and not self._files:
            raise ModelError(
                "from_pretrained does not see the ranges in a state_dict= that it is given; load the folder, or "
                "convert the float model and call load_state_dict"
            )
        modules = dict(model.named_modules())
        self._parts = [each for each in modules.values() if isinstance(each, PreTrainedModel) and each is not model]
        lock = None
        if config.record is not None:
            lock = read_lock(self._files, model, modules, config.rules, config.record.sites)
        with real_tensors():
            if lock is None:
                self._match(model)
            else:
                self._check_attention(lock.plan)
                self._implants = prepare(model, lock.plan, None, lock.known, self._defaults(), modules=modules)
        if self._files:
            # The ranges are no weights that transformers could place: their shapes are known from the file alone.
            model._keys_to_ignore_on_load_unexpected = {
                *(model._keys_to_ignore_on_load_unexpected or ()),
                RANGE_PATTERN,
            }
        return model

    def _match(self, model: PreTrainedModel) -> None:
        """Convert ``model`` by its rules, and compare with what was saved."""
        twin = hollow(model)
        look, plan = analyse(twin, self.quantization_config.rules, None)
        self._check_attention(plan)
        recordings = recordings_of(twin, look, plan)
        record = self.quantization_config.record
        if record is not None:
            check_sites(record, plan, model)
        self._implants = prepare(model, plan, recordings, None, self._defaults())

    def _defaults(self) -> Any:
        record = self.quantization_config.record
        return None if record is None else record.defaults()

    def _check_attention(self, plan: Plan) -> None:
        if plan.attention is not None and self._attention not in _OWN_ATTENTION:
            raise AttentionBypassError(
                f"attn_implementation='{self._attention}' was asked for, by the call or by the config given to it, "
                f"which would bypass the quantizers of the attention matmuls that the rules '{plan.rules.name}' put "
                "in; leave it out, or use rules that leave attention in float, such as 'linear-only'"
            )

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        vars(model).pop("_keys_to_ignore_on_load_unexpected", None)
        made = {each.site.quantizer: each for each in self._implants if each.site is not None}
        found = {name: each.quantizer for name, each in made.items() if each.quantizer is not None}
        names = _Names(model, found)
        ranges = {names.loaded(name): value for name, value in read_ranges(self._files).items()}
        record = self.quantization_config.record
        _check_known(found, ranges, model)
        one = model.device if len(set(getattr(model, "hf_device_map", {}).values())) < 2 else None
        if one is not None and one.type == "meta":  # all of it is on a disk
            one = None
        for name, each in made.items():
            device = device_of(each.owner, model) if one is None else one
            found[name].settle(device, each.owner.training, ranges.get(name))
        if record is not None:
            _check_ranges(found, ranges, record, names)
            _take_state(found, ranges, record, names)
        implant(self._implants)
        restore_calibration(model, self._files)
        adopt(model, self, self._parts)
        self._files, self._implants, self._parts = [], [], []
        return model

    # -- saving ------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        """Called by ``save_pretrained`` before it writes anything.

        Raises:
            ModelError: The quantizers are no longer those that the model's rules make, or it is part of a model.
        """
        caller = _caller(inspect.currentframe())
        weights = caller.get("state_dict")  # transformers would forget that it was given one
        if getattr(model, "_hf_peft_config_loaded", False):
            return weights, {}  # only an adapter is saved
        _check_whole(model)
        for name, quantizer in quantizers(model).items():
            if quantizer._modules:
                raise ModelError(
                    f"{name} has the clip of a descriptor with learn_amax, which no checkpoint brings back; let the "
                    "rule's spec say learn: true instead, which it can"
                )
        config = QDQConfig(plan_of(model).rules, record_of(model))
        model.config.quantization_config = self.quantization_config = config
        if caller.get("save_on_this_rank", caller.get("is_main_process", True)) and "save_directory" in caller:
            write_report(model, Path(caller["save_directory"]))
        return weights, {METADATA: lock_of(model)}

    def dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """Make it the float model again, with eager attention and the weights that it has now.

        Raises:
            ModelError: It is part of a model.
        """
        _check_whole(model)
        restore(model)
        vars(model).pop(CALIBRATION_ATTRIBUTE, None)
        for part in _parts(model):
            vars(part).pop("hf_quantizer", None)
        self.remove_quantization_config(model)
        return model if dtype is None else model.to(dtype)


def adopt(
    model: PreTrainedModel, quantizer: QDQQuantizer | None = None, parts: Iterable[PreTrainedModel] | None = None
) -> None:
    """Make a converted model known to transformers, so that it is saved as one.

    Args:
        quantizer: The one that loaded it; a new one if left out.
        parts: The models inside it, if they are known.
    """
    if quantizer is None:
        quantizer = QDQQuantizer(QDQConfig(plan_of(model).rules, record_of(model)))
    for part in _parts(model) if parts is None else parts:
        part.hf_quantizer = quantizer
    model.hf_quantizer = quantizer
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = quantizer.quantization_config
    # Fake quantization leaves the weights in float: nothing that transformers forbids packed integers applies.
    vars(model).pop("is_quantized", None)


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models inside a model, such as the encoder below a head."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]


def _check_whole(model: PreTrainedModel) -> None:
    if PLAN_ATTRIBUTE not in vars(model):
        name = type(model).__name__
        raise ModelError(
            f"this {name} is a part of a converted model, whose rules and sites are those of the whole; save the "
            f"whole, from which {name}.from_pretrained loads its part"
        )


def _caller(frame: FrameType | None) -> Mapping[str, Any]:
    """What ``save_pretrained`` was given.

    Args:
        frame: The plug-in's method that it called. transformers does not tell it the folder, and has no other place
            between making the folder and uploading it where a file of ours could be written.
    """
    caller = None if frame is None or frame.f_back is None else frame.f_back.f_locals
    if caller is None or "save_directory" not in caller:
        logger.warning("this version of transformers hides the folder from its plug-ins: no qdq_report.json is written")
        return {}
    return caller


def check_sites(record: Record, plan: Plan, model: PreTrainedModel) -> None:
    """Whether the rules still find the sites that were saved.

    In another class than the saved one (the bare model of a head, a head on a bare model), sites in modules that it
    lacks go with them, and sites that the saved one did not have are new.

    Raises:
        MatchError: They do not; names the sites.
    """
    layers = {site.quantizer: site.layer for site in plan.sites}
    names = _Names(model, layers)
    saved = {names.here(name) for name in record.names()}
    lost, new = saved - layers.keys(), layers.keys() - saved
    if record.model != type(model).__name__:
        modules = {name for name, _ in model.named_modules()}
        lost = {name for name in lost if name.rpartition(".")[0] in modules}
        new = set()
    if lost or new:
        parts = [
            f"{what.format(len(sites))}: {', '.join(_listed(sites, layers))}"
            for what, sites in (("do not find {} of them", lost), ("find {} beyond them", new))
            if sites
        ]
        made = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        raise MatchError(
            f"the checkpoint's rules '{plan.rules.name}' no longer fit {type(model).__name__}: of the "
            f"{len(saved)} quantizers that it was saved with (by {made}) they {'; and they '.join(parts)}. Load it "
            "with the versions that saved it and the config.json that was saved, or convert the float model again and "
            "calibrate it"
        )


def _listed(sites: set[str], layers: Mapping[str, int | None]) -> list[str]:
    folded = fold({name: layers.get(name, _number_in(name)) for name in sorted(sites)})
    listed = [name if where is None else f"{name} (layers {where})" for name, where in folded.items()]
    return [*listed[:6], f"and {len(listed) - 6} more kinds"] if len(listed) > 6 else listed


def _number_in(name: str) -> int | None:
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


class _Names:
    """Names in a checkpoint against those in the model: a head's may have the base model's prefix, or lack it."""

    def __init__(self, model: PreTrainedModel, known: Mapping[str, Any]) -> None:
        self.model, self.prefix, self.known = model, f"{model.base_model_prefix}.", known

    def here(self, name: str) -> str:
        """The name of a quantizer of the saved model; where there is none, that of its place, if there is one."""
        if name in self.known:
            return name
        candidates = (name, self.prefix + name, name.removeprefix(self.prefix))
        known = next((each for each in candidates if each in self.known), None)
        return known or next((each for each in candidates if each.rpartition(".")[0] in self._modules), name)

    def loaded(self, name: str) -> str:
        """The same by the name in a file, which transformers may have been told to change."""
        for conversion in getattr(self.model, "_weight_conversions", None) or ():
            if isinstance(conversion, WeightRenaming):
                name = conversion.rename_source_key(name)[0]
        return self.here(name)

    @functools.cached_property
    def _modules(self) -> set[str]:
        return {name for name, _ in self.model.named_modules()}


def _check_known(found: Mapping[str, TensorQuantizer], ranges: Mapping[str, Tensor], model: PreTrainedModel) -> None:
    beyond = ranges.keys() - found.keys()
    if not beyond:
        return
    modules = {name for name, _ in model.named_modules()}
    unknown = sorted(name for name in beyond if name.rpartition(".")[0] in modules)
    if unknown:
        raise ModelError(
            f"the checkpoint has ranges of {len(unknown)} quantizers that its rules do not make (first: {unknown[0]}); "
            "it was written under other rules, or under another version of transformers"
        )


def _check_ranges(
    found: Mapping[str, TensorQuantizer], ranges: Mapping[str, Tensor], record: Record, names: _Names
) -> None:
    without = {names.here(name) for name in record.names("without_range")}
    saved = {names.here(name) for name in record.names()}
    missing = sorted(name for name in found.keys() & saved if name not in ranges and name not in without)
    if missing:
        raise ModelError(
            f"the checkpoint has no range for {len(missing)} quantizers that were calibrated when it was saved (first: "
            f"{missing[0]}); its files are not those that were saved together"
        )
    new = sorted(found.keys() - saved)
    if new:
        logger.warning(
            f"{len(new)} quantizers are new in this model and have no range yet (first: {new[0]}); calibrate it"
        )


def _take_state(
    found: Mapping[str, TensorQuantizer], ranges: Mapping[str, Tensor], record: Record, names: _Names
) -> None:
    saved, learned, without = (
        {names.here(name) for name in record.names(what)} for what in ("sites", "learned", "without_range")
    )
    for name in saved & found.keys():
        # Their rules or descriptors may have given them what they no longer had.
        if name in without and name not in ranges:
            found[name].reset_amax()
        elif name not in learned and found[name].learns:
            found[name].learn_amax(False)
    steps = {
        "disabled": TensorQuantizer.disable,
        "quant_disabled": TensorQuantizer.disable_quant,
        "learned": TensorQuantizer.learn_amax,
    }
    for what, step in steps.items():
        for name in record.names(what):
            if names.here(name) in found:
                step(found[names.here(name)])
