"""Step by step from a target's rules to those that keep a model's output best."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qdq_surgery.calibration.batches import check_batches
from qdq_surgery.convert import convert
from qdq_surgery.errors import CalibrationError, OptionError
from qdq_surgery.numerics.real_numbers import is_number
from qdq_surgery.rules.limits import MAX_ENTRIES, check_name
from qdq_surgery.rules.quant_spec import QuantSpec
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.rules.yaml_file import load_rules
from qdq_surgery.sensitivity.output_error import Metric
from qdq_surgery.targets.registry import DEFAULT
from qdq_surgery.text.progress import track
from qdq_surgery.tuning.candidates import grids, ranges
from qdq_surgery.tuning.measure import Measure
from qdq_surgery.tuning.result import Step, Tuning
from qdq_surgery.tuning.trial import Kind, Operator, Trial
from qdq_surgery.tuning.tuned_rules import LEFT_AT_MOST, tuned_rules

__all__ = ["tune"]

#: An error has to fall by this share of itself: less is luck, and a rule more to read.
_LEAST = 0.005


def tune(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    target: str | Path | RuleSet = DEFAULT,
    budget: float | None = None,
    *,
    metric: str | Metric | None = None,
    held_out: Iterable[Mapping[str, Any]] | None = None,
    float_share: float = 0.1,
    name: str | None = None,
) -> Tuning:
    """Find the ranges, scales and grids that keep a model's output best, and write them as a rule file.

    It begins with a target's rules. For each kind of sites (one operand of one rule, in all layers), the costliest
    first, it tries the range methods, the scales where the rules give scales and the zero points where they have one,
    and keeps what lowers the error at the model's output most. None of these costs time in the deployed file. Only if a
    budget is not met by then are operators left in float: adds first, which have no multiply-adds, then what gains most
    for its share of them.

    Args:
        model: A model that is not converted. It is left as it was.
        batches: Keyword arguments of the model's forward, such as a tokenizer gives: what is calibrated on, and what
            the error is measured on. They are kept in memory.
        target: The rules to begin with: ``onnxruntime``, ``openvino``, ``tensorrt``, any other rule set or file.
        budget: The most that the error may be, in the metric's units. Left out, no operator is left in float.
        metric: As :func:`~qdq_surgery.sensitivity.measure.sensitivity` takes it; ``"mse"`` if left out.
        held_out: Other batches, on which both errors are reported and nothing is chosen.
        float_share: The largest share of the quantized operators' multiply-adds that may be left in float.
        name: What the rule set is called; that of the target's with ``-tuned`` if left out.

    Returns:
        The rules, the steps and the figures. Whether the budget is met is said there, and is no error.

    Raises:
        AlreadyConvertedError: The model is converted.
        CalibrationError: There are no batches, or one cannot be used.
        MatchError, RuleFileError: The rules do not fit the model, or are wrong.
        OptionError: The budget, the metric or ``float_share`` is none.
    """
    if budget is not None and not (is_number(budget) and budget >= 0):
        raise OptionError(f"budget={budget!r} is no error: give a number of at least 0, or leave it out")
    if not (is_number(float_share) and 0 <= float_share <= 1):
        raise OptionError(f"float_share={float_share!r} is no share: give a number from 0 to 1")
    check_batches(batches)
    if held_out is not None:
        check_batches(held_out, "held_out")
    if name is not None and not (isinstance(name, str) and name.strip()):
        raise OptionError(f"name={name!r} is no name of a rule set: give a text, or leave it out")
    budget, float_share = None if budget is None else float(budget), float(float_share)
    base = load_rules(target)
    wanted = f"{base.name}-tuned" if name is None else str(name)
    check_name(wanted, "the name")  # not when all is done
    data, others = list(batches), None if held_out is None else list(held_out)
    qmodel = convert(model, base).eval()
    trial = Trial(qmodel, data)
    measure = Measure(qmodel, data, metric)
    held = None if others is None else _held_out(qmodel, others, metric)
    search = _Search(trial, measure, budget, float_share, min(LEFT_AT_MOST, MAX_ENTRIES - len(base.exclude)))
    start, start_held = search.error, None if held is None else held.error()
    for _ in track(search.steps(), "tuning", search.total):
        pass
    why = f"{base.name}, tuned on {measure.rows} rows: {measure.name} {start:.4g} before, {search.error:.4g} after"
    if held is not None and start_held is not None:
        ended = held.error()
        why = f"{why}; on others {start_held:.4g} and {ended:.4g}"
    rules = tuned_rules(base, wanted, why, search.specs, search.left)
    return Tuning(
        rules=rules,
        base=base.name,
        metric=measure.name,
        float_score=measure.float_score,
        start=start,
        error=search.error,
        steps=tuple(search.taken),
        budget=budget,
        in_float=search.share(),
        held_out=None if held is None or start_held is None else (start_held, ended),
        batches=measure.batches,
        rows=measure.rows,
        tokens=measure.tokens,
    )


def _held_out(qmodel: PreTrainedModel, batches: list[Mapping[str, Any]], metric: str | Metric | None) -> Measure:
    try:
        return Measure(qmodel, batches, metric)
    except CalibrationError as error:
        raise CalibrationError(f"held_out: {error}") from error


@dataclass
class _Search:
    """Where the search has come to.

    Attributes:
        specs: The kinds that have another spec by now, each with the reason.
        left: The operators that are left in float by now, each with the reason.
        taken: The steps.
    """

    trial: Trial
    measure: Measure
    budget: float | None
    float_share: float
    most_left: int
    specs: dict[Kind, tuple[QuantSpec, str]] = field(default_factory=dict)
    left: list[tuple[Operator, str]] = field(default_factory=list)
    taken: list[Step] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.error = self.measure.error()
        self.kinds = self.trial.kinds()
        self.operators = self.trial.operators()
        self.work = sum(each.work for each in self.operators)

    @property
    def total(self) -> int:
        """How many errors are measured at most, without a budget."""
        specs = ((self.trial.spec(kind), kind.role) for kind in self.kinds)
        return len(self.kinds) + sum(len(ranges(spec, role)) + len(grids(spec)) for spec, role in specs)

    def share(self, more: int = 0) -> float:
        """The share of the multiply-adds that is in float, with ``more`` of them."""
        return (sum(operator.work for operator, _ in self.left) + more) / max(1, self.work)

    def steps(self) -> Iterator[None]:
        """The search; comes back for each error that it has measured."""
        gains = {}
        for kind in self.kinds:
            with self.trial.in_float(kind.quantizers):
                gains[kind] = self.error - self.measure.error()
            yield
        for kind in sorted(self.kinds, key=lambda kind: -gains[kind]):
            yield from self._best(kind, ranges(self.trial.spec(kind), kind.role))
            yield from self._best(kind, grids(self.trial.spec(kind)))
        if self.budget is not None:
            yield from self._meet(self.budget)

    def _meet(self, budget: float) -> Iterator[None]:
        """Leave operators in float until the budget is met or none of them helps."""
        known = -1
        while self.error > budget and known < len(self.left):
            known = len(self.left)
            yield from self._leave_in_float(budget)

    def _best(self, kind: Kind, specs: Iterable[QuantSpec]) -> Iterator[None]:
        """Give a kind the spec with the smallest error, if that is smaller than it is."""
        errors = []
        for spec in specs:
            with self.trial.tried(kind, spec):
                errors.append((self.measure.error(), spec))
            yield
        if not errors:
            return
        error, spec = min(errors, key=lambda found: found[0])
        if error >= self.error - _LEAST * abs(self.error):
            return
        change = f"{self.trial.spec(kind)} -> {spec}"
        self.trial.take(kind, spec)
        before = self.specs.get(kind, (spec, ""))[1]
        reason = f"{kind.capture} by {spec}: {self.error:.4g} -> {error:.4g}"
        self.specs[kind] = (spec, "; ".join(filter(None, (before, reason))))
        self._step(str(kind), change, error)

    def _leave_in_float(self, budget: float) -> Iterator[None]:
        """Leave those in float that help, as it is now; those that gain most for their work first."""
        done = {operator for operator, _ in self.left}
        gains: list[tuple[float, Operator]] = []
        for operator in self.operators:
            if operator not in done and self.share(operator.work) <= self.float_share:
                with self.trial.in_float(operator.quantizers):
                    gains.append((self.error - self.measure.error(), operator))
                yield
        # An add costs nothing, so that what it gains is for free.
        gains.sort(key=lambda found: (found[1].work > 0, -found[0] / max(1, found[1].work)))
        for gain, operator in gains:
            if self.error <= budget or len(self.left) >= self.most_left:
                return
            if gain <= 0 or self.share(operator.work) > self.float_share:
                continue
            with self.trial.in_float(operator.quantizers):
                error = self.measure.error()
            yield
            if error < self.error:
                self.trial.leave_in_float(operator.quantizers)
                work = f"{100 * operator.work / max(1, self.work):.2g} % of the multiply-adds"
                self.left.append((operator, f"in float {self.error:.4g} -> {error:.4g}, {work}"))
                self._step(f"{operator.owner} ({operator.operator})", f"left in float, {work}", error)

    def _step(self, what: str, change: str, error: float) -> None:
        self.taken.append(Step(what, change, self.error, error))
        self.error = error
