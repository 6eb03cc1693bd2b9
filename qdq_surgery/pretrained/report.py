"""``qdq_report.json``: what was done to a saved model, for people; loading needs none of it but the calibration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from qdq_surgery.calibrate import CALIBRATION_ATTRIBUTE, Calibration
from qdq_surgery.converted import plan_of, quantizers
from qdq_surgery.layered import join_layers, star
from qdq_surgery.plan import Plan
from qdq_surgery.pretrained.record import versions

__all__ = ["REPORT_NAME", "calibration_of", "report_of", "restore_calibration", "write_report"]

REPORT_NAME = "qdq_report.json"


def report_of(qmodel: nn.Module) -> dict[str, Any]:
    """The report of a converted model, as JSON-able data."""
    plan = plan_of(qmodel)
    report: dict[str, Any] = {"versions": versions(), **plan.to_json(), "sites": _folded(plan)}
    calibration = calibration_of(qmodel)
    if calibration is not None:
        report["calibration"] = calibration.now(qmodel).to_json()
    report["disabled"] = [name for name, each in quantizers(qmodel).items() if not each.enabled]
    return report


def _folded(plan: Plan) -> list[dict[str, Any]]:
    """The sites, those that differ only in their layer as one."""
    found: dict[str, list[int]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for site in plan.sites:
        entry = {**site.to_json(), "quantizer": star(site.quantizer, site.layer), "layer": None}
        key = json.dumps(entry)
        entries[key] = entry
        found.setdefault(key, []).extend([] if site.layer is None else [site.layer])
    for key, entry in entries.items():
        del entry["layer"]
        entry["layers"] = join_layers(found[key]) if found[key] else None
    return list(entries.values())


def write_report(qmodel: nn.Module, folder: Path) -> None:
    """Write the report into ``folder``."""
    (folder / REPORT_NAME).write_text(json.dumps(report_of(qmodel), indent=2) + "\n", encoding="utf-8")


def restore_calibration(qmodel: nn.Module, files: Sequence[str]) -> None:
    """What the report beside a checkpoint's files says of the calibration, if one is there: read when asked for."""
    path = Path(files[0]).parent / REPORT_NAME if files else None
    if path is not None and path.is_file():
        vars(qmodel)[CALIBRATION_ATTRIBUTE] = path.read_text(encoding="utf-8")


def calibration_of(qmodel: nn.Module) -> Calibration | None:
    """What the model's last calibration did, here or before it was saved; ``None`` if that is not known."""
    made = vars(qmodel).get(CALIBRATION_ATTRIBUTE)
    if isinstance(made, str):
        try:
            made = Calibration.from_json(json.loads(made)["calibration"])
        except (KeyError, TypeError, ValueError):
            made = None  # never calibrated, or a report of another version
        if made is not None and not {each.quantizer for each in made.ranges} <= quantizers(qmodel).keys():
            made = None  # another head's: its names are others
        vars(qmodel)[CALIBRATION_ATTRIBUTE] = made
    return made
