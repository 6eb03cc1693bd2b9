"""The whole job in one command: convert, calibrate, write the file, prove it, measure what is lost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import Statistics
from qdq_surgery.calibration.ranges import Calibration
from qdq_surgery.calibration.rounding import Rounding
from qdq_surgery.checkpoint.report import report_of
from qdq_surgery.cli.options import (
    FOLDER_HELP,
    batches,
    calibrated,
    check_loss,
    class_option,
    load,
    loss_options,
    output_options,
    rounding_option,
    show,
    text_options,
    texts_argument,
    tokenizer_of,
)
from qdq_surgery.cli.report import check_report, diff_of
from qdq_surgery.cli.wording import say
from qdq_surgery.convert import convert
from qdq_surgery.deployment.card import Deployed, base_name, card
from qdq_surgery.deployment.folder import CARD, FILE, REPORT, deployed_folder, model_files, write_own_form, write_report
from qdq_surgery.deployment.tei import check_ports, check_served, write_served
from qdq_surgery.deployment.triton import check_repository, write_repository
from qdq_surgery.errors import AlreadyConvertedError, CalibrationError
from qdq_surgery.hf.config_facts import max_tokens
from qdq_surgery.html_report.report import report as write_page
from qdq_surgery.numerics.range_choice import method_names
from qdq_surgery.onnx_export import Export, export_onnx
from qdq_surgery.prove.receipt import Receipt, receipt
from qdq_surgery.rules.yaml_file import load_rules
from qdq_surgery.safety.whole_folder import check_new
from qdq_surgery.sensitivity.evaluate import Evaluation, evaluate
from qdq_surgery.serve.model import load_onnx
from qdq_surgery.surgery.model_state import quantizers
from qdq_surgery.targets.registry import DEFAULT, TARGETS
from qdq_surgery.text.progress import steps
from qdq_surgery.texts.samples import Sample, read_samples

__all__ = ["add_quantize"]

#: Of so many texts, one is kept to judge by, where no others are given.
_EVERY = 5

#: Fewer tell nothing.
_FEW = 10


def add_quantize(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("model", metavar="MODEL_DIR", help=f"{FOLDER_HELP}, with its tokenizer; not converted")
    texts_argument(command)
    command.add_argument("output", metavar="OUTPUT_DIR", help="a new folder, as runtimes and other tools load it")
    command.add_argument("--target", choices=TARGETS, default=DEFAULT, help="(default: %(default)s)")
    command.add_argument("--rules", help="a shipped name or a file (default: those of the target)")
    command.add_argument("--method", choices=method_names(), help="for all activations (default: each by its rule)")
    command.add_argument(
        "--held-out",
        metavar="TEXTS",
        help=f"other texts, to judge by (default: every {_EVERY}th of TEXTS is kept for it)",
    )
    rounding_option(command, default=True)
    class_option(command)
    loss_options(command)
    command.add_argument("--report", metavar="HTML", help="write all of it as a page, too: a new .html")
    command.add_argument(
        "--triton", metavar="NAME", help="write a model repository for Triton, too, in the folder triton"
    )
    command.add_argument(
        "--tei", action="store_true", help="name the file for text-embeddings-inference, too: onnx/model.onnx"
    )
    text_options(command)
    output_options(command)
    command.set_defaults(run=_quantize)


@dataclass(frozen=True)
class _Made:
    calibration: Calibration
    rounding: Rounding | None
    statistics: Statistics | None
    export: Export
    receipt: Receipt | None
    loss: Evaluation
    judged: str
    title: str


def _quantize(arguments: argparse.Namespace) -> None:
    check_new(arguments.output)
    if arguments.report is not None:
        check_report(arguments.report, overwrite=False)
    if arguments.triton is not None:
        check_repository(arguments.triton, TARGETS[arguments.target])
    samples, others = _samples(arguments)
    rules = load_rules(arguments.target if arguments.rules is None else arguments.rules)
    with steps(1) as bar:
        bar.next("loading")
        model = load(arguments)
        if quantizers(model):
            raise AlreadyConvertedError(f"{arguments.model} is converted already; give the float model, or export it")
        kept_in = {each.dtype for each in model.parameters() if each.is_floating_point()} - {torch.float32}
        if kept_in:
            say(
                "note", f"its weights are in {', '.join(map(str, kept_in))}, and are calibrated and exported in float32"
            )
            model.float()
        size = sum(each.numel() * each.element_size() for each in model.parameters())
        if arguments.tei:
            check_served(TARGETS[arguments.target], model.config)
        data, held_out = batches(arguments, samples, model), batches(arguments, others, model, notes=False)
        if arguments.tei:
            _check_read(model, data[0])
    tokenizer = tokenizer_of(arguments)
    with deployed_folder(arguments.output, arguments.model, tokenizer, max_tokens(model.config)) as draft:
        qmodel = convert(model, rules, inplace=True)
        made = _write(qmodel, draft, data, held_out, arguments)
        check_loss(made.loss, arguments)
        if arguments.triton is not None:
            write_repository(draft, arguments.triton, TARGETS[arguments.target])
        deployed = Deployed(
            base_name(arguments.model),
            arguments.target,
            rules.name,
            model_files(draft),
            size,
            made.loss,
            made.judged,
            None if made.receipt is None else made.receipt.share("linear"),
            made.calibration.rows,
        )
        (draft / CARD).write_text(card(deployed), encoding="utf-8")
        report = _report(qmodel, made)
        write_report(draft, report)
        if arguments.tei:
            write_served(draft, TARGETS[arguments.target])
    if arguments.report is not None:
        _write_page(qmodel, made, arguments)
    _print(made, report, arguments)


def _check_read(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> None:
    """What the file would take and give, the model takes and gives: seen before the file is made, which takes long."""
    with torch.no_grad():
        outputs = model(**batch)
    if isinstance(outputs, Mapping):
        gives = {name: value.ndim for name, value in outputs.items() if isinstance(value, Tensor)}
        check_ports(batch.keys(), gives)


def _write_page(qmodel: PreTrainedModel, made: _Made, arguments: argparse.Namespace) -> None:
    file = Path(arguments.output) / FILE
    with steps(2) as bar:
        bar.next("comparing graphs")
        graphs = diff_of(qmodel)
        bar.next("writing the report")
        write_page(
            qmodel,
            arguments.report,
            diff=graphs,
            statistics=made.statistics,
            evaluation=made.loss,
            export=replace(made.export, path=file),
            receipt=None if made.receipt is None else replace(made.receipt, path=file),
            rounding=made.rounding,
            title=base_name(arguments.model),
        )


def _samples(arguments: argparse.Namespace) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """Those to calibrate on, and those to judge by."""
    samples = read_samples(arguments.texts, arguments.column)
    if arguments.held_out is not None:
        return samples, read_samples(arguments.held_out, arguments.column)
    if len(samples) < _FEW:
        raise CalibrationError(
            f"{arguments.texts} has {len(samples)} texts, too few to keep some to judge by; bring 100 to 500, or name "
            "others with --held-out"
        )
    say("note", f"every {_EVERY}th of {len(samples)} texts is kept to judge by; --held-out TEXTS names others")
    return [each for at, each in enumerate(samples) if at % _EVERY], samples[::_EVERY]


def _write(
    qmodel: PreTrainedModel,
    draft: Path,
    data: list[dict[str, Tensor]],
    held_out: list[dict[str, Tensor]],
    arguments: argparse.Namespace,
) -> _Made:
    target = TARGETS[arguments.target]
    calibration, rounding, statistics = calibrated(qmodel, data, arguments, keep=arguments.report is not None)
    with steps(3) as bar:
        bar.next("exporting and comparing")
        example = {name: value[:2] for name, value in data[-1].items()}  # of the longest texts
        export = export_onnx(qmodel, draft / FILE, example, target=target.name)
        bar.next("asking the runtime")
        found = None if target.session is None else receipt(draft / FILE, target.name)
        bar.next("writing the runtime's own form")
        write_own_form(draft, target, {name: value.numpy() for name, value in example.items()})
    served = qmodel if target.session is None else load_onnx(draft / FILE, target.name)
    judged = f"fake quantization in PyTorch; {target.title} builds an engine" if served is qmodel else target.title
    # (It says the file's size, so while the file is there.)
    title = "\n".join(str(each.view().title) for each in (calibration, rounding, export) if each is not None)
    return _Made(
        calibration,
        rounding,
        statistics,
        export,
        found,
        evaluate(served, held_out, qmodel, arguments.metric),
        judged,
        title,
    )


def _report(qmodel: PreTrainedModel, made: _Made) -> dict[str, Any]:
    exported = {**made.export.to_json(), "path": str(FILE)}
    shown = None if made.receipt is None else {**made.receipt.to_json(), "path": str(FILE)}
    rounding = None if made.rounding is None else made.rounding.to_json()
    proofs = {"export": exported, "receipt": shown, "evaluation": made.loss.to_json()}
    return {**report_of(qmodel), "rounding": rounding, **proofs}


def _print(made: _Made, report: dict[str, Any], arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(report, indent=2))
        return
    print(made.title)
    for each in (made.export.parity, made.receipt, made.loss):
        if each is not None:
            print()
            show(each, arguments)
    print(f"\nwritten to {arguments.output}; the loss is that on {made.judged}, and {REPORT} has all figures")
    if arguments.report is not None:
        print(f"the page: {arguments.report}")
