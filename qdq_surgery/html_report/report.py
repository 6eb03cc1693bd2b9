"""The report of a conversion: one HTML file with all that is known of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from qdq_surgery.calibration.collect import Statistics, unwrapped
from qdq_surgery.calibration.equalization import Equalization
from qdq_surgery.calibration.rounding import Rounding
from qdq_surgery.html_report.cards import cards_of
from qdq_surgery.html_report.given import Given, check_fit, check_kinds
from qdq_surgery.html_report.sections import Missing, missing
from qdq_surgery.onnx_export import Export
from qdq_surgery.onnx_file.writer import replace_text, writable
from qdq_surgery.onnx_graph.findings import Findings
from qdq_surgery.prove.parity import Parity
from qdq_surgery.prove.receipt import Receipt
from qdq_surgery.report.diff import Diff
from qdq_surgery.safety.given_flags import check_flags
from qdq_surgery.sensitivity.evaluate import Evaluation
from qdq_surgery.sensitivity.result import Sensitivity
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.text.optional_imports import require
from qdq_surgery.text.view import Column, Line, Part, Result, Table, line
from qdq_surgery.tuning.result import Tuning

__all__ = ["Report", "report"]


@dataclass(frozen=True, repr=False)
class Report(Result):
    """The report that was written.

    Attributes:
        path: The file.
        size: Its bytes.
        quantizers: How many it shows.
        given: The results that it shows, by the names of the arguments.
        missing: Those that it says are missing.
    """

    path: Path
    size: int
    quantizers: int
    given: tuple[str, ...]
    missing: tuple[Missing, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain data, the path as it was given; ``schema`` is the version of this form."""
        absent = {each.name: each.call for each in self.missing}
        made = {"path": str(self.path), "size": self.size, "quantizers": self.quantizers}
        return {"schema": 1, **made, "given": list(self.given), "missing": absent}

    def _title(self) -> Line:
        return line((self.path.name, "bold"), f": {self.quantizers} quantizers, {self.size / 1e6:.2f} MB")

    def _parts(self) -> Iterable[Part]:
        yield f"with {', '.join(self.given)}" if self.given else "with the model alone"
        if self.missing:
            rows = tuple((each.name, each.call) for each in self.missing)
            yield Table((Column("not given", wraps=False), Column("what makes it")), rows)


def report(
    qmodel: nn.Module,
    path: str | Path,
    *,
    diff: Diff | None = None,
    statistics: Statistics | None = None,
    sensitivity: Sensitivity | None = None,
    evaluation: Evaluation | None = None,
    export: Export | None = None,
    receipt: Receipt | None = None,
    parity: Parity | None = None,
    findings: Findings | None = None,
    rounding: Rounding | None = None,
    equalization: Equalization | None = None,
    tuning: Tuning | None = None,
    times: Mapping[str, float] | None = None,
    title: str | None = None,
    overwrite: bool = False,
) -> Report:
    """Write all that is known of a conversion as one HTML file, which a browser opens without a network.

    The file shows the results that it is given, each as its own text does, and says of the others what makes them.
    Nothing is measured here, and the model is only read.

    Args:
        qmodel: A converted model, alone or in DistributedDataParallel, ``torch.compile`` or a PEFT model.
        path: The file to write, which ends in ``.html``.
        diff: The graphs before and after, with the float model: ``qs.diff(model, qmodel)``.
        statistics: What the quantizers saw, for histograms: ``qs.collect(qmodel, batches)``.
        sensitivity: What each part costs at the output: ``qs.sensitivity(qmodel, batches)``.
        evaluation: What is lost against float: ``qs.evaluate(qmodel, batches)``, or of a file.
        export: The file: ``qs.export_onnx(qmodel, "model.onnx")``, with its certificate and findings.
        receipt: What of the file runs in INT8: ``qs.receipt("model.onnx")``.
        parity, findings: Of the file, where they are others than those of ``export``.
        rounding, equalization, tuning: What :func:`qdq_surgery.round_weights`, :func:`qdq_surgery.equalize` and
            :func:`qdq_surgery.tune` returned.
        times: Seconds by the name of a step, to be shown.
        title: The heading; left out, the model's class.
        overwrite: Whether a file that exists is replaced, when the new one is complete.

    Returns:
        What was written, and what it lacks.

    Raises:
        ExportError: The file cannot be written, or is there already.
        ModelError: The model is not converted, a result is of another model, or a package is missing; says which extra
            has it.
        OptionError: An argument is something else than it should be.
    """
    check_flags(overwrite=overwrite)
    file = writable(path, overwrite, "a report", ".html")
    for package in ("bokeh", "jinja2"):
        require(package, "a report", "report")
    given = Given(
        diff,
        statistics,
        sensitivity,
        evaluation,
        export,
        receipt,
        parity,
        findings,
        rounding,
        equalization,
        tuning,
        times or None,
    )
    check_kinds(given)
    model = unwrapped(qmodel)
    check_fit(model, given)
    # They need the extra, and a second to be imported.
    from qdq_surgery.html_report.contents import page_of

    cards = cards_of(model, given)
    text = page_of(model, given, cards, title or plan_of(model).model)
    replace_text(file, text, overwrite)
    shown = tuple(name for name, value in vars(given).items() if value is not None)
    return Report(file, len(text.encode()), len(cards), shown, missing(given))
