"""Time calibration and training against the float model and pytorch-quantization; prints one table.

    python scripts/benchmark_calibration.py [--runs 5] [--reference 3] [--compile]
    python scripts/benchmark_calibration.py --tools

BERT-base, 8 rows of 128 tokens. Everything is measured in one process, interleaved, and given as medians; what counts
are the ratios. Computing the ranges of all activation quantizers is timed whole; pytorch-quantization's entropy, which
takes minutes for all, is timed on ``--reference`` of them with the same histograms, and its bins are compared.

With ``--tools`` instead: scales and adapted rounding of BERT-base from 32 such batches, and of the real
all-MiniLM-L6-v2 from 256 texts rounding, ``sensitivity`` and ``tune``. Each is timed once, scales twice; some ten
minutes in all.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from absl import logging as absl_logging
from pytorch_quantization import calib
from pytorch_quantization.calib import histogram as reference
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, BertModel
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs
from qdq_surgery.calibration.collect import activation_quantizers
from qdq_surgery.cli.demo.files import checkpoint
from qdq_surgery.cli.demo.run import token_batches
from qdq_surgery.cli.folder import load_model
from qdq_surgery.numerics.range_methods import entropy_amax, mse_amax, percentile_amax
from qdq_surgery.texts.standard_library import standard_library_texts

ROWS, TOKENS = 8, 128


def timed(action: Callable[[], object]) -> float:
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def medians(jobs: dict[str, Callable[[], object]], runs: int) -> dict[str, float]:
    """Median seconds of each job; the jobs take turns, and the first turn is not counted."""
    found: dict[str, list[float]] = {name: [] for name in jobs}
    for turn in range(runs + 1):
        for name, job in jobs.items():
            seconds = timed(job)
            if turn:
                found[name].append(seconds)
    return {name: statistics.median(each) for name, each in found.items()}


def step(model: Callable[..., Any], optimizer: torch.optim.Optimizer, batch: dict[str, Any]) -> None:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def reference_collect(qmodel: nn.Module, calibrators: dict[str, Any], batch: dict[str, Any]) -> None:
    """A calibration forward with pytorch-quantization's own calibrators in the same places."""
    quantizers = qs.quantizers(qmodel)
    before = {name: each._calibrator for name, each in quantizers.items()}
    for name, each in quantizers.items():
        each._if_quant, each._if_calib, each._calibrator = False, name in calibrators, calibrators.get(name)
    with torch.no_grad():
        qmodel(**batch)
    for name, each in quantizers.items():
        each._if_quant, each._if_calib, each._calibrator = True, False, before[name]


def ranges(table: Table, stats: qs.Statistics, compared: int) -> None:
    """All methods on all histograms; the reference on some of them."""
    tables = [seen.histogram.table() for seen in stats.seen.values() if seen.histogram is not None]

    def everything() -> list[tuple[float, float, float]]:
        return [(entropy_amax(*each), mse_amax(*each), percentile_amax(*each, 99.99)) for each in tables]

    everything()
    seconds = statistics.median(timed(everything) for _ in range(3))
    table.add_row(f"entropy, mse and percentile of {len(tables)} quantizers", f"{seconds:.2f} s", "at most 2 s")
    own, theirs = [], []
    start = time.perf_counter()
    for counts, edges in tables[:: max(1, len(tables) // compared)][:compared]:
        theirs.append(float(reference._compute_amax_entropy(counts.numpy().copy(), edges.numpy(), 8, False)))
        own.append(entropy_amax(counts, edges))
    spent = (time.perf_counter() - start) * len(tables) / len(own)
    same = sum(abs(a - b) <= 1e-6 * b for a, b in zip(own, theirs, strict=True))
    table.add_row(f"pytorch-quantization's entropy, {len(tables)} times one of {len(own)}", f"{spent:.0f} s", "")
    table.add_row("of these, the same bin", f"{same} of {len(own)}", f"{len(own)} of {len(own)}")


def tools() -> Table:
    """What comes after collecting, each timed once."""
    table = Table(title="tools", box=None)
    for column in ("what", "measured", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    generator = torch.Generator().manual_seed(0)
    size = (ROWS, TOKENS)
    batches = [{"input_ids": torch.randint(1000, 30000, size, generator=generator)} for _ in range(32)]
    qmodel = qs.convert(BertModel(BertConfig()).eval(), "onnxruntime")
    for _ in range(2):
        maxima = timed(lambda: qs.collect(qmodel, batches, histograms=False))
        both = timed(lambda: qs.calibrate(qmodel, batches))
        table.add_row("BERT-base, maxima and scales / maxima alone", f"{both / maxima:.3f}", "at most 1.1")
    start = time.perf_counter()
    statistics_ = qs.collect(qmodel, batches, histograms=False, moments=True)
    table.add_row("moments and maxima / maxima alone", f"{(time.perf_counter() - start) / maxima:.2f}", "")
    table.add_row("round_weights from there", f"{timed(lambda: qs.round_weights(qmodel, statistics_)):.1f} s", "")

    folder = checkpoint()
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = list(token_batches(tokenizer, standard_library_texts(256)))
    qmodel = qs.convert(model, "openvino")
    start = time.perf_counter()
    statistics_ = qs.collect(qmodel, texts, moments=True)
    qs.calibrate(qmodel, statistics_)
    qs.round_weights(qmodel, statistics_)
    table.add_row("MiniLM, 256 texts, calibrate and round_weights", f"{time.perf_counter() - start:.1f} s", "")
    seconds = timed(lambda: qs.sensitivity(qmodel, texts, "cosine"))
    table.add_row("sensitivity, all parts", f"{seconds:.0f} s", "at most 120 s")
    seconds = timed(lambda: qs.tune(model, texts, "openvino", metric="cosine"))
    table.add_row("tune", f"{seconds:.0f} s", "at most 600 s")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--reference", type=int, default=3, help="quantizers that the reference computes entropy for")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile, which needs a C++ compiler")
    parser.add_argument("--tools", action="store_true", help="scales, rounding, sensitivity and tune instead")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    absl_logging.set_verbosity(absl_logging.ERROR)
    if arguments.tools:
        transformers_logging.disable_progress_bar()
        Console(highlight=False).print(tools())
        return

    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(attn_implementation="eager")).to(arguments.device).eval()
    qmodel = qs.convert(model)
    size = (ROWS, TOKENS)
    batch = {"input_ids": torch.randint(1000, 30000, size), "attention_mask": torch.ones(size, dtype=torch.long)}
    batch = {name: value.to(arguments.device) for name, value in batch.items()}
    labelled = {**batch, "labels": torch.zeros(ROWS, dtype=torch.long, device=arguments.device)}
    stats = qs.collect(qmodel, [batch])
    qs.calibrate(qmodel, stats, "max")

    table = Table(title=f"BERT-base, {ROWS} x {TOKENS}, {arguments.device}, medians of {arguments.runs}", box=None)
    for column in ("what", "measured", "goal"):
        table.add_column(column, justify="left" if column == "what" else "right")
    ranges(table, stats, arguments.reference)

    def forward(each: Callable[..., object]) -> Callable[[], object]:
        def run() -> None:
            with torch.no_grad():
                each(**batch)

        return run

    watched = activation_quantizers(qmodel)
    old = {
        "max": {name: calib.MaxCalibrator(8, None, False) for name in watched},
        "histogram": {name: calib.HistogramCalibrator(8, None, False) for name in watched},
    }
    jobs = {
        "float": forward(model),
        "fake quant": forward(qmodel),
        "max": lambda: qs.collect(qmodel, [batch], histograms=False),
        "histograms": lambda: qs.collect(qmodel, [batch]),
        "reference max": lambda: reference_collect(qmodel, old["max"], batch),
        "reference histograms": lambda: reference_collect(qmodel, old["histogram"], batch),
    }
    if arguments.compile:
        jobs["float, compiled"] = forward(torch.compile(model))
        jobs["fake quant, compiled"] = forward(torch.compile(qmodel))
    found = medians(jobs, arguments.runs)
    base = found["float"]
    table.add_row("float forward", f"{base:.3f} s", "")
    for name, words, goal in (
        ("max", "collecting maxima / float forward", "1.15"),
        ("reference max", "the same with pytorch-quantization's calibrators", ""),
        ("histograms", "collecting histograms / float forward", "1.25"),
        ("reference histograms", "the same with pytorch-quantization's calibrators", ""),
        ("fake quant", "fake-quant forward / float forward", "1.25"),
        ("fake quant, compiled", "both compiled", "1.25"),
    ):
        if name in found:
            below = found["float, compiled"] if "compiled" in name else base
            table.add_row(words, f"{found[name] / below:.3f}", f"at most {goal}" if goal else "")

    steps: dict[str, Callable[[], object]] = {}
    for name, each in (("float", model.train()), ("QAT", qmodel.train())):
        optimizer = torch.optim.AdamW(each.parameters(), lr=1e-6)
        steps[name] = functools.partial(step, each, optimizer, labelled)
        if arguments.compile:
            steps[f"{name}, compiled"] = functools.partial(step, torch.compile(each), optimizer, labelled)
    found = medians(steps, arguments.runs)
    table.add_row("float training step", f"{found['float']:.3f} s", "")
    table.add_row("QAT step / float step", f"{found['QAT'] / found['float']:.3f}", "at most 1.15")
    if arguments.compile:
        ratio = found["QAT, compiled"] / found["float, compiled"]
        table.add_row("both compiled", f"{ratio:.3f}", "at most 1.15")
    Console(highlight=False).print(table)


if __name__ == "__main__":
    main()
