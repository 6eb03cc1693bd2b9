"""``qdq_report.json``: what was done to a saved model, for people; loading needs none of it but the calibration."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn
from transformers.utils import logging

from qdq_surgery.calibration.ranges import Calibration, Range
from qdq_surgery.checkpoint.quantizer_states import versions
from qdq_surgery.match.plan import Plan
from qdq_surgery.safety.untrusted import DamagedError, Item, parse_json, read_regular_file
from qdq_surgery.surgery.model_state import CalibrationRecord, ModelState, plan_of, quantizers, set_state, state_of
from qdq_surgery.text.layer_names import by_layers, star

__all__ = ["REPORT_NAME", "calibration_of", "report_of", "restore_calibration", "write_report"]

REPORT_NAME = "qdq_report.json"

logger = logging.get_logger(__name__)

#: The longest report that is read; that of a model of 100 layers has half a megabyte.
_MOST_BYTES = 1 << 24

_COUNTS, _MOST_COUNT = ("batches", "rows", "tokens"), 1 << 62


def report_of(qmodel: nn.Module) -> dict[str, Any]:
    """The report of a converted model, as JSON-able data."""
    plan = plan_of(qmodel)
    report: dict[str, Any] = {"versions": versions(), **plan.to_json(), "sites": _folded(plan)}
    calibration = calibration_of(qmodel)
    if calibration is not None:
        report["calibration"] = calibration.now(qmodel).to_json()
    report["disabled"] = [name for name, each in quantizers(qmodel).items() if each._disabled]
    return report


def _folded(plan: Plan) -> list[dict[str, Any]]:
    """The sites, those that differ only in their layer as one."""
    entries = [{**site.to_json(), "quantizer": star(site.quantizer, site.layer)} for site in plan.sites]
    layers = [entry.pop("layer") for entry in entries]
    found = by_layers(zip((tuple(entry.items()) for entry in entries), layers, strict=True))
    return [{**dict(entry), "layers": where} for entry, where in found.items()]


def write_report(qmodel: nn.Module, folder: Path) -> None:
    """Write the report into ``folder``."""
    (folder / REPORT_NAME).write_text(json.dumps(report_of(qmodel), indent=2) + "\n", encoding="utf-8")


def restore_calibration(qmodel: nn.Module, files: Sequence[str]) -> None:
    """What the report beside a checkpoint's files says of the calibration, if one is there: parsed when asked for.

    Loading needs none of it: a report that cannot be read is none.
    """
    path = Path(files[0]).parent / REPORT_NAME if files else None
    if path is None or not path.exists():
        return
    try:
        set_state(qmodel, replace(state_of(qmodel), saved_report=read_regular_file(path, _MOST_BYTES)))
    except (OSError, DamagedError) as error:
        logger.warning(f"{REPORT_NAME} is not read: {error}; what it says of the calibration is lost")


def calibration_of(qmodel: nn.Module) -> CalibrationRecord | None:
    """What the model's last calibration did, here or before it was saved; ``None`` if that is not known."""
    state = state_of(qmodel)
    if state.saved_report is not None:
        state = ModelState(state.plan, _saved_calibration(state.saved_report, qmodel))
        set_state(qmodel, state)
    return state.calibration


def _saved_calibration(report: bytes, qmodel: nn.Module) -> Calibration | None:
    try:
        made = _calibration(parse_json(report, REPORT_NAME, _MOST_BYTES))
    except DamagedError:
        return None  # never calibrated, or a report of another version
    names = {each.quantizer for each in made.ranges}
    return made if names <= quantizers(qmodel).keys() else None  # or another head's: its names are others


def _calibration(report: Item) -> Calibration:
    entries = report.entries()
    if "calibration" not in entries:
        raise DamagedError(f"{report.where} has no calibration")
    fields = entries["calibration"].fields(("schema", "method", *_COUNTS, "ranges"))
    fields["schema"].one_of((1,))
    return Calibration(
        method=fields["method"].text(),
        ranges=tuple(map(_range, fields["ranges"].items())),
        **{name: fields[name].integer(0, _MOST_COUNT) for name in _COUNTS},
    )


def _range(item: Item) -> Range:
    fields = item.fields(("quantizer", "method", "amax", "error"))
    error = fields["error"]
    return Range(
        fields["quantizer"].text(),
        fields["method"].text(),
        fields["amax"].number(0.0, math.inf),
        None if error.value is None else error.number(0.0, math.inf),
    )
