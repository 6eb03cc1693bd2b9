"""Commands that make or measure a model: convert, calibrate, evaluate, sensitivity, tune."""

from __future__ import annotations

import argparse

from qdq_surgery.calibration.ranges import check_method
from qdq_surgery.cli.folder import save_model
from qdq_surgery.cli.options import (
    FOLDER_HELP,
    RULES,
    batches,
    calibrated,
    check_loss,
    check_rules,
    class_option,
    load,
    loss_options,
    model_options,
    note_ranges,
    output_options,
    rounding_option,
    rules_of,
    runtime_of,
    show,
    text_options,
    texts_argument,
    tokenizer_of,
)
from qdq_surgery.convert import convert
from qdq_surgery.errors import OptionError
from qdq_surgery.numerics.range_choice import method_names, takes_percentile
from qdq_surgery.numerics.range_methods import DEFAULT_PERCENTILE
from qdq_surgery.safety.whole_folder import check_new
from qdq_surgery.sensitivity.evaluate import evaluate
from qdq_surgery.sensitivity.measure import sensitivity
from qdq_surgery.sensitivity.output_error import DEFAULT as DEFAULT_METRIC
from qdq_surgery.sensitivity.output_error import METRICS
from qdq_surgery.serve.model import load_onnx
from qdq_surgery.surgery.model_state import plan_of, quantizers
from qdq_surgery.targets.registry import DEFAULT, runtimes
from qdq_surgery.text.progress import steps
from qdq_surgery.texts.samples import read_samples
from qdq_surgery.tuning.result import rule_file
from qdq_surgery.tuning.search import tune

__all__ = ["add_calibrate", "add_convert", "add_evaluate", "add_sensitivity", "add_tune"]


def add_convert(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    model_options(command, converted=False)
    command.add_argument("output", metavar="OUTPUT_DIR", help="a new folder")
    command.set_defaults(run=_convert)


def _convert(arguments: argparse.Namespace) -> None:
    with steps(3) as bar:
        bar.next("loading")
        model = load(arguments)
        bar.next("converting")
        qmodel = convert(model, arguments.rules, inplace=True)
        bar.next("writing")
        save_model(qmodel, arguments.output, source=arguments.model)
    print(plan_of(qmodel))
    print(f"\nwritten to {arguments.output}; its ranges are not calibrated yet")


def add_calibrate(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("model", metavar="MODEL_DIR", help=f"{FOLDER_HELP}, with its tokenizer; converted or not")
    texts_argument(command)
    command.add_argument("output", metavar="OUTPUT_DIR", help="a new folder")
    class_option(command)
    command.add_argument("--rules", help=f"for a model that is not converted yet (default: {RULES})")
    command.add_argument("--method", choices=method_names(), help="for all activations (default: each by its rule)")
    command.add_argument("--percentile", type=float, help=f"with --method percentile (default: {DEFAULT_PERCENTILE})")
    rounding_option(command, default=False)
    text_options(command)
    command.set_defaults(run=_calibrate)


def _calibrate(arguments: argparse.Namespace) -> None:
    if arguments.percentile is not None and not takes_percentile(arguments.method):
        raise OptionError("--percentile goes with --method percentile only")
    check_method(arguments.method, arguments.percentile)
    check_new(arguments.output)
    samples = read_samples(arguments.texts, arguments.column)
    tokenizer = tokenizer_of(arguments)
    with steps(2) as bar:
        bar.next("loading")
        model = load(arguments)
        data = batches(arguments, samples, model)
        bar.next("converting")
        check_rules(model, arguments)
        qmodel = model if quantizers(model) else convert(model, rules_of(arguments), inplace=True)
    made, rounding, _ = calibrated(qmodel, data, arguments, percentile=arguments.percentile)
    save_model(qmodel, arguments.output, source=tokenizer)
    print(made)
    if rounding is not None:
        print(f"\n{rounding}")
    print(f"\nwritten to {arguments.output}")


def add_evaluate(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("model", metavar="MODEL_DIR", help="a folder that calibrate wrote, with its tokenizer")
    texts_argument(command)
    class_option(command)
    command.add_argument("--onnx", metavar="FILE", help="judge this file, exported from it, in place of the model")
    command.add_argument("--runtime", choices=runtimes(), help="that opens the file (default: the one it is made for)")
    loss_options(command)
    text_options(command)
    output_options(command)
    command.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    if arguments.runtime is not None and arguments.onnx is None:
        raise OptionError("--runtime goes with --onnx FILE only")
    samples = read_samples(arguments.texts, arguments.column)
    with steps(1) as bar:
        bar.next("loading")
        model = load(arguments)
        plan_of(model)  # it is converted
        data = batches(arguments, samples, model)
        file = None if arguments.onnx is None else load_onnx(arguments.onnx, runtime_of(arguments))
    note_ranges(model)
    found = evaluate(model if file is None else file, data, model, arguments.metric)
    show(found, arguments)
    check_loss(found, arguments)


def add_sensitivity(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("model", metavar="MODEL_DIR", help="a folder that calibrate wrote, with its tokenizer")
    texts_argument(command)
    class_option(command)
    command.add_argument("--metric", choices=METRICS, default=DEFAULT_METRIC, help="(default: %(default)s)")
    command.add_argument("--sites", action="store_true", help="measure sites, and of the rest only what is named, too")
    command.add_argument("--kinds", action="store_true", help="kinds of sites, likewise; takes a few runs only")
    command.add_argument("--layers", action="store_true", help="encoder layers, likewise")
    command.add_argument("--fold", action="store_true", help="show sites that differ only in their layer as one")
    command.add_argument("--resume", metavar="FILE", help="keep the figures here, and go on from it if it is there")
    text_options(command)
    output_options(command)
    command.set_defaults(run=_sensitivity)


def _sensitivity(arguments: argparse.Namespace) -> None:
    samples = read_samples(arguments.texts, arguments.column)
    with steps(1) as bar:
        bar.next("loading")
        model = load(arguments)
        plan_of(model)  # it is converted
        data = batches(arguments, samples, model)
    every = not (arguments.sites or arguments.kinds or arguments.layers)
    made = sensitivity(
        model,
        data,
        arguments.metric,
        sites=every or arguments.sites,
        kinds=every or arguments.kinds,
        layers=every or arguments.layers,
        resume=arguments.resume,
    )
    show(made.folded() if arguments.fold else made, arguments)


def add_tune(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("model", metavar="MODEL_DIR", help=f"{FOLDER_HELP}, with its tokenizer; not converted")
    texts_argument(command)
    command.add_argument("output", metavar="RULES_FILE", help="the rule file to write, a new .yaml")
    class_option(command)
    command.add_argument(
        "--target",
        default=DEFAULT,
        metavar="RULES",
        help="rules to begin with: a name or a file (default: %(default)s)",
    )
    command.add_argument("--budget", type=float, help="the most that the error may be (default: as little as it can)")
    command.add_argument("--metric", choices=METRICS, default=DEFAULT_METRIC, help="(default: %(default)s)")
    command.add_argument("--held-out", metavar="TEXTS", help="other texts, on which the errors are reported")
    command.add_argument(
        "--float-share",
        type=float,
        default=0.1,
        help="share of the multiply-adds that may stay in float to meet the budget (default: %(default)s)",
    )
    text_options(command)
    output_options(command)
    command.set_defaults(run=_tune)


def _tune(arguments: argparse.Namespace) -> None:
    output = rule_file(arguments.output)  # before the work of minutes
    samples = read_samples(arguments.texts, arguments.column)
    others = None if arguments.held_out is None else read_samples(arguments.held_out, arguments.column)
    with steps(1) as bar:
        bar.next("loading")
        model = load(arguments)
        data = batches(arguments, samples, model)
        held_out = None if others is None else batches(arguments, others, model)
    made = tune(
        model,
        data,
        arguments.target,
        arguments.budget,
        metric=arguments.metric,
        held_out=held_out,
        float_share=arguments.float_share,
        name=output.stem,
    )
    show(made, arguments)
    made.save(output)
    if not arguments.json:
        print(f"\nwritten to {arguments.output}; convert and calibrate with --rules {arguments.output}")
