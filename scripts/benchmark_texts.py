"""Texts as they come, and sorted: sentences per second of one file, in arrival order and by ``run_rows``.

    python scripts/benchmark_texts.py [--texts 5000] [--runs 3] [--batch 32] [--only REGEX]

The model is all-MiniLM-L6-v2, the texts are docstrings of Python's standard library, drawn with repetition and cut at
256 tokens. In arrival order means batches of one number of rows, each padded to its longest text. All kinds take turns;
what counts is the ratio of medians. The embeddings of both are compared.
"""

from __future__ import annotations

import argparse
import functools
import random
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs
from qdq_surgery.cli.demo.files import checkpoint
from qdq_surgery.cli.demo.run import token_batches
from qdq_surgery.cli.folder import load_model
from qdq_surgery.padding.token_masks import token_means
from qdq_surgery.text.view import Column, Table, View, line, number
from qdq_surgery.texts.standard_library import standard_library_texts

_LENGTH = 256


@torch.no_grad()
def in_order(model: Any, tokenizer: Any, texts: Sequence[str], batch: int) -> Tensor:
    """Mean embeddings, in batches of so many rows as they come."""
    found = []
    for start in range(0, len(texts), batch):
        inputs = dict(
            tokenizer(
                list(texts[start : start + batch]),
                padding=True,
                truncation=True,
                max_length=_LENGTH,
                return_tensors="pt",
            )
        )
        found.append(token_means(model(**inputs).last_hidden_state, inputs["attention_mask"]))
    return torch.cat(found)


def by_length(model: Any, streams: int, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """The same, sorted."""
    return torch.stack(list(qs.run_rows(model, texts, tokenizer, keep="mean", length=_LENGTH, streams=streams)))


def contenders(
    folder: Path, texts: Sequence[str], tokenizer: Any
) -> Iterator[tuple[str, Any, dict[str, tuple[Any, int]]]]:
    """Words, what runs in arrival order, and by words what runs sorted, in how many streams."""
    model, cores = load_model(checkpoint()), torch.get_num_threads()
    batches = list(token_batches(tokenizer, texts[:128]))
    for target in ("onnxruntime", "openvino"):
        qmodel = qs.convert(model, target)
        qs.calibrate(qmodel, batches)
        path = folder / f"{target}.onnx"
        qs.export_onnx(qmodel, path, batches[0], target)
        whole = qs.load_onnx(path, target)
        streams = {f"{cores} streams": (qs.load_onnx(path, target, threads=1), cores)} if cores > 1 else {}
        yield target, whole, {"": (whole, 1), **streams}
    frozen = qs.convert(model, "pytorch")
    qs.calibrate(frozen, batches)
    frozen = qs.freeze(frozen)
    yield "frozen in PyTorch", frozen, {"": (frozen, 1)}


def timed(run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    found = run()
    return time.perf_counter() - start, found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=5000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32, help="rows of a batch in arrival order (default 32)")
    parser.add_argument("--only", default="", help="those whose names match this regular expression")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(), local_files_only=True)
    texts = random.Random(0).choices(standard_library_texts(sys.maxsize), k=options.texts)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for words, whole, sorts in contenders(Path(folder), texts, tokenizer):
            if not re.search(options.only, words):
                continue
            seconds: dict[str, list[float]] = {}
            embeddings: dict[str, Tensor] = {}
            for _ in range(options.runs):
                kinds = {"in order": functools.partial(in_order, whole, tokenizer, texts, options.batch)}
                kinds |= {label: functools.partial(by_length, *each, tokenizer, texts) for label, each in sorts.items()}
                for kind, run in kinds.items():
                    taken, embeddings[kind] = timed(run)
                    seconds.setdefault(kind, []).append(taken)
            before = statistics.median(seconds["in order"])
            for label in sorts:
                after = statistics.median(seconds[label])
                cosine = torch.nn.functional.cosine_similarity(embeddings[label], embeddings["in order"]).mean()
                speeds = f"{options.texts / before:.0f}", f"{options.texts / after:.0f}", f"{before / after:.2f}"
                rows.append((", ".join(filter(None, (words, label))), *speeds, f"{float(cosine):.6f}"))
                print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    lengths = sorted(map(len, tokenizer(texts, truncation=True, max_length=_LENGTH)["input_ids"]))
    about = ", ".join(f"{share:.0%} {lengths[int(share * (len(lengths) - 1))]}" for share in (0.1, 0.5, 0.9, 1.0))
    title = f"{options.texts} texts, tokens at most: {about}; texts per second"
    columns = (Column(""), number(f"in order, {options.batch} rows"), number("run_rows"), number("x"), number("cosine"))
    Console(highlight=False).print(View(line(title), (Table(columns, tuple(rows)),)))


if __name__ == "__main__":
    main()
