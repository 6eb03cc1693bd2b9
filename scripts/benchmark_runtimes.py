"""Time INT8 on a CPU: ours against each runtime's own tools, the reference's export and torchao.

    python scripts/benchmark_runtimes.py [--models base,minilm] [--shapes 8x128,1x128,1x384] [--runs 11] [--markdown]

BERT-base and the shape of all-MiniLM-L6, for question answering, with random weights. All contenders are in one process
and take turns; figures are medians over the rounds. ``--markdown`` prints the table of docs/benchmarks.md. Those whose
packages are not installed are skipped with a word (``pip install onnx onnxscript onnxruntime openvino nncf torchao``
has them all); the reference's export needs ``--reference PYTHON``, the Python of an environment with transformers
4.40.2, pytorch-quantization 2.1.3 and onnx. Let nothing else run meanwhile: rounds that other processes disturb are run
again, and if they do not end, a line says so.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import logging as absl_logging
from numpy.typing import NDArray
from rich.console import Console
from transformers.utils import logging as transformers_logging

from qdq_surgery.onnx_file.writer import replace_text
from runtimes import goals, machine, with_onnxruntime, with_openvino, with_ours, with_reference, with_torch
from runtimes.figures import Figures, Measured
from runtimes.subjects import SUBJECTS, Batch, Shape, Subject, make_batch, make_model
from runtimes.timing import BUSY, Watch, interleaved
from runtimes.workspace import Contender, Missing, Run, Workspace, quiet, tensors

CONTENDERS: dict[str, Contender] = {
    each.name: each
    for module in (with_onnxruntime, with_openvino, with_reference, with_torch, with_ours)
    for each in module.CONTENDERS
}

#: What everyone calibrates with: this many batches of this shape.
CALIBRATION_BATCHES, CALIBRATION_SHAPE = 4, Shape(2, 128)


def say(line: str) -> None:
    """Progress, skipped contenders and warnings: beside what is printed, not in it."""
    print(line, file=sys.stderr, flush=True)


def cosine(found: Sequence[NDArray[Any]], wanted: Sequence[NDArray[Any]]) -> float:
    """Between all logits of two models."""
    one, other = (np.concatenate([np.asarray(each, np.float64).ravel() for each in given]) for given in (found, wanted))
    return float(one @ other / np.sqrt((one @ one) * (other @ other)))


def reason(error: BaseException) -> str:
    """The start of an error, in one line, without the folders in it."""
    text = " ".join(str(error).split()) or "no message"
    return re.sub(r"(?:/[^\s/:'\"]+)+/", "", f"{type(error).__name__}: {text}")[:300]


def prepare(workspace: Workspace, names: Sequence[str], figures: Figures) -> dict[str, Run]:
    """Make the contenders one after the other; those that cannot be made are noted in ``figures``."""
    runs = {}
    for name in names:
        start = time.perf_counter()
        try:
            made = CONTENDERS[name].prepare(workspace)
        except Missing as missing:
            figures.skipped[name] = str(missing)
            say(f"{name} is skipped: {missing}")
            continue
        except Exception as error:  # whatever a peer fails with, the others still run
            figures.failed[name] = reason(error)
            say(f"{name} FAILED: {figures.failed[name]}")
            continue
        finally:
            gc.collect()
        runs[name] = made.run
        figures.contenders[name] = Measured(CONTENDERS[name].words, made.megabytes)
        say(f"{name} is ready: {time.perf_counter() - start:.0f} s")
    return runs


def warm_up(runs: dict[str, Run], batch: Batch, workspace: Workspace, figures: Figures) -> None:
    """One run of each on a new shape, compared with PyTorch; those that fail leave."""
    with torch.no_grad():
        wanted = workspace.model(**tensors(batch))
    for name in list(runs):
        try:
            with quiet():
                found = runs[name](batch)
        except Exception as error:
            figures.failed[name] = reason(error)
            say(f"{name} FAILED: {figures.failed[name]}")
            del runs[name], figures.contenders[name]
            continue
        alike = cosine(found, [wanted.start_logits.numpy(), wanted.end_logits.numpy()])
        before = figures.contenders[name].cosine
        figures.contenders[name].cosine = alike if before is None else min(alike, before)


def measure(
    subject: Subject,
    shapes: Sequence[Shape],
    names: Sequence[str],
    rounds: int,
    folder: Path,
    threads: int,
    reference: Path | None = None,
) -> Figures:
    """Everything about one model.

    Args:
        subject: The model.
        shapes: Rows and tokens of the calls.
        names: Contenders, in the order of the tables.
        rounds: Timed runs of each.
        folder: Where files go.
        threads: Of every runtime.
        reference: Python of the environment that has the real QDQBERT.
    """
    model = make_model(subject)
    calibration = [make_batch(model, CALIBRATION_SHAPE, seed) for seed in range(CALIBRATION_BATCHES)]
    workspace = Workspace(model, folder, threads, calibration, reference)
    figures = Figures(subject.words, [str(shape) for shape in shapes])
    runs = prepare(workspace, names, figures)
    for shape in shapes:
        batch = make_batch(model, shape, seed=CALIBRATION_BATCHES)
        warm_up(runs, batch, workspace, figures)
        kept = interleaved(runs, batch, rounds, Watch())
        for name in runs:
            figures.contenders[name].seconds[str(shape)] = [each.seconds[name] for each in kept]
        figures.others[str(shape)] = max(each.others for each in kept)
        say(f"{subject.words} {shape}: done")
    return figures


def chosen(only: Sequence[str], skip: Sequence[str]) -> list[str]:
    """Names of contenders, in the order of the registry."""
    unknown = [name for name in (*only, *skip) if name not in CONTENDERS]
    if unknown:
        raise ValueError(f"there is no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    return [name for name in CONTENDERS if name not in skip and (not only or name in only)]


@contextlib.contextmanager
def workplace(keep: Path | None) -> Iterator[Path]:
    """A folder: the one to keep, or one that is deleted."""
    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
        yield keep
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def words(text: str) -> list[str]:
    """The parts of a list with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def shape_list(text: str) -> list[Shape]:
    """``8x128,1x128``."""
    try:
        return [Shape.parse(part) for part in words(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def main(given: Sequence[str] | None = None) -> int:
    """The command line. The exit status is 1 if a contender failed that was not skipped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=words, default=list(SUBJECTS), help=f"of {', '.join(SUBJECTS)}")
    parser.add_argument("--shapes", type=shape_list, default="8x128,1x128,1x384", help="rows x tokens")
    parser.add_argument("--runs", type=int, default=11, help="rounds (default %(default)s)")
    parser.add_argument("--only", type=words, default=[], help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--skip", type=words, default=[])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--reference", type=Path, metavar="PYTHON", help="of an environment with the real QDQBERT")
    parser.add_argument(
        "--markdown", action="store_true", help="print the table of docs/benchmarks.md in place of the terminal's"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure here")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the models' files here")
    arguments = parser.parse_args(given)
    try:
        names = chosen(arguments.only, arguments.skip)
        unknown = [name for name in arguments.models if name not in SUBJECTS]
        if unknown:
            raise ValueError(f"there is no model {', '.join(unknown)}; there are {', '.join(SUBJECTS)}")
        if arguments.runs < 1 or arguments.threads < 1:
            raise ValueError("--runs and --threads are at least 1")
    except ValueError as error:
        parser.error(str(error))
    absl_logging.set_verbosity(absl_logging.ERROR)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)

    all_figures: dict[str, Figures] = {}
    with workplace(arguments.keep) as folder:
        for name in arguments.models:
            place = folder / name
            place.mkdir(exist_ok=True)
            all_figures[name] = measure(
                SUBJECTS[name],
                arguments.shapes,
                names,
                arguments.runs,
                place,
                arguments.threads,
                arguments.reference,
            )
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for figures in all_figures.values():
        print(figures.markdown()) if arguments.markdown else console.print(figures.table())
        print()
    if "base" in all_figures:
        print("\n".join(goals.lines(all_figures["base"])))
    for figures in all_figures.values():
        for shape, share in figures.others.items():
            if share > BUSY:
                say(f"{figures.words} {shape}: other processes took {share:.0%} of the cores' time; measure again")
    if arguments.json:
        found = {name: figures.as_json() for name, figures in all_figures.items()}
        written = {**machine.describe(arguments.threads), "runs": arguments.runs, "models": found}
        replace_text(arguments.json, json.dumps(written, indent=2) + "\n")
    return int(any(figures.failed for figures in all_figures.values()))


if __name__ == "__main__":
    # So that being told to stop deletes the temporary folder, which is gigabytes.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
