"""What a report is made of: the results of other calls, and which of them are there."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, fields

from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import Statistics, planned_name
from qdq_surgery.calibration.equalization import Equalization
from qdq_surgery.calibration.rounding import Rounding
from qdq_surgery.errors import ModelError, OptionError
from qdq_surgery.numerics.real_numbers import is_number
from qdq_surgery.onnx_export import Export
from qdq_surgery.onnx_graph.findings import Findings
from qdq_surgery.prove.parity import Parity
from qdq_surgery.prove.receipt import Receipt
from qdq_surgery.report.diff import Diff
from qdq_surgery.sensitivity.evaluate import Evaluation
from qdq_surgery.sensitivity.parts import SITE
from qdq_surgery.sensitivity.result import Sensitivity
from qdq_surgery.surgery.model_state import quantizers
from qdq_surgery.tuning.result import Tuning

__all__ = ["MAKERS", "Given", "check_fit", "check_kinds"]

#: By the name of a result: its class, and the call that makes it.
MAKERS: Mapping[str, tuple[type, str]] = {
    "diff": (Diff, "qs.diff(model, qmodel)"),
    "statistics": (Statistics, "qs.collect(qmodel, batches)"),
    "sensitivity": (Sensitivity, "qs.sensitivity(qmodel, batches)"),
    "evaluation": (Evaluation, "qs.evaluate(qmodel, batches)"),
    "export": (Export, 'qs.export_onnx(qmodel, "model.onnx")'),
    "receipt": (Receipt, 'qs.receipt("model.onnx")'),
    "parity": (Parity, 'qs.certify(qmodel, "model.onnx", inputs)'),
    "findings": (Findings, 'qs.lint("model.onnx")'),
    "rounding": (Rounding, "qs.round_weights(qmodel, batches)"),
    "equalization": (Equalization, "qs.equalize(qmodel, batches)"),
    "tuning": (Tuning, "qs.tune(model, batches)"),
}


@dataclass(frozen=True)
class Given:
    """The results of a report; what nobody gave is ``None``."""

    diff: Diff | None = None
    statistics: Statistics | None = None
    sensitivity: Sensitivity | None = None
    evaluation: Evaluation | None = None
    export: Export | None = None
    receipt: Receipt | None = None
    parity: Parity | None = None
    findings: Findings | None = None
    rounding: Rounding | None = None
    equalization: Equalization | None = None
    tuning: Tuning | None = None
    times: Mapping[str, float] | None = None


def check_kinds(given: Given) -> None:
    """Whether each result is what it is given as.

    Raises:
        OptionError: One is something else.
    """
    for name, (kind, call) in MAKERS.items():
        found = getattr(given, name)
        if found is not None and not isinstance(found, kind):
            raise OptionError(f"{name}= is a {type(found).__name__}; give what {call} returns, or leave it out")
    for name, seconds in (given.times or {}).items():
        if not (is_number(seconds) and 0 <= seconds < math.inf):
            raise OptionError(f"times= has {seconds!r} for {name!r}; give seconds, from 0 on")


def check_fit(model: PreTrainedModel, given: Given) -> None:
    """Whether the results are of this model, as far as they name its quantizers or modules.

    Raises:
        ModelError: One names a quantizer that the model does not have, or none of its modules.
    """
    known = {planned_name(name, each) for name, each in quantizers(model).items()} | quantizers(model).keys()
    for what, names in _named(given):
        other = sorted(set(names) - known)
        if other:
            raise ModelError(
                f"{what}= is of another model: this {type(model).__name__} has no quantizer {other[0]}; make it from "
                f"this one, {MAKERS[what][1]}"
            )
    gemms = () if given.receipt is None else given.receipt.gemms
    modules = sorted({each.module for each in gemms if each.kind == "linear" and each.module})
    if modules and not {name for name, _ in model.named_modules(remove_duplicate=False)}.intersection(modules):
        raise ModelError(
            f"receipt= is of another model: this {type(model).__name__} has no module {modules[0]}; make it from a "
            "file of this one, qs.receipt(path)"
        )


def _named(given: Given) -> Iterator[tuple[str, Collection[str]]]:
    """By result, the quantizers that it names."""
    if given.diff is not None:
        yield "diff", [site.quantizer for site in given.diff.plan.sites]
    if given.statistics is not None:
        yield "statistics", given.statistics.seen.keys()
    if given.sensitivity is not None:
        yield "sensitivity", [cost.name for cost in given.sensitivity.of(SITE) if "*" not in cost.name]
    if given.rounding is not None:
        yield "rounding", [each.quantizer for each in given.rounding.weights]
    if given.equalization is not None:
        yield "equalization", [each.quantizer for each in given.equalization.scales]
    if given.parity is not None:
        yield "parity", [site.quantizer for check in given.parity.checks for site in check.sites]
    if given.export is not None:
        yield "export", [name for site in given.export.sites for name in site.quantizers]


assert {*MAKERS, "times"} == {each.name for each in fields(Given)}
