"""What the demo does and shows."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from qdq_surgery.calibration.collect import collect
from qdq_surgery.calibration.ranges import calibrate
from qdq_surgery.calibration.rounding import round_weights
from qdq_surgery.cli.demo.files import DEMO_TEXTS, checkpoint, demo_texts
from qdq_surgery.cli.folder import load_model
from qdq_surgery.convert import convert
from qdq_surgery.numerics.range_choice import RANGE_METHODS
from qdq_surgery.onnx_export import export_onnx
from qdq_surgery.onnx_file.writer import writable
from qdq_surgery.padding.token_masks import token_means
from qdq_surgery.prove.receipt import receipt
from qdq_surgery.report.diff import diff
from qdq_surgery.sensitivity.evaluate import nearest_texts
from qdq_surgery.serve.model import OnnxModel, load_onnx
from qdq_surgery.surgery.model_state import quantizers
from qdq_surgery.targets.registry import DEFAULT, REFERENCE
from qdq_surgery.text.optional_imports import require
from qdq_surgery.text.progress import track
from qdq_surgery.text.view import Column, Table, View, line, number

__all__ = ["agreement", "embed", "run_demo", "token_batches"]

_CALIBRATION_TEXTS = 128
_BATCH = 16


def run_demo(*, texts: int = DEMO_TEXTS, onnx: Path | None = None, overwrite: bool = False) -> None:
    """Convert, show the diff, calibrate, compare with the float model, export, and run the export.

    Args:
        texts: Number of held-out texts.
        onnx: Where to keep the ONNX file; a temporary one is deleted.
        overwrite: Whether a file that is there is replaced.

    Raises:
        ModelError: The checkpoint or an extra is not installed, or there are fewer than two texts.
        ExportError: The ONNX file cannot be written there.
    """
    if onnx is not None:
        writable(onnx, overwrite)
    found = demo_texts(texts, _CALIBRATION_TEXTS)
    folder = checkpoint()
    for name in ("onnx", REFERENCE.runtime, "onnxscript"):
        require(name, "the demo")
    console = Console(highlight=False)
    model = load_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    calibration, held_out = found[:_CALIBRATION_TEXTS], found[_CALIBRATION_TEXTS:]

    start = time.perf_counter()
    qmodel = convert(model)
    converted = time.perf_counter()
    print(diff(model, qmodel))
    collected = time.perf_counter()
    statistics = collect(qmodel, list(token_batches(tokenizer, calibration)))
    console.print(
        f"\nconverted in {converted - start:.2f} s; collected in {time.perf_counter() - collected:.1f} s what every "
        f"method needs, from {len(calibration)} docstrings of the standard library ({statistics.tokens} tokens)\n"
    )

    wanted = embed(model, tokenizer, held_out, "float model")
    rows = []
    residuals = [each for name, each in quantizers(qmodel).items() if name.rpartition(".")[2].startswith("add_")]
    for method, words in ((name, each.in_words()) for name, each in RANGE_METHODS.items()):
        for residual in ("quantized", "float"):
            for quantizer in residuals:
                quantizer.enable() if residual == "quantized" else quantizer.disable()
            calibrate(qmodel, statistics, method)
            embeddings = embed(qmodel, tokenizer, held_out, f"{words}, residual {residual}")
            cosine, neighbours = agreement(wanted, embeddings)
            rows.append((words, residual, f"{cosine:.4f}", f"{neighbours:.3f}"))
    # What is saved and exported: by the rules of the runtime, which has scales for outlier channels.
    qmodel = convert(model, DEFAULT)
    statistics = collect(qmodel, list(token_batches(tokenizer, calibration)), moments=True)
    for words, last in ((f"{DEFAULT}'s rules", calibrate), ("the same, weights rounded for products", round_weights)):
        last(qmodel, statistics)
        embeddings = embed(qmodel, tokenizer, held_out, words)
        cosine, neighbours = agreement(wanted, embeddings)
        rows.append((words, "float", f"{cosine:.4f}", f"{neighbours:.3f}"))
    names = (Column("calibration"), Column("residual adds"), number("cosine"), number("same top-1 neighbour"))
    title = line(f"against the float model, {len(held_out)} held-out docstrings")
    console.print(View(title, (Table(names, tuple(rows)),)))
    with tempfile.TemporaryDirectory() as temporary:
        again = _reload(qmodel, Path(temporary) / "model", console)
        difference = float((embed(again, tokenizer, held_out, "loaded again") - embeddings).abs().max())
        console.print(f"its embeddings differ from those of the model that was saved by {difference:g}")
        path = onnx or Path(temporary) / "model.onnx"
        _deploy(again, tokenizer, held_out, wanted, path, overwrite, console)


def _reload(qmodel: PreTrainedModel, folder: Path, console: Console) -> PreTrainedModel:
    """The model as it is after ``save_pretrained`` and ``from_pretrained``."""
    start = time.perf_counter()
    qmodel.save_pretrained(folder)
    saved = time.perf_counter()
    again: PreTrainedModel = AutoModel.from_pretrained(folder)
    loaded = time.perf_counter()
    console.print(
        f"\nsaved by save_pretrained in {saved - start:.2f} s, loaded by AutoModel.from_pretrained in "
        f"{loaded - saved:.2f} s: {len(quantizers(again))} quantizers with their ranges"
    )
    return again


def token_batches(tokenizer: Any, texts: Sequence[str]) -> Iterable[dict[str, Tensor]]:
    """The texts in batches for the model."""
    for start in range(0, len(texts), _BATCH):
        batch = tokenizer(
            list(texts[start : start + _BATCH]), padding=True, truncation=True, max_length=128, return_tensors="pt"
        )
        yield dict(batch)


def _count(texts: Sequence[str]) -> int:
    return -(-len(texts) // _BATCH)


def embed(model: PreTrainedModel | OnnxModel, tokenizer: Any, texts: Sequence[str], what: str) -> Tensor:
    """Sentence embeddings, (texts, hidden), of length 1: the mean over the tokens of each text."""
    rows = []
    with torch.no_grad():
        for batch in track(token_batches(tokenizer, texts), f"embedding ({what})", _count(texts)):
            rows.append(token_means(model(**batch).last_hidden_state, batch["attention_mask"]))
    return torch.nn.functional.normalize(torch.cat(rows), dim=-1)


def agreement(wanted: Tensor, found: Tensor) -> tuple[float, float]:
    """Mean cosine of each embedding to its float one, and the share of texts whose nearest other text is the same."""
    same = nearest_texts(wanted) == nearest_texts(found)
    return float((wanted * found).sum(-1).mean()), float(same.float().mean())


def _deploy(
    qmodel: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    wanted: Tensor,
    path: Path,
    overwrite: bool,
    console: Console,
) -> None:
    """Export for ONNX Runtime, and hold the file against both models."""
    start = time.perf_counter()
    # Two texts to trace and to compare site by site with.
    batch = next(iter(token_batches(tokenizer, texts[:2])))
    exported = export_onnx(qmodel, path, batch, overwrite=overwrite)
    console.print(f"\nexported and compared in {time.perf_counter() - start:.0f} s")
    console.print(exported)
    console.print(receipt(path))
    cosine, neighbours = agreement(wanted, embed(load_onnx(path), tokenizer, texts, "ONNX Runtime"))
    console.print(
        f"\nthe file on ONNX Runtime against the float model, {len(texts)} held-out docstrings: cosine {cosine:.4f}, "
        f"same top-1 neighbour {neighbours:.3f}"
    )
