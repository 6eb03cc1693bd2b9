"""Time from_pretrained of a quantized BERT-base, or of a frozen one, against that of the float model.

    python scripts/benchmark_load.py [--runs 15] [--processes 5] [--frozen]

Float and quantized take turns in one process; what counts is the ratio of the medians. Then the same with a fresh
process for each loading (imports not counted), and the first forward after loading, in which the quantized model
records its graphs. Both are loaded by the auto class from files that the operating system has in memory. ``--frozen``:
the other model is frozen, by the rules ``pytorch``.
"""

from __future__ import annotations

import argparse
import functools
import gc
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from absl import logging as absl_logging
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs

_CHILD = """
import sys, time
import transformers, qdq_surgery
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
start = time.perf_counter()
model = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
print(time.perf_counter() - start)
"""


def timed(action: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    made = action()
    elapsed = time.perf_counter() - start
    del made  # to give memory back is no part of loading
    return elapsed


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder)
    return model


def in_a_process(folder: Path) -> float:
    made = subprocess.run([sys.executable, "-c", _CHILD, str(folder)], capture_output=True, text=True, check=True)
    return float(made.stdout.split()[-1])


def forwards(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The first forward and the one after it."""
    with torch.no_grad():
        return timed(lambda: model(**batch)), timed(lambda: model(**batch))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=15, help="loadings of each in one process")
    parser.add_argument("--processes", type=int, default=5, help="loadings of each in a process of its own")
    parser.add_argument("--frozen", action="store_true", help="a frozen model in place of a quantized one")
    arguments = parser.parse_args()
    other = "frozen" if arguments.frozen else "quantized"
    absl_logging.set_verbosity(absl_logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    torch.manual_seed(0)
    batch = {"input_ids": torch.randint(1000, 20000, (8, 128)), "attention_mask": torch.ones(8, 128, dtype=torch.long)}
    with tempfile.TemporaryDirectory() as temporary:
        plain, quantized = Path(temporary) / "float", Path(temporary) / other
        model = BertForSequenceClassification(BertConfig()).eval()
        model.save_pretrained(plain)
        qs.convert(model, "pytorch" if arguments.frozen else "qdqbert", inplace=True)
        qs.calibrate(model, [batch])
        if arguments.frozen:
            qs.freeze(model, inplace=True)
        model.save_pretrained(quantized)
        del model
        folders = {"float": plain, other: quantized}
        load(plain), load(quantized)
        warm: dict[str, list[float]] = {name: [] for name in folders}
        for _ in range(arguments.runs):
            for name, folder in folders.items():
                warm[name].append(timed(functools.partial(load, folder)))
        fresh: dict[str, list[float]] = {name: [] for name in folders}
        for _ in range(arguments.processes):
            for name, folder in folders.items():
                fresh[name].append(in_a_process(folder))
        calls: dict[str, list[tuple[float, float]]] = {name: [] for name in folders}
        for _ in range(3):
            for name, folder in folders.items():
                calls[name].append(forwards(load(folder), batch))
        sizes = {name: sum(file.stat().st_size for file in folder.iterdir()) for name, folder in folders.items()}
    table = Table(
        title=f"BERT-base, {torch.get_num_threads()} threads, medians ({arguments.runs} loadings of each in one "
        f"process, {arguments.processes} in processes of their own)",
        title_justify="left",
    )
    for column in ("what", *folders, "ratio"):
        table.add_column(column, justify="left" if column == "what" else "right")
    rows = {
        "from_pretrained": warm,
        "the same, first in its process": fresh,
        "first forward, 8 x 128": {name: [first for first, _ in values] for name, values in calls.items()},
        "second forward": {name: [second for _, second in values] for name, values in calls.items()},
    }
    for what, found in rows.items():
        medians = [statistics.median(found[name]) for name in folders]
        table.add_row(what, *(f"{1000 * value:.1f} ms" for value in medians), f"{medians[1] / medians[0]:.2f}")
    table.add_row(
        "files",
        *(f"{size / 1e6:.1f} MB" for size in sizes.values()),
        f"{sizes[other] / sizes['float']:.3f}",
    )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
