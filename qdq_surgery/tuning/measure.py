"""The error of a model at its output, on batches whose float outputs are kept."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from qdq_surgery.calibration.batches import NO_BATCHES, counted, prepared
from qdq_surgery.errors import CalibrationError
from qdq_surgery.sensitivity.borrowed import gpus_of, run_seeded
from qdq_surgery.sensitivity.output_error import Judge, Metric, judge_of
from qdq_surgery.surgery.model_state import quantization_disabled

__all__ = ["Measure"]


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
        self._devices = gpus_of(qmodel)
        self._runs: list[tuple[dict[str, Any], Judge]] = []
        self.rows = self.tokens = 0
        sums = []
        with quantization_disabled(qmodel):
            for index, batch in enumerate(batches):
                inputs, judge = prepared(qmodel, batch, index), judge_of(metric)
                sums.append(self._figure(index, inputs, functools.partial(judge.begin, qmodel, inputs)))
                rows, tokens = counted(inputs)
                self.rows, self.tokens = self.rows + rows, self.tokens + tokens
                self._runs.append((inputs, judge))
        if not sums:
            raise CalibrationError(NO_BATCHES)
        judge = self._runs[0][1]
        self.name, self.batches = judge.name, len(sums)
        self.float_score = _mean(sums) if judge.own else None

    def error(self) -> float:
        """The metric against the float model; of a user's own, by how much it falls."""
        value = _mean([self._figure(index, inputs, judge.figure) for index, (inputs, judge) in enumerate(self._runs)])
        return value if self.float_score is None else self.float_score - value

    def _figure(self, index: int, inputs: dict[str, Any], figure: Callable[[Any], tuple[float, float]]) -> Any:
        try:
            return figure(self._run(inputs))
        except CalibrationError as error:
            raise CalibrationError(f"batch {index}: {error}") from None

    def _run(self, inputs: dict[str, Any]) -> Any:
        with torch.no_grad():
            return run_seeded(self._qmodel, inputs, self._devices)


def _mean(sums: list[tuple[float, float]]) -> float:
    weight = math.fsum(weight for _, weight in sums)
    return math.fsum(total for total, _ in sums) / weight if weight else 0.0
