"""How transformers loads and saves converted models: its own plug-in for quantization methods.

``from_pretrained`` builds the model without weights and hands it over; the quantizers are put in, and the weights come
then; last come the ranges, from the same files. ``save_pretrained`` asks for the plan, to keep it with the weights; see
:mod:`~qdq_surgery.checkpoint.save`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantizer
from transformers.utils import logging

from qdq_surgery.checkpoint.attentions import name_as_eager, name_back
from qdq_surgery.checkpoint.config import QUANT_METHOD, QDQConfig
from qdq_surgery.checkpoint.plan_cache import lock_of, read_lock
from qdq_surgery.checkpoint.quantizer_states import record_of
from qdq_surgery.checkpoint.range_files import STATE_PATTERN, read_ranges
from qdq_surgery.checkpoint.reconcile import (
    Names,
    check_fits,
    check_known,
    check_ranges,
    check_sites,
    refused_tables,
    roundings_of,
    take_state,
)
from qdq_surgery.checkpoint.report import restore_calibration, write_report
from qdq_surgery.checkpoint.save import SAVE_ATTRIBUTE, SavePretrained, without_aliases
from qdq_surgery.checkpoint.weight_conversions import keep_ranges_apart
from qdq_surgery.errors import AttentionBypassError, ModelError
from qdq_surgery.graph.shell_copy import hollow, real_tensors
from qdq_surgery.hf.config_facts import attention_of
from qdq_surgery.match.analyze import analyze, recordings_of
from qdq_surgery.match.plan import Plan
from qdq_surgery.quantize.factory import device_of
from qdq_surgery.safety.torch_private import DisableTorchFunction
from qdq_surgery.safety.transaction import all_or_nothing, put_back_after
from qdq_surgery.surgery.apply import Implant, implant, prepare, restore
from qdq_surgery.surgery.model_state import is_converted, plan_of, quantizers
from qdq_surgery.trace.attention import QDQ_ATTENTION

__all__ = ["Patterns", "QDQQuantizer", "adopt"]

logger = logging.get_logger(__name__)

#: Attention implementations that a model with quantized attention may be asked for: they mean what it has.
_OWN_ATTENTION = (None, "eager", QDQ_ATTENTION)


class Patterns(list[str]):
    """Early versions of transformers 5 add lists of patterns, later ones unite sets."""

    def __or__(self, other: Iterable[str]) -> set[str]:
        return {*self, *other}


@register_quantizer(QUANT_METHOD)
class QDQQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' handle on a converted model; ``model.hf_quantizer``."""

    quantization_config: QDQConfig

    def __init__(self, quantization_config: QDQConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._files: list[str] = []
        self._folder: Path | None = None
        self._state_dict: Any = None
        self._attention: str | None = None
        self._stored = read_ranges([])
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
        self._attention = attention_of(config)
        if self._attention is None and getattr(config, "_output_attentions", False):
            # Left open, transformers would take one that gives no attentions, whatever the config says.
            config._attn_implementation = "eager"
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
        with real_tensors():
            # transformers builds the model within a mode of torch, in which each look at a tensor calls Python.
            with DisableTorchFunction():
                self._stored = read_ranges(self._files)
                found = self._prepare_by_lock(model, modules)
            if not found:
                self._match(model)
        if self._files:
            # The ranges are no weights that transformers could place: their shapes are known from the file alone.
            ignored = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = Patterns([*ignored, STATE_PATTERN])
        return model

    def _prepare_by_lock(self, model: PreTrainedModel, modules: Mapping[str, nn.Module]) -> bool:
        """Convert ``model`` by the plan that is stored with its weights; whether there is one that holds."""
        config = self.quantization_config
        if config.record is None:
            return False
        lock = read_lock(self._stored.metadata, model, modules, config.rules, config.record.sites)
        if lock is None:
            return False
        self._check_attention(lock.plan)
        self._implants = prepare(model, lock.plan, None, lock.known, self._defaults(), modules=modules)
        return True

    def _match(self, model: PreTrainedModel) -> None:
        """Convert ``model`` by its rules, and compare with what was saved."""
        twin = hollow(model)
        look, plan = analyze(twin, self.quantization_config.rules, None)
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
        names = Names(model, found)
        ranges = {names.loaded(name): value for name, value in self._stored.ranges.items()}
        record = self.quantization_config.record
        record_class = None if record is None else record.model
        left = refused_tables(plan_of(model)) if record_class != type(model).__name__ else set()
        check_known(found, ranges, model, left)
        check_fits(self._implants, ranges, self._stored.zeros)
        roundings = roundings_of(self._implants, ranges, self._stored.roundings, record, names)
        one = _single_device(model)
        for name, each in made.items():
            device = device_of(each.owner, model) if one is None else one
            found[name].settle(device, each.owner.training, ranges.get(name), roundings.get(name))
        if record is not None:
            check_ranges(found, ranges, record, names)
            take_state(found, ranges, record, names)
        implant(self._implants)
        restore_calibration(model, self._files)
        adopt(model, self, self._parts)
        self._files, self._stored, self._implants, self._parts = [], read_ranges([]), [], []
        return model

    # -- saving ------------------------------------------------------------------------------------------------

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        """Called by ``save_pretrained`` before it writes anything.

        Raises:
            ModelError: The quantizers are no longer those that the model's rules make, or it is part of a model.
        """
        # transformers would forget that it was given one.
        weights = without_aliases(model, self._state_dict)
        if getattr(model, "_hf_peft_config_loaded", False):
            return weights, {}  # only an adapter is saved
        _check_whole(model)
        for name, quantizer in quantizers(model).items():
            if quantizer._modules:
                raise ModelError(
                    f"{name} has the clip of a descriptor with learn_amax, which no checkpoint brings back; let the "
                    "rule's spec say learn: true instead, which it can"
                )
        keep_ranges_apart(model)
        config = QDQConfig(plan_of(model).rules, record_of(model))
        model.config.quantization_config = self.quantization_config = config
        if self._folder is not None:
            write_report(model, self._folder)
        lock = lock_of(model)
        name_as_eager(model.config)
        config.once_written = functools.partial(name_back, model.config)
        return weights, lock

    @contextmanager
    def saving(self, folder: Path | None, state_dict: Any) -> Iterator[None]:
        """While ``save_pretrained`` runs: what transformers does not tell.

        Args:
            folder: Where the report goes; ``None``: this process writes none.
            state_dict: What ``save_pretrained`` was given.
        """

        def put_back() -> None:
            self._folder = self._state_dict = None

        with put_back_after(put_back):
            self._folder, self._state_dict = folder, state_dict
            yield

    def dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        """Make it the float model again, with eager attention and the weights that it has now.

        Raises:
            ModelError: It is part of a model.
        """
        _check_whole(model)
        with all_or_nothing(model):
            restore(model)
            vars(model).pop(SAVE_ATTRIBUTE, None)
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
    vars(model)[SAVE_ATTRIBUTE] = SavePretrained(model)
    # (Its config stays as it is until it is saved. Where it was loaded, transformers has said it there.)
    # Fake quantization leaves the weights in float: nothing that transformers forbids packed integers applies.
    vars(model).pop("is_quantized", None)


def _single_device(model: PreTrainedModel) -> torch.device | None:
    """Where all of a model is; ``None`` if it is in several places, or on a disk."""
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return None
    # What a frozen model has as integers is not there yet: an embedding, say, which is the first that transformers
    # would ask.
    return next((each.device for each in model.parameters() if each.device.type != "meta"), None)


def _parts(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The models inside a model, such as the encoder below a head."""
    return [module for module in model.modules() if isinstance(module, PreTrainedModel) and module is not model]


def _check_whole(model: PreTrainedModel) -> None:
    if not is_converted(model):
        name = type(model).__name__
        raise ModelError(
            f"this {name} is a part of a converted model, whose rules and sites are those of the whole; save the "
            f"whole, from which {name}.from_pretrained loads its part"
        )
