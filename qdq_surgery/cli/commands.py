"""The command line. Exit codes: 0 done, 1 the model or the rules cannot be used, 2 the command is wrong."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from qdq_surgery.calibration.ranges import calibrate, check_method
from qdq_surgery.cli.demo import DEMO_TEXTS, run_demo
from qdq_surgery.cli.folder import check_new, load_model, save_model
from qdq_surgery.cli.wording import in_words_of_the_command
from qdq_surgery.convert import convert, plan
from qdq_surgery.errors import ModelError, OptionError, QdqSurgeryError
from qdq_surgery.numerics.range_choice import method_names, takes_percentile
from qdq_surgery.numerics.range_methods import DEFAULT_PERCENTILE
from qdq_surgery.onnx_export import Export, export_onnx
from qdq_surgery.onnx_file.writer import writable
from qdq_surgery.prove.receipt import receipt
from qdq_surgery.report.diff import diff
from qdq_surgery.rules.yaml_file import load_rules, shipped_rules
from qdq_surgery.safety.interrupt import COMMAND
from qdq_surgery.sensitivity.measure import sensitivity
from qdq_surgery.sensitivity.output_error import DEFAULT as DEFAULT_METRIC
from qdq_surgery.sensitivity.output_error import METRICS
from qdq_surgery.surgery.model_state import plan_of, quantizers
from qdq_surgery.targets.registry import DEFAULT, REFERENCE, TARGETS
from qdq_surgery.targets.target import ACTIVATIONS, PRECISIONS, full_precision
from qdq_surgery.text.progress import steps
from qdq_surgery.text.view import Column, Result, Table
from qdq_surgery.texts.batches import text_batches
from qdq_surgery.texts.input_file import printable
from qdq_surgery.texts.samples import Sample, read_samples
from qdq_surgery.tuning.result import rule_file
from qdq_surgery.tuning.search import tune
from qdq_surgery.version import __version__

__all__ = ["main"]

_RULES = "qdqbert"
_WIDEST = 10_000
_FOLDER_HELP = "a folder that model.save_pretrained(...) wrote, with any head"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Mistakes of the user end in one line on standard error."""
    parser = _parser()
    words = sys.argv[1:] if argv is None else [*argv]
    odd = next((word for word in words if "\0" in word), None)
    if odd is not None:
        parser.error(f"the argument {printable(odd)} holds a NUL character")
    arguments = parser.parse_args(words)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        arguments.run(arguments)
    except QdqSurgeryError as error:
        _say("error", in_words_of_the_command(str(error)))
        return 1
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads our output has seen enough (`| head`).
        sys.stderr.close()
        return 0
    return 0


def _say(what: str, text: str) -> None:
    # Without anything that a terminal obeys: names and texts of others may be in it.
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    print(f"{COMMAND}: {what}: {shown}", file=sys.stderr)


#: Where a command is added to.
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description="Put QDQBERT's quantizers into a Hugging Face encoder, by rule files."
    )
    parser.add_argument("--version", action="version", version=f"{COMMAND} {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    added = (
        _add_convert,
        _add_calibrate,
        _add_sensitivity,
        _add_tune,
        _add_diff,
        _add_plan,
        _add_rules,
        _add_export,
        _add_demo,
    )
    for add in added:
        add(commands)
    return parser


def _add_convert(commands: _Commands) -> None:
    command = commands.add_parser("convert", help="convert a model and write it with its rules and a report")
    _model_options(command)
    command.add_argument("output", metavar="OUTPUT_DIR", help="a new folder")
    command.set_defaults(run=_convert)


def _add_calibrate(commands: _Commands) -> None:
    command = commands.add_parser("calibrate", help="find the ranges from texts and write the model with them")
    command.add_argument("model", metavar="MODEL_DIR", help=f"{_FOLDER_HELP}, with its tokenizer; converted or not")
    _texts_argument(command)
    command.add_argument("output", metavar="OUTPUT_DIR", help="a new folder")
    _class_option(command)
    command.add_argument("--rules", help=f"for a model that is not converted yet (default: {_RULES})")
    command.add_argument("--method", choices=method_names(), help="for all activations (default: each by its rule)")
    command.add_argument("--percentile", type=float, help=f"with --method percentile (default: {DEFAULT_PERCENTILE})")
    _text_options(command)
    command.set_defaults(run=_calibrate)


def _texts_argument(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "texts",
        metavar="TEXTS",
        help="a UTF-8 file: one text in each line, or .csv, .tsv or .jsonl with columns; .jsonl may have 'input_ids' "
        "(and 'attention_mask', 'token_type_ids') or 'tokens' in each row",
    )


def _text_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--column",
        metavar="NAME",
        action="append",
        default=[],
        help="which column has the texts (default: text, or sentence); twice for pairs of texts",
    )
    command.add_argument("--tokenizer", metavar="FOLDER", help="has the tokenizer (default: the model's folder)")
    command.add_argument("--batch", type=int, default=16, help="texts in a batch (default: %(default)s)")
    command.add_argument("--length", type=int, help="most tokens of a text (default: 128, or what the model takes)")


def _add_sensitivity(commands: _Commands) -> None:
    command = commands.add_parser("sensitivity", help="measure what each site, kind of site and layer costs in INT8")
    command.add_argument("model", metavar="MODEL_DIR", help="a folder that calibrate wrote, with its tokenizer")
    _texts_argument(command)
    _class_option(command)
    command.add_argument("--metric", choices=METRICS, default=DEFAULT_METRIC, help="(default: %(default)s)")
    command.add_argument("--sites", action="store_true", help="measure sites, and of the rest only what is named, too")
    command.add_argument("--kinds", action="store_true", help="kinds of sites, likewise; takes a few runs only")
    command.add_argument("--layers", action="store_true", help="encoder layers, likewise")
    command.add_argument("--fold", action="store_true", help="show sites that differ only in their layer as one")
    command.add_argument("--resume", metavar="FILE", help="keep the figures here, and go on from it if it is there")
    _text_options(command)
    _output_options(command)
    command.set_defaults(run=_sensitivity)


def _add_tune(commands: _Commands) -> None:
    command = commands.add_parser("tune", help="find the ranges, scales and grids that keep a model's output best")
    command.add_argument("model", metavar="MODEL_DIR", help=f"{_FOLDER_HELP}, with its tokenizer; not converted")
    _texts_argument(command)
    command.add_argument("output", metavar="RULES_FILE", help="the rule file to write, a new .yaml")
    _class_option(command)
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
    _text_options(command)
    _output_options(command)
    command.set_defaults(run=_tune)


def _add_diff(commands: _Commands) -> None:
    command = commands.add_parser("diff", help="show each block's graph before and after")
    _model_options(command)
    _output_options(command)
    command.set_defaults(run=_diff)


def _add_plan(commands: _Commands) -> None:
    command = commands.add_parser("plan", help="list the sites, the refusals and the counts; convert nothing")
    _model_options(command)
    _output_options(command)
    command.set_defaults(run=_plan)


def _add_rules(commands: _Commands) -> None:
    command = commands.add_parser("rules", help="list, show and check rule files")
    actions = command.add_subparsers(title="actions", required=True, metavar="ACTION")
    action = actions.add_parser("list", help="the rule sets that come with the package")
    action.set_defaults(run=_rules_list)
    action = actions.add_parser("show", help="print a rule file")
    action.add_argument("rules", metavar="RULES", help="a shipped name or a file")
    action.set_defaults(run=_rules_show)
    action = actions.add_parser("check", help="read a rule file and say what is wrong with it")
    action.add_argument("rules", metavar="RULES", help="a shipped name or a file")
    action.add_argument("--model", metavar="MODEL_DIR", help="check that it fits this model, too")
    _class_option(action)
    action.set_defaults(run=_rules_check)


def _add_export(commands: _Commands) -> None:
    command = commands.add_parser("export", help="write a calibrated model as ONNX for one runtime, and check the file")
    command.add_argument("model", metavar="MODEL_DIR", help="a folder that calibrate wrote")
    command.add_argument("output", metavar="FILE", help="the ONNX file to write")
    command.add_argument("--target", choices=TARGETS, default=DEFAULT, help="(default: %(default)s)")
    command.add_argument("--opset", type=int, help="version of ONNX's operators (default: the target's)")
    command.add_argument("--activations", choices=ACTIVATIONS, help="integers of activations (default: the target's)")
    command.add_argument(
        "--precision", type=full_precision, choices=PRECISIONS, help="what is not INT8 (default: the target's)"
    )
    command.add_argument("--static", action="store_true", help="only the shape of the example: 2 rows of 21 tokens")
    command.add_argument("--no-parity", action="store_true", help="do not compare the file with the model")
    command.add_argument("--receipt", action="store_true", help="show what the runtime makes of the file")
    command.add_argument("--overwrite", action="store_true", help="replace FILE if it exists")
    _output_options(command)
    command.set_defaults(run=_export, refuse=command.error)


def _add_demo(commands: _Commands) -> None:
    command = commands.add_parser("demo", help="convert, calibrate, compare and export the real all-MiniLM-L6-v2")
    command.add_argument("--texts", type=int, default=DEMO_TEXTS, help="held-out texts (default: %(default)s)")
    command.add_argument("--onnx", metavar="FILE", help="keep the ONNX file here")
    command.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    command.set_defaults(run=_demo)


def _model_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="MODEL_DIR", help=_FOLDER_HELP)
    command.add_argument("--rules", default=_RULES, help="a shipped name or a file (default: %(default)s)")
    _class_option(command)


def _class_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--class",
        dest="kind",
        metavar="CLASS",
        help="class of the model, such as BertForMaskedLM (default: the one that its config.json names)",
    )


def _output_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--width", type=_columns, help="columns of the text (default: those of the terminal)")


def _load(arguments: argparse.Namespace) -> PreTrainedModel:
    return load_model(arguments.model, arguments.kind, note=lambda text: _say("note", text))


def _columns(text: str) -> int:
    """A width of text."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= _WIDEST):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of columns; give 1 to {_WIDEST}")
    return int(text)


def _convert(arguments: argparse.Namespace) -> None:
    with steps(3) as bar:
        bar.next("loading")
        model = _load(arguments)
        bar.next("converting")
        qmodel = convert(model, arguments.rules, inplace=True)
        bar.next("writing")
        save_model(qmodel, arguments.output, source=arguments.model)
    print(plan_of(qmodel))
    print(f"\nwritten to {arguments.output}; its ranges are not calibrated yet")


def _calibrate(arguments: argparse.Namespace) -> None:
    if arguments.percentile is not None and not takes_percentile(arguments.method):
        raise OptionError("--percentile goes with --method percentile only")
    check_method(arguments.method, arguments.percentile)
    check_new(arguments.output)
    samples = read_samples(arguments.texts, arguments.column)
    tokenizer = arguments.tokenizer or arguments.model
    with steps(2) as bar:
        bar.next("loading")
        model = _load(arguments)
        data = _batches(arguments, samples, model)
        bar.next("converting")
        if quantizers(model) and arguments.rules is not None:
            raise ModelError(f"{arguments.model} is converted already, by its own rules; leave --rules out")
        qmodel = model if quantizers(model) else convert(model, arguments.rules or _RULES, inplace=True)
    made = calibrate(qmodel, data, arguments.method, percentile=arguments.percentile)
    save_model(qmodel, arguments.output, source=tokenizer)
    print(made)
    print(f"\nwritten to {arguments.output}")


def _batches(
    arguments: argparse.Namespace, samples: Sequence[Sample], model: PreTrainedModel
) -> list[dict[str, Tensor]]:
    """The texts as the model takes them; what was done to them is said."""
    tokenizer = arguments.tokenizer or arguments.model
    data = text_batches(samples, model, tokenizer, arguments.batch, arguments.length)
    for note in data.notes:
        _say("note", note)
    return data.batches


def _sensitivity(arguments: argparse.Namespace) -> None:
    samples = read_samples(arguments.texts, arguments.column)
    with steps(1) as bar:
        bar.next("loading")
        model = _load(arguments)
        plan_of(model)  # it is converted
        data = _batches(arguments, samples, model)
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
    _show(made.folded() if arguments.fold else made, arguments)


def _tune(arguments: argparse.Namespace) -> None:
    output = rule_file(arguments.output)  # before the work of minutes
    samples = read_samples(arguments.texts, arguments.column)
    others = None if arguments.held_out is None else read_samples(arguments.held_out, arguments.column)
    with steps(1) as bar:
        bar.next("loading")
        model = _load(arguments)
        data = _batches(arguments, samples, model)
        held_out = None if others is None else _batches(arguments, others, model)
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
    _show(made, arguments)
    made.save(output)
    if not arguments.json:
        print(f"\nwritten to {arguments.output}; convert and calibrate with --rules {arguments.output}")


def _diff(arguments: argparse.Namespace) -> None:
    with steps(3) as bar:
        bar.next("loading")
        model = _load(arguments)
        bar.next("converting")
        qmodel = convert(model, arguments.rules)
        bar.next("comparing")
        made = diff(model, qmodel)
    _show(made, arguments)


def _plan(arguments: argparse.Namespace) -> None:
    with steps(2) as bar:
        bar.next("loading")
        model = _load(arguments)
        bar.next("matching")
        made = plan(model, arguments.rules)
    _show(made, arguments)


def _show(made: Result, arguments: argparse.Namespace) -> None:
    if arguments.json:
        print(json.dumps(made.to_json(), indent=2))
    elif arguments.width is not None:
        print(made.to_text(arguments.width))
    else:
        print(made)


def _rules_list(_: argparse.Namespace) -> None:
    found = ((name, load_rules(name)) for name in shipped_rules())
    rows = tuple((name, str(len(rules.rules)), rules.why) for name, rules in found)
    Console(highlight=False).print(Table((Column("name"), Column("rules"), Column("what")), rows))


def _rules_show(arguments: argparse.Namespace) -> None:
    print(load_rules(arguments.rules).text, end="")


def _rules_check(arguments: argparse.Namespace) -> None:
    rules = load_rules(arguments.rules)
    print(f"{rules.name}: {len(rules.rules)} rules, {len(rules.exclude)} exclusions, no mistake found")
    for rule in rules.rules:
        print(f"  {rule.name} ({rule.source}): {rule.pattern}; {rule.scope}")
    if arguments.model is not None:
        made = plan(_load(arguments), rules)
        print(f"fits {Path(arguments.model).name} ({made.model}): {made.counted()} in {made.layers} layers")


def _export(arguments: argparse.Namespace) -> None:
    if arguments.receipt:
        session = TARGETS[arguments.target].session or arguments.refuse(
            f"--receipt of {arguments.target} needs the layers of a built engine: leave it out, build the engine, and "
            "call qdq_surgery.receipt(FILE, layers=...)"
        )
        REFERENCE.package("a receipt")  # it counts multiply-adds
        session.package("a receipt")
    writable(arguments.output, arguments.overwrite)  # before the model is loaded
    with steps(2) as bar:
        bar.next("loading")
        model = load_model(arguments.model)
        bar.next("exporting" if arguments.no_parity else "exporting and comparing")
        made = export_onnx(
            model,
            arguments.output,
            target=arguments.target,
            opset=arguments.opset,
            dynamic=not arguments.static,
            parity=not arguments.no_parity,
            activations=arguments.activations,
            precision=arguments.precision,
            overwrite=arguments.overwrite,
        )
    if arguments.json:
        _export_json(made, arguments)
        return
    _show(made, arguments)
    if arguments.receipt:
        found = receipt(made.path)
        print()
        _show(found, arguments)


def _export_json(made: Export, arguments: argparse.Namespace) -> None:
    """One object, whether or not there is a receipt: the file is written."""
    shown = made.to_json()
    try:
        if arguments.receipt:
            shown["receipt"] = receipt(made.path).to_json()
    finally:
        print(json.dumps(shown, indent=2))


def _demo(arguments: argparse.Namespace) -> None:
    onnx = None if arguments.onnx is None else Path(arguments.onnx)
    run_demo(texts=arguments.texts, onnx=onnx, overwrite=arguments.overwrite)
