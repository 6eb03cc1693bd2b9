"""The error of a model at its output, on batches whose float outputs are kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from qdq_surgery.calibration.batches import NO_BATCHES, counted, prepared
from qdq_surgery.errors import CalibrationError
from qdq_surgery.safety.random_state import kept_random
from qdq_surgery.sensitivity.output_error import Judge, Metric, judge_of
from qdq_surgery.surgery.model_state import quantization_disabled

__all__ = ["Measure"]

_SEED = 0


class Measure:
    """What a converted model, in eval mode, loses against itself in float.

    Args:
        qmodel: The model.
        batches: Keyword arguments of its forward.
        metric: As :func:`~qdq_surgery.sensitivity.measure.sensitivity` takes it.

    Attributes:
        name: Of the metric.
        float_score: Of the float model by a user's own metric; ``None`` with any other.
        batches, rows, tokens: How much data it is; padding is no token.

    Raises:
        CalibrationError: There are no batches, or one cannot be used.
        OptionError: The metric is none, or not for such a model.
    """

    def __init__(
        self, qmodel: PreTrainedModel, batches: Iterable[Mapping[str, Any]], metric: str | Metric | None
    ) -> None:
        self._qmodel = qmodel
        self._devices = sorted({p.device for p in qmodel.parameters() if p.device.type == "cuda"}, key=str)
        self._runs: list[tuple[dict[str, Any], Judge]] = []
        self.rows = self.tokens = 0
        sums = []
        with quantization_disabled(qmodel):
            for index, batch in enumerate(batches):
                inputs, judge = prepared(qmodel, batch, index), judge_of(metric)
                sums.append(self._begun(index, inputs, judge))
                rows, tokens = counted(inputs)
                self.rows, self.tokens = self.rows + rows, self.tokens + tokens
                self._runs.append((inputs, judge))
        if not sums:
            raise CalibrationError(NO_BATCHES)
        judge = self._runs[0][1]
        self.name, self.batches = judge.name, len(sums)
        self.float_score = _mean(sums) if judge.own else None

    @property
    def inputs(self) -> list[dict[str, Any]]:
        """The batches as the model is called with them."""
        return [inputs for inputs, _ in self._runs]

    def error(self) -> float:
        """The metric against the float model; of a user's own, by how much it falls."""
        value = _mean([self._figure(index, *run) for index, run in enumerate(self._runs)])
        return value if self.float_score is None else self.float_score - value

    def _begun(self, index: int, inputs: dict[str, Any], judge: Judge) -> tuple[float, float]:
        try:
            return judge.begin(self._qmodel, inputs, self._run(inputs))
        except CalibrationError as error:
            raise CalibrationError(f"batch {index}: {error}") from None

    def _figure(self, index: int, inputs: dict[str, Any], judge: Judge) -> tuple[float, float]:
        try:
            return judge.figure(self._run(inputs))
        except CalibrationError as error:
            raise CalibrationError(f"batch {index}: {error}") from None

    def _run(self, inputs: dict[str, Any]) -> Any:
        try:
            with torch.no_grad(), kept_random(self._devices):
                torch.manual_seed(_SEED)
                return self._qmodel(**inputs)
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise CalibrationError(f"{type(self._qmodel).__name__} cannot run it: {error}") from error


def _mean(sums: list[tuple[float, float]]) -> float:
    weight = math.fsum(weight for _, weight in sums)
    return math.fsum(total for total, _ in sums) / weight if weight else 0.0
