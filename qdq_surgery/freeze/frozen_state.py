"""What a frozen model knows of itself, and what transformers is told: how it is saved, and that it is not trained."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel

from qdq_surgery.checkpoint.attentions import name_as_eager, name_back
from qdq_surgery.checkpoint.config import FrozenConfig
from qdq_surgery.checkpoint.plan_cache import lock_of
from qdq_surgery.checkpoint.plugin import QDQQuantizer
from qdq_surgery.checkpoint.quantizer_states import record_of
from qdq_surgery.checkpoint.save import SAVE_ATTRIBUTE, SavePretrained, without_aliases
from qdq_surgery.checkpoint.weight_conversions import keep_ranges_apart
from qdq_surgery.errors import ModelError
from qdq_surgery.freeze.epilogues import Epilogue
from qdq_surgery.freeze.handovers import Handover
from qdq_surgery.freeze.linear import FROZEN, IntegerLinear
from qdq_surgery.match.plan import Plan
from qdq_surgery.match.site_names import LINEAR_NAMES
from qdq_surgery.surgery.model_state import FROZEN_ATTRIBUTE, plan_of, set_state
from qdq_surgery.text.layer_names import fold

__all__ = ["NOTES", "FrozenOrigin", "FrozenState", "declare", "frozen_state"]

#: Key in the metadata of a frozen model's weights: what was found out when it was frozen.
NOTES = "qdq_surgery_frozen"


@dataclass(frozen=True)
class FrozenState:
    """What a frozen model knows of itself.

    Attributes:
        plan: What it was converted by.
        kept: Of each quantized linear that stays in float, why.
        epilogues: The functions that products compute in their epilogues.
        shared: For each block in which linears share what they read, their paths, group by group.
        handovers: The linears that round for the next one.
        origin: What its files say of the quantized model that it was made of.
    """

    plan: Plan
    kept: dict[str, str]
    epilogues: tuple[Epilogue, ...]
    shared: dict[str, tuple[tuple[str, ...], ...]]
    handovers: tuple[Handover, ...]
    origin: FrozenOrigin


@dataclass(frozen=True)
class FrozenOrigin:
    """What the files of a frozen model say of the quantized model that it was made of.

    Attributes:
        config: For its ``config.json``; ``None`` where the model cannot be saved.
        lock: Its plan, for the metadata of its weights; empty where it has to be found anew.
        refused: Why it cannot be saved.
    """

    config: FrozenConfig | None
    lock: Mapping[str, str]
    refused: str = ""

    @classmethod
    def of(cls, qmodel: PreTrainedModel, integers: Iterable[str]) -> FrozenOrigin:
        """That of a calibrated model, before it is frozen.

        Args:
            integers: Paths of the modules whose weights become integers.
        """
        plan = plan_of(qmodel)
        layers = {site.quantizer: site.layer for site in plan.sites}
        names = {f"{path}.{LINEAR_NAMES['weight']}" for path in integers}
        try:
            record = record_of(qmodel)
            # The integers have their roundings in them.
            rounded = fold({name: layers[name] for name in record.names("rounded") if name not in names})
            record = replace(record, rounded=rounded)
            config = FrozenConfig(plan.rules, record, fold({name: layers[name] for name in sorted(names)}))
        except ModelError as error:  # it was changed by hand
            return cls(None, {}, str(error))
        return cls(config, lock_of(qmodel))


def frozen_state(model: nn.Module) -> FrozenState:
    """The state of a frozen model.

    Raises:
        ModelError: :func:`qdq_surgery.freeze` did not make it.
    """
    state = vars(model).get(FROZEN_ATTRIBUTE)
    if not isinstance(state, FrozenState):
        raise ModelError(f"this {type(model).__name__} is not frozen; call qdq_surgery.freeze(qmodel) first")
    return state


class FrozenQuantizer(QDQQuantizer):
    """transformers' handle on a frozen model; ``model.hf_quantizer``."""

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained: transformers' Trainer asks."""
        return False

    @property
    def is_qat_trainable(self) -> bool:
        """The same, with the quantizers that it has left."""
        return False

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[Any, dict[str, str]]:
        """Called by ``save_pretrained`` before it writes anything.

        Raises:
            ModelError: Its quantizers were changed by hand before it was frozen, or it is part of a model.
        """
        state = frozen_state(model)
        if state.origin.config is None:
            raise ModelError(f"this frozen {type(model).__name__} cannot be saved: {state.origin.refused}")
        keep_ranges_apart(model)
        model.config.quantization_config = self.quantization_config = state.origin.config
        name_as_eager(model.config)
        state.origin.config.once_written = functools.partial(name_back, model.config)
        notes = {
            "epilogues": [[each.linear, each.function] for each in state.epilogues],
            "shared": {block: list(map(list, groups)) for block, groups in state.shared.items()},
            "handovers": [each.parts() for each in state.handovers],
        }
        return without_aliases(model, self._state_dict), {**state.origin.lock, NOTES: json.dumps(notes)}

    def dequantize(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses: the float weights are gone."""
        raise ModelError(f"{FROZEN}, and holds no float weights; dequantize the quantized model that it is made of")


def _apply_or_refuse(model: PreTrainedModel, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreTrainedModel:
    """What ``to(...)`` and the like do, if all of the model can go there: nothing has moved where it cannot."""
    for module in model.modules():
        if isinstance(module, IntegerLinear):
            module.destination(fn)
    return type(model)._apply(model, fn, recurse)


def declare(model: PreTrainedModel, state: FrozenState) -> None:
    """Make a model known as frozen, to this package and to transformers."""
    set_state(model, None)
    vars(model)[FROZEN_ATTRIBUTE] = state
    handle = FrozenQuantizer(state.origin.config or model.hf_quantizer.quantization_config)
    for part in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        vars(part)["hf_quantizer"] = handle
    own = {SAVE_ATTRIBUTE: SavePretrained(model), "quantization_method": handle.quantization_config.method}
    vars(model).update({**own, "is_quantized": True})
    vars(model)["_apply"] = functools.partial(_apply_or_refuse, model)
