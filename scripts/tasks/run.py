"""One run of a script, whatever the task: load, convert, calibrate, train, evaluate, save, export."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from absl import logging as absl_logging
from accelerate import PartialState
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, set_seed

import qdq_surgery as qs
from qdq_surgery.cli.folder import is_converted
from qdq_surgery.hf.config_facts import max_tokens
from qdq_surgery.onnx_file.writer import replace_text, writable
from qdq_surgery.serve.model import OnnxModel
from tasks.errors import OptionError
from tasks.features import Collator, Feature, calibration_batches
from tasks.models import Head, label_order, load, load_file, load_teacher, load_tokenizer, save
from tasks.onnx_file import export
from tasks.options import Options
from tasks.prediction import predict
from tasks.task import Task
from tasks.training import train

__all__ = ["RESULTS_NAME", "run", "run_or_exit"]

RESULTS_NAME = "eval_results.json"

Example = TypeVar("Example")


@dataclass(frozen=True)
class _Part(Generic[Example]):
    """A file, read and tokenized."""

    examples: Sequence[Example]
    features: Sequence[Feature]


def run_or_exit(task: Task[Any], options: Options) -> None:
    """``run``; what a user can mend ends the program with a message and status 1."""
    absl_logging.set_verbosity(absl_logging.ERROR)  # pytorch-quantization reports every quantizer
    try:
        run(task, options)
    except qs.QdqSurgeryError as error:
        sys.exit(f"error: {error}")


def run(task: Task[Example], options: Options) -> dict[str, float]:
    """Do what the options say.

    Returns:
        The metrics in percent; none without ``--do_eval``.

    Raises:
        QdqSurgeryError: A file, a folder or an option is not as it has to be.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())  # one, unless a launcher such as torchrun made more
    console = Console(highlight=False, soft_wrap=True, quiet=not processes.is_main_process)
    set_seed(options.seed)
    if options.onnx is not None:
        return _evaluate_file(task, options.onnx, options, console) if processes.is_main_process else {}
    if options.save_onnx and options.output_dir.is_dir():
        writable(options.output_dir / "model.onnx", options.overwrite)  # before any work is done
    train_examples = _read(task, options.train_file, options.do_calib or options.do_train or options.save_onnx)
    held_out = _read(task, options.validation_file, options.do_eval or options.save_onnx)
    head = Head(task.head, label_order(task.labels([*train_examples, *held_out])))
    model = _load(options, head, console)
    _show_labels(model, head, console)
    tokenizer = load_tokenizer(options.tokenizer_name, words=task.words)
    _check_length(model, options)
    labels = model.config.label2id
    model.to(processes.device)
    teacher = _teacher(options, head, model) if options.do_train else None
    collator = Collator(tokenizer)
    training = _Part(train_examples, task.features(train_examples, tokenizer, options, labels))
    validation = _Part(held_out, task.features(held_out, tokenizer, options, labels))

    quantized = _prepare(model, training.features, collator, options, console)
    if options.do_train:
        _train(model, training.features, collator, options, teacher, console)
    # Every process has the same model now; one is enough for the rest.
    scores: dict[str, float] = {}
    if processes.is_main_process:
        scores = _evaluate(task, model, validation, collator, options, console) if options.do_eval else {}
        if options.do_calib or options.do_train:
            save(model, tokenizer, options.tokenizer_name, options.output_dir, quantized=quantized)
            console.print(f"model and tokenizer: {options.output_dir}")
        if options.save_onnx:
            _export(task, model, [*validation.features, *training.features], collator, options, console)
            tokenizer.save_pretrained(options.output_dir)  # the file is evaluated with it
    processes.wait_for_everyone()
    return scores


def _evaluate_file(task: Task[Example], file: Path, options: Options, console: Console) -> dict[str, float]:
    """The metrics of an exported file, found as those of a model are."""
    examples = _read(task, options.validation_file, True)
    head = Head(task.head, label_order(task.labels(examples)))
    model = load_file(file, options.runtime or "onnxruntime", head)
    _show_labels(model, head, console)
    tokenizer = load_tokenizer(options.tokenizer_name, words=task.words)
    _check_length(model, options)
    part = _Part(examples, task.features(examples, tokenizer, options, model.config.label2id))
    return _evaluate(task, model, part, Collator(tokenizer), options, console)


def _read(task: Task[Example], path: Path | None, needed: bool) -> list[Example]:
    return task.read(path) if needed and path is not None else []


def _load(options: Options, head: Head, console: Console) -> PreTrainedModel:
    folder = options.model_name_or_path
    if options.fp32 and is_converted(folder):
        raise OptionError(f"{folder} holds a quantized model; give the float model, or leave --fp32 out")
    model, new = load(folder, head)
    if new:
        console.print(f"{folder} has no {head.ending} head: it gets a new, untrained one")
    return model


def _teacher(options: Options, head: Head, student: PreTrainedModel) -> PreTrainedModel | None:
    if options.teacher is None:
        return None
    teacher = load_teacher(options.teacher, head, student)
    teacher.to(student.device)
    return teacher


def _show_labels(model: PreTrainedModel | OnnxModel, head: Head, console: Console) -> None:
    if head.labels:
        console.print(f"labels by number: {', '.join(map(str, model.config.id2label.values()))}")


def _check_length(model: PreTrainedModel | OnnxModel, options: Options) -> None:
    limit = max_tokens(model.config)
    if limit is not None and options.max_seq_length > limit:
        raise OptionError(
            f"--max_seq_length {options.max_seq_length}: {options.model_name_or_path} knows {limit} positions; "
            f"give at most {limit}"
        )


def _prepare(
    model: PreTrainedModel, features: Sequence[Feature], collator: Collator, options: Options, console: Console
) -> bool:
    """Convert and calibrate as far as that is asked for and not done; says whether the model is quantized."""
    if options.fp32:
        return False
    if is_converted(options.model_name_or_path):
        if options.rules is not None:
            raise OptionError(
                f"{options.model_name_or_path} is converted already, by its own rules; leave --rules out, or start "
                "from the float model"
            )
    else:
        start, rules = time.perf_counter(), options.rules or "qdqbert"
        qs.convert(model, rules=rules, inplace=True)
        seconds = time.perf_counter() - start
        console.print(f"converted by {rules}: {len(qs.quantizers(model))} quantizers in {seconds:.1f} s")
    if options.do_calib:
        _calibrate(model, features, collator, options, console)
    _check_ranges(model, options)
    return True


def _calibrate(
    model: PreTrainedModel, features: Sequence[Feature], collator: Collator, options: Options, console: Console
) -> None:
    processes = PartialState()
    batches = list(
        calibration_batches(
            features,
            collator,
            batches=options.num_calib_batch,
            size=options.per_device_train_batch_size,
            seed=options.seed,
            device=model.device,
        )
    )[processes.process_index :: processes.num_processes]  # calibrate() brings the shares together
    start = time.perf_counter()
    found = qs.calibrate(model.eval(), batches, method=options.calibrator, percentile=options.percentile)
    seconds = time.perf_counter() - start
    console.print(
        f"calibrated by {found.method}: {len(found.ranges)} ranges from {found.tokens} tokens in {seconds:.1f} s"
    )


def _check_ranges(model: PreTrainedModel, options: Options) -> None:
    """QAT keeps the ranges, and a quantizer without one would take each batch's own: no stage goes on like that."""
    lacking = [name for name, quantizer in qs.quantizers(model).items() if _lacks_range(quantizer)]
    if lacking:
        raise qs.CalibrationError(
            f"{len(lacking)} quantizers of {options.model_name_or_path} have no range (first: {lacking[0]}); give "
            "--do_calib with --train_file, a folder that a run with --do_calib wrote, or --fp32 for the float model"
        )


def _lacks_range(quantizer: qs.TensorQuantizer) -> bool:
    return not quantizer._disabled and quantizer.amax is None


def _train(
    model: PreTrainedModel,
    features: Sequence[Feature],
    collator: Collator,
    options: Options,
    teacher: PreTrainedModel | None,
    console: Console,
) -> None:
    if options.learn_ranges:
        qs.learn_ranges(model)
    steps, seconds = train(model, features, collator, options, teacher)
    if options.learn_ranges:
        qs.fix_ranges(model)
    console.print(f"trained {steps} steps in {seconds:.0f} s")


def _evaluate(
    task: Task[Example],
    model: PreTrainedModel | OnnxModel,
    part: _Part[Example],
    collator: Collator,
    options: Options,
    console: Console,
) -> dict[str, float]:
    start = time.perf_counter()
    logits = predict(model, part.features, collator, options.per_device_eval_batch_size)
    labels = [model.config.id2label[index] for index in range(len(model.config.id2label))]
    scores, files = task.score(part.examples, part.features, logits, options, labels)
    seconds = time.perf_counter() - start
    kind = _kind(model, options)
    results = {"task": task.name, "model": kind, "examples": len(part.examples), "seconds": round(seconds, 1), **scores}
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, text in {**files, RESULTS_NAME: json.dumps(results, indent=2) + "\n"}.items():
        replace_text(options.output_dir / name, text)
    console.print(_table(f"{task.name}, {kind} model, {_name(options.validation_file)}", results))
    return scores


def _kind(model: PreTrainedModel | OnnxModel, options: Options) -> str:
    if isinstance(model, OnnxModel):
        return f"ONNX ({model.runtime}{f', {model.precision}' if model.precision else ''})"
    return "float" if options.fp32 else "quantized"


def _name(file: Path | None) -> str:
    return "" if file is None else file.name


def _table(title: str, results: dict[str, Any]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    shown = {name: value for name, value in results.items() if not isinstance(value, str)}
    for name in shown:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in shown.values()))
    return table


def _export(
    task: Task[Example],
    model: PreTrainedModel,
    features: Iterable[Feature],
    collator: Collator,
    options: Options,
    console: Console,
) -> None:
    some = [dict(feature.inputs) for feature in features][:2]
    if len(some) < 2:
        raise OptionError("--save_onnx needs two examples to export with; give --validation_file or --train_file")
    options.output_dir.mkdir(parents=True, exist_ok=True)
    start, path = time.perf_counter(), options.output_dir / "model.onnx"
    target = options.target or "onnxruntime"
    opset = export(model, collator(some), task.outputs, path, target, overwrite=options.overwrite)
    console.print(f"ONNX, opset {opset}, in {time.perf_counter() - start:.0f} s: {path}")
