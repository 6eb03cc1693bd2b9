"""Calibration methods x tasks: the float model, every method with and without residual adds, and QAT.

    python scripts/benchmark_tasks.py [MODEL_DIR] [--tasks qa pairs sentences ner embedding] [--seeds 0 1 2]
    python scripts/benchmark_tasks.py [MODEL_DIR] --defaults [--held-out 2000]

For each task and seed: fine-tunes the float model on generated data, collects activations once, sets the ranges by each
method and evaluates on held-out data; then trains with the full recipe for a tenth of the float model's steps, learning
from the float model. The embedding task has no training: sentence embeddings of real text against the float model's.
With ``--defaults`` nothing is chosen: shipped rules by their own methods, weights rounded for their products, and QAT
that starts there. Prints the table of docs/accuracy.md and writes every figure to ``--output`` as it comes; figures
that are there already stay. MODEL_DIR is all-MiniLM-L6-v2 if left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from absl import logging as absl_logging
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs
from qdq_surgery.cli.demo.files import checkpoint
from qdq_surgery.cli.demo.run import agreement, embed, token_batches
from qdq_surgery.cli.folder import load_model
from qdq_surgery.numerics.range_choice import BEST, RANGE_METHODS
from qdq_surgery.onnx_file.writer import replace_text
from qdq_surgery.texts.standard_library import standard_library_texts
from run_classification import Classification
from run_ner import NamedEntities
from run_qa import QuestionAnswering
from tasks.features import Collator, Feature, calibration_batches
from tasks.generate import generate
from tasks.models import Head, label_order, load, load_tokenizer
from tasks.options import Options, parse
from tasks.prediction import predict
from tasks.task import Task
from tasks.training import train

#: Columns of the table: words, method, percentile.
METHODS: tuple[tuple[str, str, float | None], ...] = (
    *(
        (method.in_words(**options), name, options.get("percentile"))
        for name, method in RANGE_METHODS.items()
        for options in method.settings
    ),
    (BEST, BEST, None),
)


@dataclass(frozen=True)
class Recipe:
    """A task, its metric, and how its float model is trained."""

    task: Task[Any]
    metric: str
    rate: float
    epochs: float
    batch: int = 16


TASKS = {
    "qa": Recipe(QuestionAnswering(), "f1", 3e-4, 2.0, 8),
    "pairs": Recipe(Classification(), "accuracy", 2e-4, 2.0),
    "sentences": Recipe(Classification(), "accuracy", 1e-4, 2.0),
    "ner": Recipe(NamedEntities(), "f1", 2e-4, 3.0),
}

#: QAT against the float model: share of the steps, share of the learning rate; from where INT8 is as good as float
#: already there is less to learn.
QAT_SCHEDULE, QAT_RATE, DEFAULTS_QAT_RATE = 0.1, 1 / 3, 1 / 20
#: Rules that are taken as they are, with ``--defaults``; QAT starts from the last one.
DEFAULTS = ("onnxruntime", "tensorrt", "qdqbert-scaled")
#: Ranges that QAT starts from.
QAT_START: tuple[str, float | None] = ("max", None)

CALIBRATION_BATCHES, EMBEDDING_TEXTS, CALIBRATION_TEXTS = 16, 400, 128

Figures = dict[str, float]


def residual_adds(qmodel: PreTrainedModel, enabled: bool) -> None:
    """Quantize the inputs of residual adds, or leave them in float."""
    for name, quantizer in qs.quantizers(qmodel).items():
        if name.rpartition(".")[2].startswith("add_"):
            quantizer.enable() if enabled else quantizer.disable()


class Bench:
    """One fine-tuned task."""

    def __init__(self, name: str, model: Path, folder: Path, seed: int, held_out: int | None = None) -> None:
        recipe = TASKS[name]
        self.task, self.metric = recipe.task, recipe.metric
        files = generate(name, folder, seed=seed, held_out=held_out)
        arguments = ["--model_name_or_path", str(model), "--output_dir", str(folder), "--do_train", "--train_file"]
        arguments += [str(files[0]), "--seed", str(seed), "--learning_rate", str(recipe.rate)]
        arguments += ["--num_train_epochs", str(recipe.epochs), "--per_device_train_batch_size", str(recipe.batch)]
        self.options: Options = parse("", arguments, answers=name == "qa")
        examples, self.held_out = (self.task.read(file) for file in files)
        head = Head(self.task.head, label_order(self.task.labels([*examples, *self.held_out])))
        set_seed(seed)
        self.model, _ = load(model, head)
        tokenizer = load_tokenizer(model, words=self.task.words)
        self.collator, labels = Collator(tokenizer), self.model.config.label2id
        self.training = self.task.features(examples, tokenizer, self.options, labels)
        self.features: Sequence[Feature] = self.task.features(self.held_out, tokenizer, self.options, labels)

    def score(self, model: PreTrainedModel) -> float:
        names = [model.config.id2label[index] for index in range(len(model.config.id2label))]
        logits = predict(model, self.features, self.collator, self.options.per_device_eval_batch_size)
        return self.task.score(self.held_out, self.features, logits, self.options, names)[0][self.metric]

    def train(self) -> Figures:
        """Fine-tune the float model, and score it."""
        steps, seconds = train(self.model, self.training, self.collator, self.options, None)
        self.model.eval()
        return {"float": self.score(self.model), "float steps": steps, "float seconds": seconds}

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """What is calibrated on: of the training data."""
        return calibration_batches(
            self.training,
            self.collator,
            batches=CALIBRATION_BATCHES,
            size=self.options.per_device_train_batch_size,
            seed=self.options.seed,
            device=self.model.device,
        )

    def run_defaults(self) -> Figures:
        """Shipped rules as they are, and QAT from there."""
        figures = self.train()
        for rules in DEFAULTS:
            qmodel = qs.convert(self.model, rules)
            stats = qs.collect(qmodel, self.batches(), moments=True)
            qs.calibrate(qmodel, stats)
            qs.round_weights(qmodel, stats)
            figures[rules] = self.score(qmodel)
        figures.update(self.qat(qmodel, math.ceil(figures["float steps"] * QAT_SCHEDULE), DEFAULTS_QAT_RATE))
        return figures

    def run(self) -> Figures:
        figures = self.train()
        qmodel = qs.convert(self.model)
        stats = qs.collect(qmodel, self.batches())
        for enabled, residual in ((True, "quantized"), (False, "float")):
            residual_adds(qmodel, enabled)
            for words, method, percentile in METHODS:
                qs.calibrate(qmodel, stats, method, percentile=percentile)
                figures[f"{words}, {residual}"] = self.score(qmodel)
        residual_adds(qmodel, True)
        qs.calibrate(qmodel, stats, QAT_START[0], percentile=QAT_START[1])
        figures.update(self.qat(qmodel, math.ceil(figures["float steps"] * QAT_SCHEDULE)))
        return figures

    def qat(self, qmodel: PreTrainedModel, steps: int, rate: float = QAT_RATE) -> Figures:
        options = replace(
            self.options,
            learning_rate=self.options.learning_rate * rate,
            max_steps=steps,
            lr_scheduler_type="cosine",
            disable_dropout=True,
            distill_weight=1.0,
            distill_temperature=4.0,
        )
        _, seconds = train(qmodel, self.training, self.collator, options, copy.deepcopy(self.model))
        return {"QAT, quantized": self.score(qmodel), "QAT steps": steps, "QAT seconds": seconds}


def measured(task: str, model: Path, folder: Path, seed: int, held_out: int | None, defaults: bool) -> Figures:
    """All figures of one task and seed."""
    if task == "embedding":
        return embedding(model)
    bench = Bench(task, model, folder, seed, held_out)
    return bench.run_defaults() if defaults else bench.run()


def embedding(folder: Path) -> Figures:
    """Mean cosine in percent to the float model's sentence embeddings."""
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    texts = standard_library_texts(EMBEDDING_TEXTS + CALIBRATION_TEXTS)
    calibration, held_out = texts[:CALIBRATION_TEXTS], texts[CALIBRATION_TEXTS:]
    wanted = embed(model, tokenizer, held_out, "float model")
    qmodel = qs.convert(model)
    stats = qs.collect(qmodel, list(token_batches(tokenizer, calibration)))
    figures = {"float": 100.0}
    for enabled, residual in ((True, "quantized"), (False, "float")):
        residual_adds(qmodel, enabled)
        for words, method, percentile in METHODS:
            qs.calibrate(qmodel, stats, method, percentile=percentile)
            found = embed(qmodel, tokenizer, held_out, f"{words}, residual {residual}")
            figures[f"{words}, {residual}"] = 100.0 * agreement(wanted, found)[0]
    return figures


def table(found: dict[str, dict[str, Figures]]) -> str:
    """Markdown: a row for each task and each kind of residual add, medians over the seeds."""
    columns = [words for words, *_ in METHODS]
    lines = ["| task | residual adds | float | " + " | ".join(columns) + " | QAT |"]
    lines.append("|---|---|--:|" + "--:|" * (len(columns) + 1))
    for task, by_seed in found.items():

        def cell(name: str, runs: Iterable[Figures] = tuple(by_seed.values())) -> str:
            values = [run[name] for run in runs if name in run]
            return f"{statistics.median(values):.1f}" if values else ""

        metric = TASKS[task].metric if task in TASKS else "cosine"
        for residual in ("quantized", "float"):
            cells = [cell("float"), *(cell(f"{words}, {residual}") for words in columns), cell(f"QAT, {residual}")]
            lines.append(f"| {task} ({metric}) | {residual} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def seeds(found: dict[str, dict[str, Figures]]) -> Table:
    """Every seed: float, the best method of each kind, QAT."""
    made = Table(title="per seed", title_justify="left", box=None)
    for column in ("task", "seed", "float", "best PTQ", "by", "best PTQ, residual adds float", "by", "QAT", "steps"):
        made.add_column(column)
    for task, by_seed in found.items():
        for seed, run in by_seed.items():
            cells = [task, seed, f"{run['float']:.2f}"]
            for residual in ("quantized", "float"):
                by = max((words for words, *_ in METHODS), key=lambda words: run[f"{words}, {residual}"])
                cells += [f"{run[f'{by}, {residual}']:.2f}", by]
            if "QAT steps" in run:
                cells += [f"{run['QAT, quantized']:.2f}", f"{run['QAT steps']:g} of {run['float steps']:g}"]
            made.add_row(*cells)
    return made


def defaults_table(found: dict[str, dict[str, Figures]]) -> str:
    """Markdown: what each default loses to float, in points: the mean over the seeds, and the largest loss."""
    columns = (*DEFAULTS, "QAT, quantized")
    lines = ["| task | seeds | float | " + " | ".join(columns) + " |", "|---|--:|--:|" + "--:|" * len(columns)]
    for task, by_seed in found.items():
        runs = list(by_seed.values())
        cells = [f"{statistics.mean(run['float'] for run in runs):.2f}"]
        for name in columns:
            lost = [run["float"] - run[name] for run in runs]
            cells.append(f"{statistics.mean(lost):+.2f} ({max(lost):+.2f})")
        lines.append(f"| {task} ({TASKS[task].metric}) | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL_DIR")
    parser.add_argument("--tasks", nargs="+", choices=[*TASKS, "embedding"], default=[*TASKS, "embedding"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--defaults", action="store_true", help="shipped rules as they are, nothing chosen")
    parser.add_argument("--held-out", type=int, help="examples held out (default: 400; with --defaults 2000)")
    parser.add_argument("--output", type=Path, default=Path("benchmark_tasks.json"))
    arguments = parser.parse_args()
    held_out = arguments.held_out or (2000 if arguments.defaults else None)
    absl_logging.set_verbosity(absl_logging.ERROR)
    transformers_logging.set_verbosity_error()
    model = arguments.model or checkpoint()
    found: dict[str, dict[str, Figures]] = {}
    if arguments.output.is_file():
        found = json.loads(arguments.output.read_text(encoding="utf-8"))
    for task in (each for each in arguments.tasks if not arguments.defaults or each in TASKS):
        for seed in arguments.seeds if task != "embedding" else [0]:
            if str(seed) in found.get(task, {}):
                continue
            start = time.perf_counter()
            with tempfile.TemporaryDirectory() as folder:
                figures = measured(task, model, Path(folder), seed, held_out, arguments.defaults)
            found.setdefault(task, {})[str(seed)] = figures
            replace_text(arguments.output, json.dumps(found, indent=2) + "\n")
            print(f"{task}, seed {seed}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    if arguments.defaults:
        print(defaults_table(found))
        return
    print(table(found))
    Console(highlight=False, width=140).print(seeds(found))


if __name__ == "__main__":
    main()
