"""The matrix as text for a terminal and as docs/versions.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from versions.environments import Row

__all__ = ["COLUMNS", "Outcome", "document", "failures", "printed"]

#: The steps, in the order in which they are done.
COLUMNS = ("import", "convert", "exact", "calibrate", "reload", "across", "export", "serve", "freeze", "compile")

#: What is right, by column.
_MEANINGS = {
    "import": "`import qdq_surgery`",
    "convert": "`convert` by the rules `qdqbert`: BERT, RoBERTa, DeBERTa-v2 with the options of the released v3 "
    "checkpoints, DistilBERT, ALBERT, ELECTRA and ModernBERT",
    "exact": "with the quantizers off, logits are equal to the original's to the bit",
    "calibrate": "every quantizer has a range",
    "reload": "saved and loaded again: ranges and logits are equal to the bit",
    "across": "a folder that the first row saved loads here, and one that was saved here loads there: ranges are equal "
    "to the bit, logits to 1e-5",
    "export": "`export_onnx`, with its certificate",
    "serve": "`load_onnx` on ONNX Runtime gives the logits",
    "freeze": "`freeze` on the CPU gives the logits, and after saving and loading the same to the bit",
    "compile": "`torch.compile` of the converted model and of the frozen one, as dynamo traces it, gives the logits",
}

#: What a step came to, by model; or why there is nothing, in one line.
Outcome = Mapping[str, Any] | str


def printed(rows: Sequence[Row], outcomes: Mapping[str, Outcome]) -> str:
    """The matrix in columns, then every failure in a line of its own."""
    lines: list[tuple[str, ...]] = [("python", "torch", "transformers", *COLUMNS)]
    for row in rows:
        lines.append((row.python, row.torch, row.transformers, *_cells(outcomes.get(row.name, "not run"))))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*table, *(f"{name}: {what}" for name, what in failures(rows, outcomes))])


def failures(rows: Sequence[Row], outcomes: Mapping[str, Outcome]) -> list[tuple[str, str]]:
    """What was not right, or could not be had: name of the row, and a line."""
    found: list[tuple[str, str]] = []
    for row in rows:
        outcome = outcomes.get(row.name, "not run")
        if isinstance(outcome, str):
            found.append((row.name, outcome))
            continue
        for step, cells in outcome["steps"].items():
            found += [(row.name, f"{step} {model}: {cell}") for model, cell in cells.items() if cell not in ("ok", "-")]
    return found


def document(rows: Sequence[Row], outcomes: Mapping[str, Outcome]) -> str:
    """The page docs/versions.md."""
    lines = [
        "# Versions",
        "",
        "What was run together, each row in an environment of its own, with the newest releases of everything else",
        "that pip finds for it. `bash scripts/test_versions.sh --write-page` makes the environments, runs the steps",
        "and writes this page; the rows are those of `scripts/versions/rows.json`. A cell says for how many models",
        "the step is right.",
        "",
        f"| Python | torch | transformers | {' | '.join(COLUMNS)} |",
        f"|---|---|---|{'--:|' * len(COLUMNS)}",
    ]
    for row in rows:
        cells = _cells(outcomes.get(row.name, "not run"))
        lines.append(f"| {row.python} | {row.torch} | {row.transformers} | {' | '.join(cells)} |")
    told = failures(rows, outcomes)
    if told:
        lines += ["", "What is not right, or was not run:", "", *(f"- {name}: {what}" for name, what in told)]
    lines += ["", "| column | what is right |", "|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {_MEANINGS[name]} |" for name in COLUMNS), ""])


def _cells(outcome: Outcome) -> list[str]:
    if isinstance(outcome, str):
        return ["-"] * len(COLUMNS)
    return [_cell(outcome["steps"].get(column, {})) for column in COLUMNS]


def _cell(models: Mapping[str, str]) -> str:
    if not models:
        return "-"
    right = sum(cell == "ok" for cell in models.values())
    if list(models) == [""]:
        return "ok" if right else "FAILED"
    return f"{right}" if right == len(models) else f"{right} of {len(models)}"
