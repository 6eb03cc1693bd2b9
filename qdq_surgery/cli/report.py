"""The command that writes a report, and what other commands need to write one beside what they make."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import collect
from qdq_surgery.cli.options import (
    batches,
    class_option,
    load,
    note_ranges,
    runtime_of,
    show,
    text_options,
    texts_argument,
)
from qdq_surgery.cli.wording import say
from qdq_surgery.errors import OptionError
from qdq_surgery.hf.example_inputs import sample_inputs
from qdq_surgery.html_report.report import Report, report
from qdq_surgery.onnx_file.opened import OnnxFile, open_exported
from qdq_surgery.onnx_file.writer import writable
from qdq_surgery.prove.lint import lint
from qdq_surgery.prove.parity import certify
from qdq_surgery.prove.receipt import receipt
from qdq_surgery.report.diff import Diff, diff
from qdq_surgery.sensitivity.evaluate import evaluate
from qdq_surgery.sensitivity.measure import sensitivity
from qdq_surgery.sensitivity.output_error import DEFAULT as DEFAULT_METRIC
from qdq_surgery.sensitivity.output_error import METRICS
from qdq_surgery.serve.model import OnnxModel, load_onnx
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.targets.registry import TARGETS, runtimes
from qdq_surgery.text.optional_imports import require
from qdq_surgery.text.progress import steps
from qdq_surgery.texts.samples import read_samples

__all__ = ["Watch", "add_report", "check_report", "diff_of"]


class Watch:
    """How long each step took.

    Attributes:
        seconds: By the name of the step.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """A step of that name."""
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def check_report(path: str, overwrite: bool) -> None:
    """Whether a report can be written there, before the work of minutes.

    Raises:
        ExportError: It cannot.
        ModelError: The extra is not installed.
    """
    writable(path, overwrite, "a report", ".html")
    for package in ("bokeh", "jinja2"):
        require(package, "a report", "report")


def diff_of(qmodel: PreTrainedModel) -> Diff:
    """A converted model against itself without its quantizers."""
    return diff(copy.deepcopy(qmodel).dequantize(), qmodel)


def add_report(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("model", metavar="MODEL_DIR", help="a folder that calibrate wrote, with its tokenizer")
    command.add_argument("output", metavar="HTML", help="the file to write, a new .html")
    texts_argument(command, optional=True)
    class_option(command)
    command.add_argument("--sensitivity", action="store_true", help="measure each site, kind and layer on TEXTS, too")
    command.add_argument(
        "--resume", metavar="FILE", help="keep the figures of --sensitivity here, or take them from it"
    )
    command.add_argument("--metric", choices=METRICS, default=DEFAULT_METRIC, help="the loss (default: %(default)s)")
    command.add_argument(
        "--onnx", metavar="FILE", help="exported from it: certificate, receipt, fusions; the loss is the file's"
    )
    command.add_argument("--runtime", choices=runtimes(), help="that opens the file (default: the one it is made for)")
    command.add_argument("--title", help="the heading (default: the model's class)")
    command.add_argument("--overwrite", action="store_true", help="replace HTML if it exists")
    command.add_argument("--json", action="store_true", help="print what was written as JSON")
    text_options(command)
    command.set_defaults(run=_report, width=None)


def _report(arguments: argparse.Namespace) -> None:
    _check_options(arguments)
    check_report(arguments.output, arguments.overwrite)
    samples = [] if arguments.texts is None else read_samples(arguments.texts, arguments.column)
    watch = Watch()
    runtime = "" if arguments.onnx is None else runtime_of(arguments)  # before the work of minutes
    with steps(2) as bar:
        bar.next("loading")
        model = load(arguments)
        plan_of(model)  # it is converted
        data = batches(arguments, samples, model) if samples else []
        served = _served(model, runtime, arguments) if data and runtime else model
        bar.next("comparing graphs")
        found: dict[str, Any] = {"diff": diff_of(model)}
    if data:
        note_ranges(model)
        found.update(_measured(model, served, data, arguments, watch))
    if runtime:
        found.update(_of_file(model, runtime, arguments, watch))
    made = _written(model, found, watch.seconds, arguments)
    show(made, arguments)
    if not arguments.json:
        print(f"\nwritten to {arguments.output}")


def _check_options(arguments: argparse.Namespace) -> None:
    if arguments.runtime is not None and arguments.onnx is None:
        raise OptionError("--runtime goes with --onnx FILE only")
    if arguments.sensitivity and arguments.texts is None:
        raise OptionError("--sensitivity is measured on TEXTS; name them after HTML")
    if arguments.resume is not None and not arguments.sensitivity:
        raise OptionError("--resume goes with --sensitivity only")


def _served(model: PreTrainedModel, runtime: str, arguments: argparse.Namespace) -> PreTrainedModel | OnnxModel:
    """What texts are given to: the file, if it takes any."""
    if open_exported(arguments.onnx).any_batch:
        return load_onnx(arguments.onnx, runtime)
    say("note", f"{arguments.onnx} takes batches of one size only, so the loss is the model's, in PyTorch")
    return model


def _measured(
    model: PreTrainedModel,
    served: PreTrainedModel | OnnxModel,
    data: list[dict[str, Tensor]],
    arguments: argparse.Namespace,
    watch: Watch,
) -> dict[str, Any]:
    """What texts tell: histograms, the loss of what is ``served`` (the file, if there is one), what each part costs."""
    with watch.step("collecting histograms"):
        seen = collect(model, data)
    with watch.step("comparing with float"):
        loss = evaluate(served, data, model, arguments.metric)
    made = {"statistics": seen, "evaluation": loss}
    if arguments.sensitivity:
        with watch.step("measuring the sensitivity"):
            return {**made, "sensitivity": sensitivity(model, data, arguments.metric, resume=arguments.resume)}
    return made


def _of_file(model: PreTrainedModel, runtime: str, arguments: argparse.Namespace, watch: Watch) -> dict[str, Any]:
    """What its file tells; the receipt where its own runtime, or the one that is asked for, opens it here."""
    file = open_exported(arguments.onnx)
    with steps(2) as bar:
        bar.next("comparing the file")
        with watch.step("comparing the file with PyTorch"):
            made: dict[str, Any] = {
                "findings": lint(arguments.onnx),
                "parity": certify(model, file, _inputs(model, file), [runtime]),
            }
        bar.next("asking the runtime")
        own = TARGETS.get(str(file.metadata.get("target")))
        if arguments.runtime is not None or own is None or own.session is not None:
            with watch.step("asking the runtime"):
                made["receipt"] = receipt(arguments.onnx, runtime)
    return made


def _inputs(model: PreTrainedModel, file: OnnxFile) -> dict[str, Any]:
    """An example that both the model and the file take."""
    taken = {value.name for value in file.model.graph.inputs}
    return {name: value for name, value in sample_inputs(model, None, True).items() if name in taken}


def _written(
    model: PreTrainedModel, found: Mapping[str, Any], times: Mapping[str, float], arguments: argparse.Namespace
) -> Report:
    with steps(1) as bar:
        bar.next("writing")
        return report(
            model, arguments.output, **found, times=times, title=arguments.title, overwrite=arguments.overwrite
        )
