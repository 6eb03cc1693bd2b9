"""Texts as they come, and sorted: sentences per second of one file, in arrival order and by ``run_rows``.

    python scripts/benchmark_texts.py [--texts 5000] [--runs 3] [--batch 32]

The model is all-MiniLM-L6-v2, the texts are docstrings of Python's standard library, drawn with repetition and cut at
256 tokens. In arrival order means batches of one number of rows, each padded to its longest text. All kinds take turns;
what counts is the ratio of medians. The embeddings of both are compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs
from qdq_surgery.cli.demo import checkpoint, standard_library_texts, token_batches
from qdq_surgery.cli.folder import load_model
from qdq_surgery.text.view import Column, Table, View, line, number

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
        states, mask = model(**inputs).last_hidden_state, inputs["attention_mask"].unsqueeze(-1)
        found.append((states * mask).sum(1) / mask.sum(1))
    return torch.cat(found)


def contenders(folder: Path, texts: Sequence[str], tokenizer: Any) -> dict[str, tuple[Any, int]]:
    """By words: what runs, and in how many streams."""
    model = load_model(checkpoint())
    made: dict[str, tuple[Any, int]] = {}
    cores = torch.get_num_threads()
    for target in ("onnxruntime", "openvino"):
        qmodel = qs.convert(model, target)
        batches = list(token_batches(tokenizer, texts[:128]))
        qs.calibrate(qmodel, batches)
        path = folder / f"{target}.onnx"
        qs.export_onnx(qmodel, path, batches[0], target)
        made[target] = qs.load_onnx(path, target), 1
        made[f"{target}, {cores} streams"] = qs.load_onnx(path, target, threads=1), cores
    frozen = qs.convert(model, "pytorch")
    qs.calibrate(frozen, list(token_batches(tokenizer, texts[:128])))
    made["frozen in PyTorch"] = qs.freeze(frozen), 1
    return made


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
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint(), local_files_only=True)
    texts = random.Random(0).choices(standard_library_texts(sys.maxsize), k=options.texts)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for words, (model, streams) in contenders(Path(folder), texts, tokenizer).items():
            seconds: tuple[list[float], list[float]] = ([], [])
            for _ in range(options.runs):
                plain, wanted = timed(lambda model=model: in_order(model, tokenizer, texts, options.batch))
                sorted_, found = timed(
                    lambda model=model, streams=streams: torch.stack(
                        list(qs.run_rows(model, texts, tokenizer, keep="mean", length=_LENGTH, streams=streams))
                    )
                )
                seconds[0].append(plain)
                seconds[1].append(sorted_)
            before, after = map(statistics.median, seconds)
            cosine = float(torch.nn.functional.cosine_similarity(found, wanted).mean())
            rows.append(
                (
                    words,
                    f"{options.texts / before:.0f}",
                    f"{options.texts / after:.0f}",
                    f"{before / after:.2f}",
                    f"{cosine:.6f}",
                )
            )
            print(" | ".join(rows[-1]), file=sys.stderr, flush=True)
    lengths = sorted(map(len, tokenizer(texts, truncation=True, max_length=_LENGTH)["input_ids"]))
    about = ", ".join(f"{share:.0%} {lengths[int(share * (len(lengths) - 1))]}" for share in (0.1, 0.5, 0.9, 1.0))
    title = f"{options.texts} texts, tokens at most: {about}; texts per second"
    columns = (Column(""), number(f"in order, {options.batch} rows"), number("run_rows"), number("x"), number("cosine"))
    Console(highlight=False).print(View(line(title), (Table(columns, tuple(rows)),)))


if __name__ == "__main__":
    main()
