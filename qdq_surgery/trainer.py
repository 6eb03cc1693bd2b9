"""Hugging Face's Trainer for quantization-aware training: distillation, learned ranges, ranges found again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, Trainer

from qdq_surgery.calibration.collect import unwrapped
from qdq_surgery.calibration.training import recalibrate_weights
from qdq_surgery.errors import CalibrationError, ModelError, OptionError
from qdq_surgery.safety.transaction import kept_modes
from qdq_surgery.surgery.model_state import plan_of, quantizers

__all__ = ["QATTrainer", "distillation_loss"]

#: Outputs that are scores, which distillation compares. Each is softmaxed over its last axis.
_SCORES = ("logits", "start_logits", "end_logits", "prediction_logits", "seq_relationship_logits")

#: What an encoder without a head gives.
_STATES = "last_hidden_state"

_IGNORED_LABEL = -100


def distillation_loss(
    student: Mapping[str, Any],
    teacher: Mapping[str, Any],
    temperature: float = 2.0,
    counted: Tensor | None = None,
    problem_type: str | None = None,
) -> Tensor:
    """How far the student's scores are from the teacher's (Hinton et al., arXiv 1503.02531).

    The divergence of both softmaxes at ``temperature``, times its square; of single values their squared difference; of
    many labels at once the divergence of each label's sigmoid. The mean over rows (and tokens) and over all outputs
    that are scores. Of models without scores (encoders, whose embeddings are used) the squared difference of the last
    hidden states, as a share of the teacher's squares.

    Args:
        student, teacher: What the models return.
        counted: (rows,) or (rows, tokens), where scores of that shape count; all if left out.
        problem_type: As the model's config has it; ``multi_label_classification`` and ``regression`` are told apart.

    Raises:
        ModelError: They have neither scores in common nor hidden states.
    """
    losses = []
    for name in _SCORES:
        mine, theirs = student.get(name), teacher.get(name)
        if mine is None or theirs is None:
            continue
        mine, theirs = mine.float(), theirs.float()
        if mine.shape[-1] == 1 or problem_type == "regression":
            divergence = (mine - theirs).square().mean(-1) / temperature**2  # a value has no temperature
        elif problem_type == "multi_label_classification":
            pairs = [torch.stack([scores, -scores], -1) / temperature for scores in (mine, theirs)]
            divergence = _divergence(*(functional.logsigmoid(pair) for pair in pairs)).mean(-1)
        else:
            divergence = _divergence(*((scores / temperature).log_softmax(-1) for scores in (mine, theirs)))
        if counted is not None and counted.shape == divergence.shape:
            divergence = divergence[counted]
        losses.append(divergence.mean())
    if losses:
        return torch.stack(losses).mean() * temperature**2
    mine, theirs = student.get(_STATES), teacher.get(_STATES)
    if mine is None or theirs is None or mine.shape != theirs.shape:
        raise ModelError(
            f"student and teacher have no scores in common; known: {', '.join(_SCORES)}, or {_STATES} of one shape"
        )
    mine, theirs = mine.float(), theirs.float()
    if counted is not None and counted.shape == mine.shape[:-1]:
        mine, theirs = mine[counted], theirs[counted]
    difference: Tensor = (mine - theirs).square().sum() / theirs.square().sum()
    return difference


def _divergence(mine: Tensor, theirs: Tensor) -> Tensor:
    """Kullback-Leibler, of logarithms of probabilities over the last axis."""
    return functional.kl_div(mine, theirs, reduction="none", log_target=True).sum(-1)


class QATTrainer(Trainer):  # type: ignore[misc]
    """A Trainer that knows about quantizers; everything else is as in transformers.

    Losses are means over a batch, and a step of accumulated batches takes their mean: that of one large batch where all
    have as many labels. A converted model must be calibrated: its ranges stay fixed while it is trained, or are
    learned, without weight decay, where :func:`~qdq_surgery.learn_ranges` or a rule's ``learn: true`` says so.

    Args:
        args, kwargs: As for ``transformers.Trainer``.
        teacher: A float model with the same head; the loss is then mixed with :func:`distillation_loss`, and of a batch
            without labels, as of plain texts, it is that alone; dropout is then off, as is gradient checkpointing.
        temperature: Of the distillation.
        distill_weight: The distillation's share of the loss, 0 to 1.

    Raises:
        CalibrationError: A quantizer has no range.
        ModelError: The teacher is the model itself, or quantized.
        OptionError: The temperature or the weight is out of range, or ``compute_loss_func`` is given beside a teacher.
    """

    def __init__(
        self,
        *args: Any,
        teacher: PreTrainedModel | None = None,
        temperature: float = 2.0,
        distill_weight: float = 0.5,
        **kwargs: Any,
    ) -> None:
        if temperature <= 0 or not 0 <= distill_weight <= 1:
            raise OptionError(
                f"temperature {temperature} must be above 0, and distill_weight {distill_weight} within 0 and 1"
            )
        super().__init__(*args, **kwargs)
        # A model that takes any keyword passes for one that divides its loss by the number of accumulated items. BERT's
        # heads do not, and an accumulated step would be too large. So losses are means, and Trainer divides.
        self.model_accepts_loss_kwargs = False
        if teacher is not None:
            if kwargs.get("compute_loss_func") is not None:
                raise OptionError("compute_loss_func and teacher both say what the loss is; give one of them")
            if teacher is self.model or quantizers(teacher):
                raise ModelError("the teacher has to be a float model of its own; load it again")
            teacher.to(self.args.device)
        self._teacher = teacher
        self._temperature, self._distill_weight = temperature, distill_weight
        for name, quantizer in quantizers(self.model).items():
            if quantizer.amax is None and quantizer.enabled:
                raise CalibrationError(
                    f"{name} has no range, so every batch would be quantized on a grid of its own: calibrate the model "
                    "before it is trained"
                )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any
    ) -> Any:
        """The loss of the labels, mixed with that of the teacher."""
        if self._teacher is None:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)
        counted = _counted(inputs)  # now: smoothing takes the labels out
        inside = {name: value for name, value in inputs.items() if "label" not in name}
        if not any(name in self.label_names or "label" in name for name in inputs):
            with _without_dropout(model):  # whose noise would be most of what the student differs by
                outputs = model(**inputs)
            alone = self._distillation(outputs, inside, counted)
            return (alone, outputs) if return_outputs else alone
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        distilled = self._distillation(outputs, inside, counted)
        mixed = (1.0 - self._distill_weight) * loss + self._distill_weight * distilled
        return (mixed, outputs) if return_outputs else mixed

    def _distillation(self, outputs: Any, inputs: dict[str, Any], counted: Tensor | None) -> Tensor:
        assert self._teacher is not None
        problem_type = getattr(self._teacher.config, "problem_type", None)
        return distillation_loss(outputs, self._wanted(inputs), self._temperature, counted, problem_type)

    def _wanted(self, inputs: dict[str, Any]) -> Any:
        """What the teacher says, in eval mode; afterwards it is as it was."""
        assert self._teacher is not None
        mode = self._teacher.training
        self._teacher.eval()
        try:
            with torch.no_grad():
                return self._teacher(**inputs)
        finally:
            self._teacher.train(mode)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The parameters with weight decay: those of transformers, but no range."""
        names = cast("list[str]", super().get_decay_parameter_names(model))
        return [name for name in names if not name.endswith("_quantizer._amax")]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; afterwards find the weights' ranges again where the rules say so."""
        result = super().train(*args, **kwargs)
        if quantizers(self.model):
            model = unwrapped(self.model)
            if plan_of(model).rules.calibration.recalibrate_weights:
                recalibrate_weights(model)
        return result


@contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    with kept_modes(model):
        model.eval()
        yield


def _counted(inputs: Mapping[str, Any]) -> Tensor | None:
    """Where tokens have a label, or at least are no padding; ``None`` where scores are for whole rows."""
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.ndim == 2 and not labels.is_floating_point():
        return labels != _IGNORED_LABEL
    mask = inputs.get("attention_mask")
    return mask != 0 if isinstance(mask, Tensor) else None
