"""What the command line says beside its results, and advice of errors in its words: what to type, not Python."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from qdq_surgery.safety.interrupt import COMMAND

__all__ = ["ADVICE", "in_words_of_the_command", "quiet", "say"]

_EXAMPLES = "the command makes its example inputs from config.json: correct that, or convert the model in Python"
_CALIBRATE = "qdq-surgery calibrate MODEL_DIR TEXTS OUTPUT_DIR"

_OVERWRITE = "pass overwrite=True (--overwrite on the command line), or give another path"

#: What errors say to those who program, and to those who type. The longer of two that begin alike comes first.
ADVICE = {
    "pass example_inputs={name: tensor, ...}": _EXAMPLES,
    "pass example_inputs= that it takes": _EXAMPLES,
    "convert with example_inputs= that take it": _EXAMPLES,
    "; call with use_cache=False": "; set use_cache to false in its config.json",
    "calibrate the model (qdq_surgery.calibrate), or disable them": f"calibrate the model: {_CALIBRATE}",
    "call qdq_surgery.convert(model) first": "convert it first: qdq-surgery convert MODEL_DIR OUTPUT_DIR",
    "qdq_surgery.calibrate or learn_ranges": _CALIBRATE,
    "disable them for the export": "leave them out by a rule file's exclude",
    "or dynamic=False": "or --static",
    "export with parity=False": "export with --no-parity",
    "was not written by qdq_surgery.export_onnx": "was not written by qdq-surgery export",
    _OVERWRITE: "add --overwrite, or give another path",
}


def in_words_of_the_command(message: str, options: Iterable[str] = ()) -> str:
    """The message of an error with its advice put for the command line.

    Args:
        options: Those of the command, by which it takes what has the same name in Python: ``--max-loss``.
    """
    known = set(options)
    if "--overwrite" not in known:
        message = message.replace(_OVERWRITE, "give another path")
    for python, words in ADVICE.items():
        message = message.replace(python, words)
    for option in known:
        message = re.sub(rf"(?<![\w./\\-]){option[2:].replace('-', '_')}=", f"{option} ", message)
    return message


def say(what: str, text: str) -> None:
    """A line on standard error, under the command's name."""
    # Without anything that a terminal obeys: names and texts of others may be in it.
    shown = "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)
    print(f"{COMMAND}: {what}: {shown}", file=sys.stderr)


@contextmanager
def quiet() -> Iterator[None]:
    """What transformers would say, this command says itself; whoever calls it from Python has it back afterwards."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
