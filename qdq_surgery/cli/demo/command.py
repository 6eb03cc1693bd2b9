"""The command ``demo``."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path

from qdq_surgery.cli.demo.files import DEMO_TEXTS, TEXTS, write_files
from qdq_surgery.cli.wording import quiet
from qdq_surgery.errors import OptionError

__all__ = ["add_demo"]


def add_demo(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("--texts", type=int, default=DEMO_TEXTS, help="held-out texts (default: %(default)s)")
    command.add_argument("--onnx", metavar="FILE", help="keep the ONNX file here")
    command.add_argument(
        "--files",
        metavar="FOLDER",
        help=f"only write its model, tokenizer and texts (as {TEXTS}) into a new folder, for other commands",
    )
    command.add_argument("--overwrite", action="store_true", help="replace that file if it exists")
    command.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    if arguments.files is not None:
        if arguments.onnx is not None or arguments.overwrite:
            raise OptionError("--files writes the model and texts alone; leave --onnx and --overwrite out, or --files")
        write_files(arguments.files, arguments.texts)
        print(f"written to {arguments.files}: all-MiniLM-L6-v2, its tokenizer, and {arguments.texts} texts in {TEXTS}")
        return
    onnx = None if arguments.onnx is None else Path(arguments.onnx)
    importlib.import_module("qdq_surgery.api")  # the whole package, in its order
    run = importlib.import_module("qdq_surgery.cli.demo.run")
    with quiet():
        run.run_demo(texts=arguments.texts, onnx=onnx, overwrite=arguments.overwrite)
