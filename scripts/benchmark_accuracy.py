"""What INT8 costs on a real model: ours for each target against each runtime's own tools, as files that are deployed.

    python scripts/benchmark_accuracy.py [--texts 500] [--calibration 256] [--samples 3] [--only REGEX] [--markdown]

The model is all-MiniLM-L6-v2, the texts are docstrings of Python's standard library. Each contender is calibrated on
the same texts, once for each sample of them, and judged by the sentence embeddings of other texts against those of the
float model: mean cosine, the share of texts whose nearest other text is the same one, and the cosine of the worst text.
Figures are means over the samples, and the spread between the highest and the lowest mean cosine. What runs on a
runtime runs there, the whole file; "fake quantization" is the PyTorch model.

"tuned" is :func:`qdq_surgery.tune` on the calibration texts, some minutes for each sample; ``--only`` leaves it out.

Contenders whose packages are not installed are skipped with a word (``pip install onnx onnxscript onnxruntime openvino
nncf`` has them all).
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs
from qdq_surgery.cli.demo import agreement, checkpoint, embed, standard_library_texts, token_batches
from qdq_surgery.cli.folder import load_model
from qdq_surgery.text.view import Column, Table, View, line, number
from runtimes.subjects import INPUTS
from runtimes.with_onnxruntime import open_session, quantize_dynamic, quantize_static
from runtimes.with_openvino import compile_model, quantize_by_nncf
from runtimes.workspace import Missing, package, write_float_onnx

Batch = dict[str, Tensor]


@dataclass
class Subject:
    """The model, its tokenizer, and a folder to write to."""

    model: PreTrainedModel
    tokenizer: Any
    folder: Path

    def batches(self, texts: Sequence[str]) -> list[Batch]:
        return list(token_batches(self.tokenizer, texts))

    def float_onnx(self, batch: Batch) -> Path:
        """The float model as an ONNX file, made once."""
        path = self.folder / "float.onnx"
        if not path.is_file():
            write_float_onnx(self.model, batch, path, ["last_hidden_state", "pooler_output"])
        return path


def arrays(batches: list[Batch]) -> list[dict[str, Any]]:
    """The same values for other tools."""
    return [{name: value.numpy() for name, value in batch.items()} for batch in batches]


class _States:
    """What a runtime's own file gives, in the way in which a model gives it."""

    def __init__(self, run: Callable[[dict[str, Any]], Sequence[Any]]) -> None:
        self._run = run

    def __call__(self, **batch: Tensor) -> Any:
        found = self._run({name: batch[name].numpy() for name in INPUTS if name in batch})
        return argparse.Namespace(last_hidden_state=torch.from_numpy(np.asarray(found[0])))


#: From a subject and the calibration batches to what embeds.
Make = Callable[[Subject, list[Batch]], Any]


def prepared(model: PreTrainedModel, rules: str | qs.RuleSet, batches: list[Batch], rounded: bool) -> PreTrainedModel:
    """The converted model, calibrated, its weights rounded for their products or to the nearest: from one pass."""
    qmodel = qs.convert(model, rules)
    statistics = qs.collect(qmodel, batches, moments=rounded)
    qs.calibrate(qmodel, statistics)
    if rounded:
        qs.round_weights(qmodel, statistics)
    return qmodel


def fake_quantized(rules: str, rounded: bool = True) -> Make:
    """The converted PyTorch model."""
    return lambda subject, batches: prepared(subject.model, rules, batches, rounded)


def deployed(rules: str | qs.RuleSet, target: str, rounded: bool = True) -> Make:
    """Our file on its runtime."""

    def make(subject: Subject, batches: list[Batch]) -> Any:
        package(target)
        qmodel = prepared(subject.model, rules, batches, rounded)
        path = subject.folder / "ours.onnx"
        qs.export_onnx(qmodel, path, batches[0], target, overwrite=True)
        return qs.load_onnx(path)

    return make


def tuned(target: str) -> Make:
    """Our file by rules that were tuned on the calibration texts."""

    def make(subject: Subject, batches: list[Batch]) -> Any:
        package(target)
        made = qs.tune(subject.model, batches, target, metric="cosine")
        say(f"{target} tuned: {made!r}")
        return deployed(made.rules, target)(subject, batches)

    return make


def onnxruntime_dynamic(subject: Subject, batches: list[Batch]) -> Any:
    path = quantize_dynamic(subject.float_onnx(batches[0]), subject.folder / "ort-dynamic.onnx")
    return _States(open_session(path, torch.get_num_threads()))


def onnxruntime_static(subject: Subject, batches: list[Batch]) -> Any:
    path = subject.folder / "ort-static.onnx"
    quantize_static(subject.float_onnx(batches[0]), path, arrays(batches), ["MatMul"])
    return _States(open_session(path, torch.get_num_threads()))


def nncf(preset: str | None) -> Make:
    """NNCF's INT8 on OpenVINO, with its default or another preset."""

    def make(subject: Subject, batches: list[Batch]) -> Any:
        package("nncf")
        path = subject.folder / f"nncf-{preset}.xml"
        quantize_by_nncf(subject.float_onnx(batches[0]), path, arrays(batches), preset)
        return _States(compile_model(path, torch.get_num_threads()))

    return make


CONTENDERS: dict[str, tuple[str, Make]] = {
    "ort-dynamic": ("ONNX Runtime's dynamic INT8", onnxruntime_dynamic),
    "ort-static": ("ONNX Runtime's static INT8, MatMul only", onnxruntime_static),
    "nncf": ("NNCF's INT8 on OpenVINO", nncf(None)),
    "nncf-mixed": ("NNCF's INT8 on OpenVINO, preset MIXED", nncf("MIXED")),
    "qdqbert": ("QDQBERT's recipe, fake quantization", fake_quantized("qdqbert", rounded=False)),
    "qdqbert-scaled-nearest": ("with scales (`qdqbert-scaled`)", fake_quantized("qdqbert-scaled", rounded=False)),
    "qdqbert-scaled": ("with scales and adapted rounding", fake_quantized("qdqbert-scaled")),
    "tensorrt-nearest": ("ours for TensorRT, fake quantization", fake_quantized("tensorrt", rounded=False)),
    "tensorrt": ("the same with adapted rounding", fake_quantized("tensorrt")),
    "onnxruntime-nearest": (
        "ours on ONNX Runtime, nearest rounding",
        deployed("onnxruntime", "onnxruntime", rounded=False),
    ),
    "onnxruntime": ("**ours on ONNX Runtime**", deployed("onnxruntime", "onnxruntime")),
    "openvino-nearest": ("ours on OpenVINO, nearest rounding", deployed("openvino", "openvino", rounded=False)),
    "openvino": ("**ours on OpenVINO**", deployed("openvino", "openvino")),
    "onnxruntime-tuned": ("ours on ONNX Runtime, tuned", tuned("onnxruntime")),
    "openvino-tuned": ("ours on OpenVINO, tuned", tuned("openvino")),
    "openvino-full": ("`qdqbert-scaled` on OpenVINO", deployed("qdqbert-scaled", "openvino")),
}


def say(words: str) -> None:
    """Progress: beside what is printed, not in it."""
    print(words, file=sys.stderr, flush=True)


def judged(subject: Subject, make: Make, samples: Sequence[list[Batch]], texts: Sequence[str], wanted: Tensor) -> Any:
    """Cosine, neighbours and the worst cosine, each for every sample."""
    found = []
    for batches in samples:
        embeddings = embed(make(subject, batches), subject.tokenizer, texts, "a contender")
        found.append((*agreement(wanted, embeddings), float((wanted * embeddings).sum(-1).min())))
    return tuple(zip(*found, strict=True))


def row(words: str, figures: Any) -> tuple[str, ...]:
    cosines, neighbours, worst = figures
    spread = max(cosines) - min(cosines)
    return (
        words,
        f"{statistics.mean(cosines):.4f}",
        f"{spread:.4f}",
        f"{statistics.mean(neighbours):.3f}",
        f"{min(worst):.4f}",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=500, help="held-out texts (default 500)")
    parser.add_argument("--calibration", type=int, default=256, help="texts of each sample (default 256)")
    parser.add_argument("--samples", type=int, default=3, help="samples of calibration texts (default 3)")
    parser.add_argument("--only", default="", help="contenders whose names match this regular expression")
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/accuracy.md")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    folder = checkpoint()
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder, local_files_only=True)
    everything = standard_library_texts(sys.maxsize)
    held_out, rest = everything[: options.texts], everything[options.texts :]
    if len(held_out) < 2 or len(rest) < options.calibration:
        sys.exit(f"this Python's standard library has {len(everything)} texts: give fewer --texts or --calibration")
    rows = []
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = Subject(model, tokenizer, Path(temporary))
        drawn = [random.Random(seed).sample(rest, options.calibration) for seed in range(options.samples)]
        samples = [subject.batches(texts) for texts in drawn]
        wanted = embed(model, tokenizer, held_out, "float model")
        for name, (words, make) in CONTENDERS.items():
            if not re.search(options.only, name):
                continue
            try:
                rows.append(row(words, judged(subject, make, samples, held_out, wanted)))
            except Missing as missing:
                say(f"{name} is skipped: {missing}")
                continue
            say(" | ".join(rows[-1]))
    columns = ("", "cosine", "spread", "same nearest text", "worst text")
    if options.markdown:
        print("| " + " | ".join(columns) + " |\n|---|--:|--:|--:|--:|")
        print("\n".join("| " + " | ".join(each) + " |" for each in rows))
        return
    title = f"{options.samples} samples of {options.calibration} texts, {len(held_out)} held-out texts"
    Console(highlight=False).print(View(line(title), (Table((Column(""), *map(number, columns[1:])), tuple(rows)),)))


if __name__ == "__main__":
    main()
