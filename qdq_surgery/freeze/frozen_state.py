"""What a frozen model knows of itself, and what transformers is told: it is not trained, saved or made float again."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer

from qdq_surgery.checkpoint.config import QUANT_METHOD
from qdq_surgery.checkpoint.save import SAVE_ATTRIBUTE
from qdq_surgery.errors import ModelError
from qdq_surgery.freeze.epilogues import Epilogue
from qdq_surgery.freeze.linear import FROZEN, IntegerLinear
from qdq_surgery.match.plan import Plan
from qdq_surgery.surgery.model_state import FROZEN_ATTRIBUTE, set_state

__all__ = ["FrozenState", "declare", "frozen_state"]


@dataclass(frozen=True)
class FrozenState:
    """What a frozen model knows of itself.

    Attributes:
        plan: What it was converted by.
        kept: Of each quantized linear that stays in float, why.
        epilogues: The functions that products compute in their epilogues.
        shared: For each block in which linears share what they read, their paths, group by group.
    """

    plan: Plan
    kept: dict[str, str]
    epilogues: tuple[Epilogue, ...]
    shared: dict[str, tuple[tuple[str, ...], ...]]


def frozen_state(model: nn.Module) -> FrozenState:
    """The state of a frozen model.

    Raises:
        ModelError: :func:`qdq_surgery.freeze` did not make it.
    """
    state = vars(model).get(FROZEN_ATTRIBUTE)
    if not isinstance(state, FrozenState):
        raise ModelError(f"this {type(model).__name__} is not frozen; call qdq_surgery.freeze(qmodel) first")
    return state


class FrozenQuantizer(HfQuantizer):  # type: ignore[misc]
    """transformers' handle on a frozen model; ``model.hf_quantizer``."""

    def is_serializable(self) -> bool:
        """Whether ``save_pretrained`` works."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether it can be trained: transformers' Trainer asks."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether ``torch.compile`` works."""
        return True

    def dequantize(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses: the float weights are gone."""
        raise ModelError(f"{FROZEN}, and holds no float weights; dequantize the quantized model that it is made of")


def _refuse_saving(*_: Any, **__: Any) -> NoReturn:
    raise ModelError(
        f"{FROZEN}, and its integers have no form in files; save the quantized model, then freeze after loading"
    )


def _apply_or_refuse(model: PreTrainedModel, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreTrainedModel:
    """What ``to(...)`` and the like do, if all of the model can go there: nothing has moved where it cannot."""
    for module in model.modules():
        if isinstance(module, IntegerLinear):
            module.moved(fn)
    return type(model)._apply(model, fn, recurse)


def declare(model: PreTrainedModel, state: FrozenState) -> None:
    """Make a model known as frozen, to this package and to transformers."""
    set_state(model, None)
    vars(model)[FROZEN_ATTRIBUTE] = state
    handle = FrozenQuantizer(model.hf_quantizer.quantization_config)
    for part in (module for module in model.modules() if isinstance(module, PreTrainedModel)):
        vars(part)["hf_quantizer"] = handle
    vars(model).update({SAVE_ATTRIBUTE: _refuse_saving, "quantization_method": QUANT_METHOD, "is_quantized": True})
    vars(model)["_apply"] = functools.partial(_apply_or_refuse, model)
