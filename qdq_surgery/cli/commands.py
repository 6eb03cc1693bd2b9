"""The command line. Exit codes: 0 done, 1 the model or the rules cannot be used, 2 the command is wrong.

Only the command that is asked for is imported, and torch with it: ``--help`` is there at once.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import io
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from qdq_surgery.cli.wording import in_words_of_the_command, quiet, say
from qdq_surgery.errors import QdqSurgeryError
from qdq_surgery.safety.interrupt import COMMAND
from qdq_surgery.text.optional_imports import require
from qdq_surgery.texts.input_file import printable
from qdq_surgery.version import __version__

__all__ = ["COMMANDS", "add_completion", "main", "parser"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

_SHELLS = ("bash", "zsh", "tcsh")


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: What is typed.
        help: What it is for.
        module: The module of this package with a function ``add_NAME``, which gives a parser its arguments.
        light: Whether it begins without the package, whose imports take seconds; it imports that when it needs it.
    """

    name: str
    help: str
    module: str
    light: bool = False

    def add_to(self, command: argparse.ArgumentParser) -> None:
        """Give a parser the command's arguments."""
        module = importlib.import_module(f"qdq_surgery.cli.{self.module}")
        add: Callable[[argparse.ArgumentParser], None] = getattr(module, f"add_{self.name}")
        add(command)


#: In the order of a user's way.
COMMANDS = (
    Command(
        "quantize",
        "the whole job: convert, calibrate, write a file for one runtime, prove it, measure the loss",
        "quantize",
    ),
    Command("plan", "list the sites, the refusals and the counts; convert nothing", "views"),
    Command("diff", "show each block's graph before and after", "views"),
    Command("explain", "say which rule put a quantizer where, why, and what was refused", "views"),
    Command("convert", "convert a model and write it with its rules and a report", "models"),
    Command("calibrate", "find the ranges from texts and write the model with them", "models"),
    Command("evaluate", "compare a calibrated model, or its file, with the float model", "models"),
    Command("sensitivity", "measure what each site, kind of site and layer costs in INT8", "models"),
    Command("tune", "find the ranges, scales and grids that keep a model's output best", "models"),
    Command("export", "write a calibrated model as ONNX for one runtime, and check the file", "files"),
    Command("lint", "say which fusion each Q/DQ pair of a file enables or blocks", "files"),
    Command("receipt", "open a file on its runtime, and say what of it runs in INT8", "files"),
    Command("report", "write all that is known of a converted model as one HTML file", "report"),
    Command("rules", "list, show and check rule files", "views"),
    Command("demo", "convert, calibrate, compare and export the real all-MiniLM-L6-v2", "demo.command", light=True),
    Command("completion", "print what makes a shell complete these commands and their options", "commands"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. Mistakes of the user end in one line on standard error."""
    words = sys.argv[1:] if argv is None else [*argv]
    if argv is None:  # the process is this command's
        _print_anything()
    arguments = argparse.Namespace(options=())
    try:
        arguments = _parsed(words)
        with nullcontext() if arguments.light else quiet():
            arguments.run(arguments)
    except QdqSurgeryError as error:
        say("error", in_words_of_the_command(str(error), arguments.options))
        return 1
    except KeyboardInterrupt:
        print(f"{COMMAND}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Whoever reads our output has seen enough (`| head`).
        sys.stderr.close()
        return 0
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        say("error", f"the output cannot be written: {error.strerror}")
        return 1
    return 0


def _print_anything() -> None:
    """What the terminal's encoding lacks is printed as an escape: names in rule files and paths are anybody's."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of the command that the first word names; ends the process where that cannot be."""
    chosen = next((word for word in words if not word.startswith("-")), "")
    commands = parser(chosen)
    odd = next((word for word in words if "\0" in word), None)
    if odd is not None:
        commands.error(f"the argument {printable(odd)} holds a NUL character")
    names = [each.name for each in COMMANDS]
    if chosen and chosen not in names:
        commands.error(f"{printable(chosen)} is no command{_hint(chosen, names)}; there are {', '.join(names)}")
    arguments, unknown = commands.parse_known_args(words)
    if unknown:
        named = " ".join(map(printable, unknown))
        commands.error(f"unrecognized arguments: {named}{_hint(unknown[0].partition('=')[0], arguments.options)}")
    return arguments


def _hint(word: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def parser(chosen: str | None = None) -> argparse.ArgumentParser:
    """All commands, in the order of a user's way.

    Args:
        chosen: The command whose arguments are wanted, and imported; ``None``: those of all.
    """
    made = argparse.ArgumentParser(
        prog=COMMAND, description="Put QDQBERT's quantizers into a Hugging Face encoder, by rule files."
    )
    made.add_argument("--version", action="version", version=f"{COMMAND} {__version__}")
    commands = made.add_subparsers(title="commands", required=True, metavar="COMMAND")
    wanted = [each for each in COMMANDS if chosen in (None, each.name)]
    if not all(each.light for each in wanted):
        importlib.import_module("qdq_surgery.api")  # the whole package, in its order, as `import qdq_surgery` does
    for each in COMMANDS:
        command = commands.add_parser(each.name, help=each.help)
        if each in wanted:
            each.add_to(command)
            command.set_defaults(light=each.light, options=re.findall(r"--[\w-]+", command.format_help()))
    return made


def add_completion(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("shell", metavar="SHELL", choices=_SHELLS, help=", ".join(_SHELLS))
    command.set_defaults(run=_completion)


def _completion(arguments: argparse.Namespace) -> None:
    print(require("shtab", "completion", "completion").complete(parser(), arguments.shell))
