"""The command line. Exit codes: 0 done, 1 the model or the rules cannot be used, 2 the command is wrong."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from transformers.utils import logging as transformers_logging

from qdq_surgery.cli.demo import DEMO_TEXTS, run_demo
from qdq_surgery.cli.files import add_export, add_lint, add_receipt
from qdq_surgery.cli.models import add_calibrate, add_convert, add_evaluate, add_sensitivity, add_tune
from qdq_surgery.cli.options import Commands, say
from qdq_surgery.cli.quantize import add_quantize
from qdq_surgery.cli.report import add_report
from qdq_surgery.cli.views import add_diff, add_explain, add_plan, add_rules
from qdq_surgery.cli.wording import in_words_of_the_command
from qdq_surgery.errors import QdqSurgeryError
from qdq_surgery.safety.interrupt import COMMAND
from qdq_surgery.texts.input_file import printable
from qdq_surgery.version import __version__

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Mistakes of the user end in one line on standard error."""
    commands = parser()
    words = sys.argv[1:] if argv is None else [*argv]
    odd = next((word for word in words if "\0" in word), None)
    if odd is not None:
        commands.error(f"the argument {printable(odd)} holds a NUL character")
    arguments = commands.parse_args(words)
    try:
        with _quiet():
            arguments.run(arguments)
    except QdqSurgeryError as error:
        say("error", in_words_of_the_command(str(error)))
        return 1
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads our output has seen enough (`| head`).
        sys.stderr.close()
        return 0
    return 0


@contextmanager
def _quiet() -> Iterator[None]:
    """What transformers would say, this command says itself; whoever calls it from Python has it back afterwards."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def parser() -> argparse.ArgumentParser:
    """All commands with their options, in the order of a user's way."""
    made = argparse.ArgumentParser(
        prog=COMMAND, description="Put QDQBERT's quantizers into a Hugging Face encoder, by rule files."
    )
    made.add_argument("--version", action="version", version=f"{COMMAND} {__version__}")
    commands = made.add_subparsers(title="commands", required=True, metavar="COMMAND")
    added = (
        add_quantize,
        add_plan,
        add_diff,
        add_explain,
        add_convert,
        add_calibrate,
        add_evaluate,
        add_sensitivity,
        add_tune,
        add_export,
        add_lint,
        add_receipt,
        add_report,
        add_rules,
        _add_demo,
    )
    for add in added:
        add(commands)
    return made


def _add_demo(commands: Commands) -> None:
    command = commands.add_parser("demo", help="convert, calibrate, compare and export the real all-MiniLM-L6-v2")
    command.add_argument("--texts", type=int, default=DEMO_TEXTS, help="held-out texts (default: %(default)s)")
    command.add_argument("--onnx", metavar="FILE", help="keep the ONNX file here")
    command.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    command.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    onnx = None if arguments.onnx is None else Path(arguments.onnx)
    run_demo(texts=arguments.texts, onnx=onnx, overwrite=arguments.overwrite)
