"""What INT8 costs on a real model: ours for each target against each runtime's own tools, as files that are deployed.

    python scripts/benchmark_accuracy.py [--texts 500] [--calibration 256] [--samples 3] [--only REGEX] [--markdown]
    python scripts/benchmark_accuracy.py --model rxnfp --reactions schneider50k.tsv     # or --model rxnfp-masked

The model is all-MiniLM-L6-v2, the texts are docstrings of Python's standard library; or one of rxnfp's BERTs on
reactions of US patents. A sample is some texts to calibrate on and others to judge by, drawn anew; each contender has
the same ones. It is judged by embeddings against those of the float model: mean cosine, the share of texts whose
nearest other text is the same one, and the cosine of the worst text; or by the masked tokens that it fills in. Figures
are means over the samples, and the spread between the highest and the lowest first one. What runs on a runtime runs
there, the whole file; "fake quantization" is the PyTorch model.

"tuned" is :func:`qdq_surgery.tune` on the calibration texts, some minutes for each sample; ``--only`` leaves it out.

sentence-transformers' own exporter (the dynamic one; its static one is NNCF) runs in its environment of
``scripts/other_tools.sh``, which ``--tools`` names. Contenders whose packages are not installed are skipped with a word
(``pip install onnx onnxscript onnxruntime openvino nncf``, and with ``--no-deps`` torchao, nvidia-modelopt and what
that asks for).
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
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs
from qdq_surgery.text.view import Column, Table, View, line, number
from runtimes.judged import JUDGED, Batch, Judged, inputs_of
from runtimes.subjects import INPUTS
from runtimes.with_modelopt import quantize_by_modelopt
from runtimes.with_onnxruntime import open_session, quantize_dynamic, quantize_static
from runtimes.with_openvino import compile_model, quantize_by_nncf
from runtimes.with_sentence_transformers import quantize_by_sentence_transformers
from runtimes.with_torch import quantize_by_pt2e
from runtimes.workspace import Missing, package


@dataclass
class Subject:
    """What is judged, and a folder to write to."""

    judged: Judged
    folder: Path
    tools: Path | None = None

    @property
    def model(self) -> PreTrainedModel:
        return self.judged.model

    def float_onnx(self, batch: Batch) -> Path:
        """The float model as an ONNX file, made once."""
        return self.judged.float_onnx(batch, self.folder)

    def states(self, run: Callable[[dict[str, Any]], Sequence[Any]]) -> _States:
        """A runtime's own file, in the way in which a model is called."""
        return _States(run, self.judged.outputs[0])


def arrays(batches: list[Batch]) -> list[dict[str, Any]]:
    """The same values for other tools."""
    return [{name: value.numpy() for name, value in inputs_of(batch).items()} for batch in batches]


class _States:
    """What a runtime's own file gives, in the way in which a model gives it."""

    def __init__(self, run: Callable[[dict[str, Any]], Sequence[Any]], output: str) -> None:
        self._run, self._output = run, output

    def __call__(self, **batch: Tensor) -> Any:
        found = self._run({name: batch[name].numpy() for name in INPUTS if name in batch})
        return argparse.Namespace(**{self._output: torch.from_numpy(np.asarray(found[0]))})


class _Positional(nn.Module):
    """The model with positional inputs and a tuple of outputs, as ``torch.export`` gives it to PT2E."""

    def __init__(self, model: PreTrainedModel, outputs: Sequence[str]) -> None:
        super().__init__()
        self.model, self.outputs = model, outputs

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        found = self.model(**dict(zip(INPUTS, inputs, strict=True)))
        return tuple(getattr(found, output) for output in self.outputs)  # of what gives nothing PT2E makes nothing


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
        qs.export_onnx(qmodel, path, inputs_of(batches[0]), target, overwrite=True)
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
    return subject.states(open_session(path, torch.get_num_threads()))


def sentence_transformers(subject: Subject, _: list[Batch]) -> Any:
    path = quantize_by_sentence_transformers(subject.tools, subject.folder)
    return subject.states(open_session(path, torch.get_num_threads()))


def onnxruntime_static(subject: Subject, batches: list[Batch]) -> Any:
    path = subject.folder / "ort-static.onnx"
    quantize_static(subject.float_onnx(batches[0]), path, arrays(batches), ["MatMul"])
    return subject.states(open_session(path, torch.get_num_threads()))


def nncf(preset: str | None) -> Make:
    """NNCF's INT8 on OpenVINO, with its default or another preset."""

    def make(subject: Subject, batches: list[Batch]) -> Any:
        package("nncf")
        path = subject.folder / f"nncf-{preset}.xml"
        quantize_by_nncf(subject.float_onnx(batches[0]), path, arrays(batches), preset)
        return subject.states(compile_model(path, torch.get_num_threads()))

    return make


def torchao(subject: Subject, batches: list[Batch]) -> Any:
    """Torchao's static INT8: the integers of its own quantize and dequantize operators, without inductor."""
    examples = [tuple(batch[name] for name in INPUTS) for batch in batches]
    made = quantize_by_pt2e(_Positional(subject.model, subject.judged.outputs), examples)
    return subject.states(lambda inputs: made(*(torch.from_numpy(inputs[name]) for name in INPUTS)))


def modelopt(config: str, *without: str) -> Make:
    """ModelOpt's fake quantization; by default it quantizes what a LayerNorm reads, too."""
    return lambda subject, batches: quantize_by_modelopt(subject.model, batches, config, without)


CONTENDERS: dict[str, tuple[str, Make]] = {
    "ort-dynamic": ("ONNX Runtime's dynamic INT8", onnxruntime_dynamic),
    "sentence-transformers": ("sentence-transformers' exporter, dynamic INT8", sentence_transformers),
    "ort-static": ("ONNX Runtime's static INT8, MatMul only", onnxruntime_static),
    "nncf": ("NNCF's INT8 on OpenVINO", nncf(None)),
    "nncf-mixed": ("NNCF's INT8 on OpenVINO, preset MIXED", nncf("MIXED")),
    "torchao": ("torchao's static INT8 (PT2E)", torchao),
    "modelopt": ("ModelOpt's INT8, fake quantization", modelopt("INT8_DEFAULT_CFG")),
    "modelopt-smoothquant": ("ModelOpt's SmoothQuant, fake quantization", modelopt("INT8_SMOOTHQUANT_CFG")),
    "modelopt-smoothquant-linears": (
        "the same without what LayerNorms read",
        modelopt("INT8_SMOOTHQUANT_CFG", "*LayerNorm*"),
    ),
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


@dataclass
class Sample:
    """What each contender is calibrated on, what it is judged by, and what the float model gives for that."""

    calibration: list[Batch]
    held_out: list[Batch]
    wanted: list[Tensor]


def drawn(own: Judged, calibration: int, held_out: int, seed: int) -> Sample:
    """A sample of the data."""
    texts = random.Random(seed).sample(list(own.data), calibration + held_out)
    batches = own.batches(texts[calibration:])
    return Sample(own.batches(texts[:calibration]), batches, own.run(own.model, batches))


def judged(subject: Subject, make: Make, samples: Sequence[Sample]) -> Any:
    """Each figure, for every sample."""
    own = subject.judged
    found = [
        own.figures(each.held_out, each.wanted, own.run(make(subject, each.calibration), each.held_out))
        for each in samples
    ]
    return tuple(zip(*found, strict=True))


def row(words: str, figures: Any, subject: Judged) -> tuple[str, ...]:
    told = [
        f"{min(each) if name in subject.worst else statistics.mean(each):.4f}"
        for name, each in zip(subject.columns, figures, strict=True)
    ]
    return (words, told[0], f"{max(figures[0]) - min(figures[0]):.4f}", *told[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=500, help="held-out texts of each sample (default 500)")
    parser.add_argument("--calibration", type=int, default=256, help="of each sample (default 256)")
    parser.add_argument("--samples", type=int, default=3, help="draws of texts (default 3)")
    parser.add_argument("--only", default="", help="contenders whose names match this regular expression")
    parser.add_argument("--model", choices=JUDGED, default="minilm", help="what is judged (default minilm)")
    parser.add_argument("--reactions", type=Path, metavar="FILE", help="for rxnfp: a table with a column rxn")
    parser.add_argument("--tools", type=Path, metavar="FOLDER", help="environments of scripts/other_tools.sh")
    parser.add_argument("--markdown", action="store_true", help="print a table for docs/accuracy.md")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    try:
        model = JUDGED[options.model](options)
    except Missing as missing:
        sys.exit(f"{options.model}: {missing}")
    if options.texts < 2 or len(model.data) < options.texts + options.calibration:
        sys.exit(f"there are {len(model.data)} texts: give fewer --texts or --calibration")
    rows = []
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        subject = Subject(model, Path(temporary), options.tools if options.model == "minilm" else None)
        samples = [drawn(model, options.calibration, options.texts, seed) for seed in range(options.samples)]
        for name, (words, make) in CONTENDERS.items():
            if not re.search(options.only, name):
                continue
            try:
                rows.append(row(words, judged(subject, make, samples), model))
            except Missing as missing:
                say(f"{name} is skipped: {missing}")
                continue
            say(" | ".join(rows[-1]))
    columns = ("", model.columns[0], "spread", *model.columns[1:])
    if options.markdown:
        print("| " + " | ".join(columns) + " |\n|---" + "|--:" * (len(columns) - 1) + "|")
        print("\n".join("| " + " | ".join(each) + " |" for each in rows))
        return
    title = f"{model.words}: {options.samples} samples of {options.calibration} texts, {options.texts} others"
    Console(highlight=False).print(View(line(title), (Table((Column(""), *map(number, columns[1:])), tuple(rows)),)))


if __name__ == "__main__":
    main()
