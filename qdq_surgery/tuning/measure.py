"""The error of a model at its output, on batches whose float outputs are kept."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from qdq_surgery.calibration.batches import NO_BATCHES, counted
from qdq_surgery.errors import CalibrationError
from qdq_surgery.sensitivity.output_error import Judge, Metric, judge_of
from qdq_surgery.sensitivity.runs.borrowed import gpus_of, run_seeded
from qdq_surgery.sensitivity.runs.length_groups import Group, length_groups
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
        self._runs: list[tuple[Group, Judge]] = []
        self.rows = self.tokens = 0
        sums = []
        with quantization_disabled(qmodel):
            for group in length_groups(qmodel, batches, None if judge_of(metric).own else self._run):
                judge = judge_of(metric)
                sums.append(self._figure(group, functools.partial(judge.begin, qmodel, group.inputs)))
                rows, tokens = counted(group.inputs)
                self.rows, self.tokens = self.rows + rows, self.tokens + tokens
                self._runs.append((group, judge))
        if not sums:
            raise CalibrationError(NO_BATCHES)
        judge = self._runs[0][1]
        self.name, self.batches = judge.name, round(sum(group.batches for group, _ in self._runs))
        self.float_score = _mean(sums) if judge.own else None

    def error(self) -> float:
        """The metric against the float model; of a user's own, by how much it falls."""
        value = _mean([self._figure(group, judge.figure) for group, judge in self._runs])
        return value if self.float_score is None else self.float_score - value

    def _figure(self, group: Group, figure: Callable[[Any], tuple[float, float]]) -> Any:
        try:
            return figure(self._run(group.inputs))
        except CalibrationError as error:
            raise CalibrationError(f"{group.name}: {error}") from None

    def _run(self, inputs: Mapping[str, Any]) -> Any:
        with torch.no_grad():
            return run_seeded(self._qmodel, inputs, self._devices)


def _mean(sums: list[tuple[float, float]]) -> float:
    weight = math.fsum(weight for _, weight in sums)
    return math.fsum(total for total, _ in sums) / weight if weight else 0.0
