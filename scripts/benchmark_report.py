"""Time the report of BERT-base: seconds to write it, its size, and seconds until a browser has loaded it.

    python scripts/benchmark_report.py [--layers 12] [--runs 3] [--keep report.html]

Random weights, calibrated on four batches with histograms; with the diff, an evaluation, and the sensitivity of every
site on a few tokens. Writing is timed from these results on, the first time in this process (which imports Bokeh) and
after that; loading in Chromium without a window, if Playwright and Chromium are installed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import BertConfig, BertModel

import qdq_surgery as qs
from browsers import chromium, open_page


def results(layers: int) -> tuple[Any, dict[str, Any]]:
    """The model and what a report shows of it."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(num_hidden_layers=layers)).eval()
    batches = [{"input_ids": torch.randint(1000, 20000, (4, 64))} for _ in range(4)]
    few = [{"input_ids": torch.randint(1000, 20000, (2, 8))}]
    qmodel = qs.convert(model)
    seen = qs.collect(qmodel, batches)
    qs.calibrate(qmodel, seen)
    made = {"diff": qs.diff(model, qmodel), "statistics": seen, "evaluation": qs.evaluate(qmodel, few)}
    return qmodel, {**made, "sensitivity": qs.sensitivity(qmodel, few)}


def seconds(action: Callable[[], object]) -> float:
    """How long something takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def loads(file: Path, runs: int) -> list[float]:
    """Seconds from the start of each navigation to the end of its load event."""
    found = []
    for _ in range(runs):
        with open_page(file) as page:
            found.append(page.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd") / 1e3)
    return found


def main() -> None:
    """Measure, and print one line for each figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the report here")
    arguments = parser.parse_args()
    qmodel, made = results(arguments.layers)
    with tempfile.TemporaryDirectory() as folder:
        file = arguments.keep or Path(folder) / "report.html"
        took = [seconds(lambda: qs.report(qmodel, file, **made, overwrite=True)) for _ in range(1 + arguments.runs)]
        print(f"{len(qs.quantizers(qmodel))} quantizers, {file.stat().st_size / 1e6:.2f} MB")
        print(f"written in {took[0]:.2f} s the first time, then in {statistics.median(took[1:]):.2f} s")
        if chromium() is None:
            print("not loaded: Playwright or Chromium is not installed")
            return
        print(f"loaded in {statistics.median(loads(file, arguments.runs)):.2f} s")


if __name__ == "__main__":
    main()
