"""Texts through an exported model on a Ray cluster: a line of JSON for each text, in their order.

    python scripts/ray_texts.py model.onnx texts.txt found.jsonl --tokenizer FOLDER [--keep mean|first|label]
        [--runtime onnxruntime] [--actors 2] [--threads 1] [--batch 4096] [--address auto]

Without ``--address`` the cluster is this machine, and ends with the script. Each actor opens the file once; the file
has to lie under the same path on every machine. ``label`` needs a model with a classifier of texts, ``mean`` and
``first`` one without a head. Ray is the extra ``ray``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoTokenizer

import qdq_surgery as qs

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before ray is imported: nothing is sent anywhere

import ray


class Reader:
    """What an actor holds. Ray pickles ``model`` as its path and options, and so opens the file once in each actor."""

    def __init__(self, model: Any, tokenizer: Any, keep: str) -> None:
        self.model, self.tokenizer, self.keep = model, tokenizer, keep

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        keep: Any = scores if self.keep == "label" else self.keep
        found = qs.run_rows(self.model, batch["text"].tolist(), self.tokenizer, keep=keep)
        return {**batch, "found": np.stack([row.numpy() for row in found])}


def scores(outputs: Any, _: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The probabilities of a text's labels."""
    made: torch.Tensor = outputs.logits.softmax(-1)
    return made


def entry(model: Any, keep: str, text: str, found: NDArray[Any]) -> dict[str, Any]:
    """What is written of a text."""
    if keep != "label":
        return {"text": text, "embedding": found.tolist()}
    best = int(found.argmax())
    return {"text": text, "label": model.config.id2label[best], "score": float(found[best])}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, help="a text in each line")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True, help="the folder that holds it")
    parser.add_argument("--keep", choices=("mean", "first", "label"), default="mean", help="(default: %(default)s)")
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), default="onnxruntime")
    parser.add_argument("--actors", type=int, default=2, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of an actor (default: this machine's cores / actors)")
    parser.add_argument("--batch", type=int, default=4096, help="texts that are sorted together (default: %(default)s)")
    parser.add_argument("--address", help="of a cluster that runs (default: this machine alone)")
    options = parser.parse_args()
    cores = torch.get_num_threads()
    threads = options.threads or max(1, cores // options.actors)
    model = qs.load_onnx(options.model, options.runtime, threads=threads)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True)
    # Beside the actors, which hold theirs to the end, a core is needed for what reads.
    here = {} if options.address else {"num_cpus": threads * options.actors + 1, "include_dashboard": False}
    ray.init(address=options.address or "local", **here)
    try:
        ray.data.DataContext.get_current().execution_options.preserve_order = True
        texts = ray.data.read_text(str(options.texts.absolute()), drop_empty_lines=False)
        found = texts.repartition(target_num_rows_per_block=options.batch, strict=True).map_batches(
            Reader,
            fn_constructor_args=(model, tokenizer, options.keep),
            batch_size=options.batch,
            compute=ray.data.ActorPoolStrategy(size=options.actors),
            num_cpus=threads,
        )
        with options.output.open("w", encoding="utf-8") as file:
            for row in found.iter_rows():
                file.write(json.dumps(entry(model, options.keep, row["text"], row["found"])) + "\n")
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
