"""Commands about files for runtimes: export, lint, receipt."""

from __future__ import annotations

import argparse
import json

from qdq_surgery.cli.folder import load_model
from qdq_surgery.cli.options import output_options, show
from qdq_surgery.errors import OptionError
from qdq_surgery.onnx_export import Export, export_onnx
from qdq_surgery.onnx_file.writer import writable
from qdq_surgery.prove.lint import lint
from qdq_surgery.prove.receipt import receipt
from qdq_surgery.targets.registry import DEFAULT, REFERENCE, TARGETS
from qdq_surgery.targets.target import ACTIVATIONS, PRECISIONS, full_precision
from qdq_surgery.text.progress import steps

__all__ = ["add_export", "add_lint", "add_receipt"]


def add_export(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
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
    output_options(command)
    command.set_defaults(run=_export, refuse=command.error)


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
    show(made, arguments)
    if arguments.receipt:
        found = receipt(made.path)
        print()
        show(found, arguments)


def _export_json(made: Export, arguments: argparse.Namespace) -> None:
    """One object, whether or not there is a receipt: the file is written."""
    shown = made.to_json()
    try:
        if arguments.receipt:
            shown["receipt"] = receipt(made.path).to_json()
    finally:
        print(json.dumps(shown, indent=2))


def add_lint(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("file", metavar="FILE", help="an ONNX file with Q/DQ pairs, of export or of another tool")
    command.add_argument("--target", choices=TARGETS, help="(default: the one that the file was exported for)")
    output_options(command)
    command.set_defaults(run=_lint)


def _lint(arguments: argparse.Namespace) -> None:
    show(lint(arguments.file, arguments.target), arguments)


def add_receipt(command: argparse.ArgumentParser) -> None:
    """Its arguments."""
    command.add_argument("file", metavar="FILE", help="an ONNX file that export wrote")
    command.add_argument("--target", choices=TARGETS, help="(default: the one that the file was exported for)")
    command.add_argument("--layers", metavar="JSON", help="for tensorrt: what trtexec --exportLayerInfo wrote")
    command.add_argument("--require", type=float, metavar="SHARE", help="fail if less of the linears runs in INT8")
    output_options(command)
    command.set_defaults(run=_receipt)


def _receipt(arguments: argparse.Namespace) -> None:
    if arguments.require is not None and not 0 < arguments.require <= 1:
        raise OptionError(f"--require {arguments.require:g} is no share; give above 0, at most 1")
    found = receipt(arguments.file, arguments.target, layers=arguments.layers)
    show(found, arguments)
    if arguments.require is not None:
        found.require(linear=arguments.require, leftover=None)
