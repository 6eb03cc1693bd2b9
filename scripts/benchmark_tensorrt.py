"""The two ends of benchmark_tensorrt.sh: the files to build engines from, and the report on what trtexec wrote.

    python scripts/benchmark_tensorrt.py files  OUTPUT --shapes 1x128 8x128 [--model FOLDER] [--texts FILE]
    python scripts/benchmark_tensorrt.py report OUTPUT --shapes 1x128 8x128

``files`` writes float16.onnx, the float model in half precision as torch exports it; one file for each of the rule sets
tensorrt, tensorrt-both and tensorrt-none, in half precision with Q/DQ; and the inputs of each shape as raw int64, since
trtexec's own random numbers are no token ids. It prints what the placement linter says of each.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedModel
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs
from qdq_surgery.cli.folder import load_model
from qdq_surgery.onnx_file.writer import draft, replace_text
from qdq_surgery.texts.batches import text_batches
from qdq_surgery.texts.samples import read_samples

FLOAT = "float16"
RULES = ("tensorrt", "tensorrt-both", "tensorrt-none")
INPUTS = ("input_ids", "attention_mask")

#: Of the files: the first that has half-precision scales.
OPSET = 19

#: Batch and tokens that models are traced with, and that random calibration batches have.
TRACED, CALIBRATED = (2, 21), (8, 128)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("files", "report"))
    parser.add_argument("output", type=Path)
    parser.add_argument("--shapes", nargs="+", type=shape_of, required=True, metavar="BATCHxTOKENS")
    parser.add_argument("--model", type=Path, help="a folder of save_pretrained (default: BERT-base, random weights)")
    parser.add_argument("--texts", type=Path, help="to calibrate with, one in each line (default: random tokens)")
    arguments = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    if arguments.step == "files":
        write_files(arguments.output, arguments.shapes, arguments.model, arguments.texts)
    else:
        report(arguments.output, arguments.shapes)


def shape_of(text: str) -> tuple[int, int]:
    batch, cross, tokens = text.partition("x")
    if not (cross and batch.isdigit() and tokens.isdigit() and int(batch) and int(tokens)):
        raise argparse.ArgumentTypeError(f"'{text}' is no shape; write batch and tokens, such as 8x128")
    return int(batch), int(tokens)


def write_files(output: Path, shapes: Sequence[tuple[int, int]], folder: Path | None, texts: Path | None) -> None:
    if texts is not None and folder is None:
        raise SystemExit("--texts needs --model, a folder with a tokenizer")
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = BertForQuestionAnswering(BertConfig()).eval() if folder is None else load_model(folder)
    vocabulary = model.config.get_text_config().vocab_size
    for shape in shapes:
        for name, value in random_batch(shape, vocabulary).items():
            value.numpy().tofile(output / f"{name}.{'x'.join(map(str, shape))}.bin")
    export_float(model, output / f"{FLOAT}.onnx", random_batch(TRACED, vocabulary))
    if folder is None or texts is None:
        batches: Any = [random_batch(CALIBRATED, vocabulary, seed) for seed in range(4)]
    else:
        batches = text_batches(read_samples(texts), model, folder, *CALIBRATED).batches
    for rules in RULES:
        qmodel = qs.convert(model, rules)
        qs.calibrate(qmodel, batches)
        path = output / f"{rules}.onnx"
        # Only these two inputs: token types are constants in the file.
        traced = random_batch(TRACED, vocabulary)
        how: dict[str, Any] = {"opset": OPSET, "precision": "float16", "parity": False, "overwrite": True}
        qs.export_onnx(qmodel, path, traced, "tensorrt", **how)
        Console().print(qs.lint(path), f"\nwrote {path}")


def random_batch(shape: tuple[int, int], vocabulary: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, shape, generator=generator)
    return dict(zip(INPUTS, (ids, torch.ones_like(ids)), strict=True))


def export_float(model: PreTrainedModel, path: Path, batch: dict[str, Tensor]) -> None:
    """The float model in half precision, with the scale of the attention before its first product (torch's sdpa)."""
    half = copy.deepcopy(model).half()
    half.set_attn_implementation("sdpa")
    axes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch}
    with draft(path, overwrite=True) as made, warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of the exporter, about packages that are not needed
        torch.onnx.export(
            half, kwargs=batch, f=made.graph, dynamo=True, dynamic_shapes=axes, opset_version=OPSET, verbose=False
        )


def report(output: Path, shapes: Sequence[tuple[int, int]]) -> None:
    console = Console()
    table = Table(title="TensorRT: median of the GPU's compute time in ms, and times as fast as float16")
    table.add_column("file")
    names = ["x".join(map(str, shape)) for shape in shapes]
    for name in names:
        table.add_column(name, justify="right")
    baseline = [median(output, FLOAT, name) for name in names]
    for file in (FLOAT, *RULES):
        found = [median(output, file, name) for name in names]
        table.add_row(file, *(cell(mine, floats) for mine, floats in zip(found, baseline, strict=True)))
    console.print(table)
    for rules, shape, name, layers in built(output, shapes):
        receipt = qs.receipt(output / f"{rules}.onnx", "tensorrt", layers=layers, shape=shape)
        replace_text(output / f"{rules}.{name}.receipt.json", json.dumps(receipt.to_json(), indent=2))
        console.print(receipt)


def built(output: Path, shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, tuple[int, int], str, Path]]:
    for rules in RULES:
        for shape in shapes:
            name = "x".join(map(str, shape))
            layers = output / f"{rules}.{name}.layers.json"
            if layers.is_file():
                yield rules, shape, name, layers


def median(output: Path, file: str, shape: str) -> float | None:
    """Of the runs that ``trtexec --exportTimes`` wrote; ``None`` if the engine was not built."""
    path = output / f"{file}.{shape}.times.json"
    return statistics.median(run["computeMs"] for run in json.loads(path.read_text())) if path.is_file() else None


def cell(mine: float | None, floats: float | None) -> str:
    if mine is None:
        return "not built"
    return f"{mine:.3f}" if floats is None else f"{mine:.3f} ({floats / mine:.2f} x)"


if __name__ == "__main__":
    main()
