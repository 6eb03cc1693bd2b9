"""What tuning found: the rules, the steps to them, and the figures."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qdq_surgery.onnx_file.writer import replace_text, writable
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.safety.given_flags import check_flags
from qdq_surgery.text.view import Column, Line, Part, Result, Table, data_words, line, number

__all__ = ["Step", "Tuning", "rule_file"]


def rule_file(path: str | Path, overwrite: bool = False) -> Path:
    """``path``, if a rule file can be written there.

    Raises:
        ExportError: It cannot; says why.
    """
    return writable(path, overwrite, "a rule file", ".yaml")


@dataclass(frozen=True)
class Step:
    """One change that was accepted.

    Attributes:
        what: The kind of sites, such as ``linear-inputs(x)``; or the operator that stays in float.
        change: From which spec to which, in words; or the share of the multiply-adds that stays in float.
        before, after: The error at the model's output.
    """

    what: str
    change: str
    before: float
    after: float


@dataclass(frozen=True, repr=False)
class Tuning(Result):
    """What :func:`~qdq_surgery.tuning.search.tune` found.

    Attributes:
        rules: For :func:`~qdq_surgery.convert.convert`; :meth:`save` writes them.
        base: The rules that it began with.
        metric: ``mse``, ``cosine`` or ``kl``; or the name of the user's function, of which an error is its fall.
        float_score: What the user's metric is for the float model; ``None`` with any other metric.
        start, error: The error by the rules that it began with, and by those that it found.
        steps: From the one to the other.
        budget: The error that was asked for, if one was.
        in_float: The share of the quantized operators' multiply-adds that ``rules`` leave in float.
        held_out: Both errors on other texts, if there were some.
        batches, rows, tokens: How much data it was; padding is no token.
    """

    rules: RuleSet
    base: str
    metric: str
    float_score: float | None
    start: float
    error: float
    steps: tuple[Step, ...]
    budget: float | None
    in_float: float
    held_out: tuple[float, float] | None
    batches: int
    rows: int
    tokens: int

    @property
    def met(self) -> bool:
        """Whether the error is within the budget; true without one."""
        return self.budget is None or self.error <= self.budget

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write the rule file.

        Args:
            path: The file, which ends in ``.yaml``.
            overwrite: Whether a file that is there is replaced.

        Raises:
            ExportError: It has another name, something is there, or whatever the system says.
            OptionError: ``overwrite`` is neither true nor false.
        """
        check_flags(overwrite=overwrite)
        replace_text(rule_file(path, overwrite), self.rules.text, overwrite)

    def to_json(self) -> dict[str, Any]:
        """As plain data; ``rules`` is the text of the rule file."""
        plain = {name: value for name, value in vars(self).items() if name not in ("rules", "steps")}
        return {"schema": 1, **plain, "met": self.met, "steps": list(map(asdict, self.steps)), "rules": self.rules.text}

    def _title(self) -> Line:
        data = data_words(self.batches, self.rows, self.tokens)
        whole = f"{self.metric} at the output {_shown(self.start)} by '{self.base}', {_shown(self.error)} by these"
        parts = [f"{whole} rules, on {data}"]
        if self.held_out is not None:
            parts.append(f"on other texts {_shown(self.held_out[0])} and {_shown(self.held_out[1])}")
        if self.in_float:
            parts.append(f"{100 * self.in_float:.2g} % of the multiply-adds in float")
        if not self.met:
            parts.append(f"the budget of {_shown(self.budget or 0.0)} is not met: this is the best that was found")
        return line("; ".join(parts))

    def _parts(self) -> Iterable[Part]:
        if not self.steps:
            yield "nothing lowered the error: the rules are as they were"
            return
        columns = (Column("what"), Column("change"), number("error before"), number("after"))
        rows = tuple((each.what, each.change, _shown(each.before), _shown(each.after)) for each in self.steps)
        yield Table(columns, rows)


def _shown(value: float) -> str:
    return f"{value:.4g}"
