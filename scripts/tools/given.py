"""What a program in another tool's environment is given, and what it gives back: JSON files, without this package.

A program is called with a deployed folder, a file of texts in batches, what is wanted of them, and the file to write.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["EMBEDDINGS", "LOGITS", "MOST_TOKENS", "Given", "give", "given", "mean_embeddings"]

#: What is wanted: sentence embeddings of length 1, the mean over the tokens; or a classifier's logits.
EMBEDDINGS, LOGITS = "embeddings", "logits"

#: What sentence_bert_config.json of all-MiniLM-L6-v2 says. No text of the comparison is as long.
MOST_TOKENS = 256

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Given:
    """What a program works on.

    Attributes:
        folder: The deployed one.
        batches: Texts; those of a batch are run together.
        wanted: ``EMBEDDINGS`` or ``LOGITS``.
        output: The file to write.
    """

    folder: Path
    batches: Sequence[Sequence[str]]
    wanted: str
    output: Path


def given(argv: Sequence[str] | None = None) -> Given:
    """The arguments of the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("batches", type=Path)
    parser.add_argument("wanted", choices=(EMBEDDINGS, LOGITS))
    parser.add_argument("output", type=Path)
    found = parser.parse_args(argv)
    batches = json.loads(found.batches.read_text(encoding="utf-8"))
    return Given(found.folder.resolve(), batches, found.wanted, found.output)


def give(
    task: Given, file: Path, packages: Sequence[str], run: Callable[[Sequence[str]], Any], runtime: str = "onnxruntime"
) -> None:
    """Run every batch and write the rows.

    Args:
        file: The model file that the tool loaded.
        packages: The tool first, then what its numbers may depend on.
        run: From the texts of a batch to rows of numbers.
        runtime: The package that runs the file.
    """
    rows = np.concatenate([np.asarray(run(batch), dtype=np.float32) for batch in task.batches])
    found = {
        "file": file.resolve().relative_to(task.folder).as_posix(),
        "versions": {name: version(name) for name in (*packages, runtime)},
        "runtime": [runtime, version(runtime).partition("-")[0]],
        "rows": rows.tolist(),
    }
    task.output.write_text(json.dumps(found), encoding="utf-8")


def mean_embeddings(states: Array, mask: NDArray[np.integer[Any]]) -> Array:
    """The mean of the tokens' states, of length 1.

    Args:
        states: (texts, tokens, hidden).
        mask: (texts, tokens), 0 for padding.

    Returns:
        (texts, hidden).
    """
    weights = mask[:, :, None].astype(np.float32)
    means: Array = (states * weights).sum(1) / weights.sum(1)
    norms: Array = np.linalg.norm(means, axis=-1, keepdims=True)
    return np.divide(means, norms)
