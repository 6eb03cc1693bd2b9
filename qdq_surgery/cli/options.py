"""Arguments that commands share, and what all of them do with these: loading, reading texts, showing."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import Statistics, collect
from qdq_surgery.calibration.ranges import Calibration, calibrate
from qdq_surgery.calibration.rounding import Rounding, round_weights
from qdq_surgery.cli.folder import load_model
from qdq_surgery.cli.wording import say
from qdq_surgery.convert import convert
from qdq_surgery.errors import ModelError
from qdq_surgery.onnx_file.opened import open_exported
from qdq_surgery.sensitivity.evaluate import Evaluation
from qdq_surgery.sensitivity.output_error import DEFAULT as DEFAULT_METRIC
from qdq_surgery.sensitivity.output_error import METRICS
from qdq_surgery.surgery.model_state import quantizers
from qdq_surgery.targets.registry import DEFAULT, runtimes
from qdq_surgery.text.view import Result
from qdq_surgery.texts.batches import text_batches
from qdq_surgery.texts.samples import Sample

__all__ = [
    "FOLDER_HELP",
    "RULES",
    "batches",
    "calibrated",
    "check_loss",
    "check_rules",
    "class_option",
    "load",
    "load_converted",
    "loss_options",
    "model_options",
    "note_ranges",
    "output_options",
    "rounding_option",
    "rules_of",
    "runtime_of",
    "show",
    "text_options",
    "texts_argument",
    "tokenizer_of",
]

#: The rules that are meant where none are named.
RULES = "qdqbert"
FOLDER_HELP = "a folder that model.save_pretrained(...) wrote, with any head"
_WIDEST = 10_000


class _Implied(str):
    """What an option is that nobody gave."""


def texts_argument(command: argparse.ArgumentParser, optional: bool = False) -> None:
    """TEXTS."""
    command.add_argument(
        "texts",
        metavar="TEXTS",
        nargs="?" if optional else None,
        help="a UTF-8 file: one text in each line, or .csv, .tsv or .jsonl with columns; or a folder that datasets "
        "saved; their rows, and .jsonl's, may have 'input_ids' (and 'attention_mask', 'token_type_ids') or 'tokens'",
    )


def text_options(command: argparse.ArgumentParser) -> None:
    """How texts become batches."""
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


def rounding_option(command: argparse.ArgumentParser, default: bool) -> None:
    """Whether weights are rounded for their products."""
    command.add_argument(
        "--round-weights",
        action=argparse.BooleanOptionalAction,
        default=default,
        help="choose the weights' integers by what their products lose on TEXTS, which takes about three times as "
        f"long as calibrating alone and keeps more accuracy (default: {'yes' if default else 'no'})",
    )


def calibrated(
    qmodel: PreTrainedModel,
    data: list[dict[str, Tensor]],
    arguments: argparse.Namespace,
    percentile: float | None = None,
    keep: bool = False,
) -> tuple[Calibration, Rounding | None, Statistics | None]:
    """Calibrate, and round the weights if :func:`rounding_option` says so, from one pass over the data.

    Args:
        keep: Whether the statistics are wanted, with histograms, also where the ranges need none.
    """
    if not (arguments.round_weights or keep):
        return calibrate(qmodel, data, arguments.method, percentile=percentile), None, None
    statistics = collect(qmodel, data, moments=arguments.round_weights)
    made = calibrate(qmodel, statistics, arguments.method, percentile=percentile)
    return made, round_weights(qmodel, statistics) if arguments.round_weights else None, statistics


def runtime_of(arguments: argparse.Namespace) -> str:
    """The runtime that is asked for, or that the file was made for if it opens files here."""
    made_for = str(open_exported(arguments.onnx).metadata.get("target"))
    return arguments.runtime or (made_for if made_for in runtimes() else DEFAULT)


def loss_options(command: argparse.ArgumentParser) -> None:
    """Which figure is the loss, and how much of it may be."""
    command.add_argument("--metric", choices=METRICS, default=DEFAULT_METRIC, help="the loss (default: %(default)s)")
    command.add_argument("--max-loss", type=_loss, metavar="LOSS", help="fail, with exit code 1, if it is more")


def _loss(text: str) -> float:
    """A loss that can be asked for."""
    try:
        loss = float(text)
    except ValueError:
        loss = math.nan
    if not 0 <= loss < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no loss; give a number from 0 on")
    return loss


def check_loss(found: Evaluation, arguments: argparse.Namespace) -> None:
    """Whether the loss is as asked for.

    Raises:
        LossError: It is more.
    """
    if arguments.max_loss is not None:
        found.require(arguments.max_loss)


def model_options(command: argparse.ArgumentParser, converted: bool = True) -> None:
    """MODEL_DIR, and by which rules it is converted, if it may be ``converted`` already."""
    command.add_argument("model", metavar="MODEL_DIR", help=f"{FOLDER_HELP}{', converted or not' if converted else ''}")
    known = "for a model that is not converted yet, " if converted else ""
    help_text = f"{known}a shipped name or a file (default: %(default)s)"
    command.add_argument("--rules", default=_Implied(RULES), help=help_text)
    class_option(command)


def class_option(command: argparse.ArgumentParser) -> None:
    """Of which class the model is."""
    command.add_argument(
        "--class",
        dest="kind",
        metavar="CLASS",
        help="class of the model, such as BertForMaskedLM (default: the one that its config.json names)",
    )


def output_options(command: argparse.ArgumentParser) -> None:
    """How a result is printed."""
    command.add_argument("--json", action="store_true", help="print JSON")
    command.add_argument("--width", type=_columns, help="columns of the text (default: those of the terminal)")


def load(arguments: argparse.Namespace) -> PreTrainedModel:
    """The model of MODEL_DIR."""
    return load_model(arguments.model, arguments.kind, note=lambda text: say("note", text))


def load_converted(arguments: argparse.Namespace) -> PreTrainedModel:
    """The model of MODEL_DIR with its quantizers: its own, or those of ``--rules``.

    Raises:
        ModelError: It is converted, and rules are named.
    """
    model = load(arguments)
    check_rules(model, arguments)
    return model if quantizers(model) else convert(model, rules_of(arguments), inplace=True)


def rules_of(arguments: argparse.Namespace) -> str:
    """The rules of ``--rules``; an empty text, as a shell makes of a variable that is not set, names none."""
    return RULES if arguments.rules is None else str(arguments.rules)


def tokenizer_of(arguments: argparse.Namespace) -> str:
    """The folder of ``--tokenizer``, or the model's; an empty text is none, as of the rules."""
    return str(arguments.model if arguments.tokenizer is None else arguments.tokenizer)


def check_rules(model: PreTrainedModel, arguments: argparse.Namespace) -> None:
    """Whether rules are named only where they are for something.

    Raises:
        ModelError: The model has its own.
    """
    if quantizers(model) and not (arguments.rules is None or isinstance(arguments.rules, _Implied)):
        raise ModelError(f"{arguments.model} is converted already, by its own rules; leave --rules out")


def _columns(text: str) -> int:
    """A width of text."""
    if not (text.isascii() and text.isdecimal() and 0 < int(text) <= _WIDEST):
        raise argparse.ArgumentTypeError(f"{text!r} is no number of columns; give 1 to {_WIDEST}")
    return int(text)


def note_ranges(model: PreTrainedModel) -> None:
    """A word on quantizers without a range, which take each tensor's own: no file would compute that."""
    without = [name for name, each in quantizers(model).items() if each.enabled and each.amax is None]
    if without:
        say(
            "note",
            f"{len(without)} quantizers have no range yet (first: {without[0]}), and take that of each tensor: the "
            "loss is none that a file will have; calibrate the model",
        )


def batches(
    arguments: argparse.Namespace, samples: Sequence[Sample], model: PreTrainedModel, notes: bool = True
) -> list[dict[str, Tensor]]:
    """The texts as the model takes them; what was done to them is said, if ``notes``."""
    data = text_batches(samples, model, tokenizer_of(arguments), arguments.batch, arguments.length)
    for note in data.notes if notes else ():
        say("note", note)
    return data.batches


def show(made: Result, arguments: argparse.Namespace) -> None:
    """Print a result as the options say."""
    if arguments.json:
        print(json.dumps(made.to_json(), indent=2))
    elif arguments.width is not None:
        print(made.to_text(arguments.width))
    else:
        print(made)
