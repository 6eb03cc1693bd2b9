"""Triton's model repository in a deployed folder, without a server: read by Triton's own schema, laid out as it looks.

The file is run by the runtime that the config names, with inputs and outputs of the types and sizes that it declares.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from given import MOST_TOKENS, Given, give, given, mean_embeddings
from google.protobuf import text_format
from tokenizers import Tokenizer
from tritonclient.grpc.model_config_pb2 import DataType, ModelConfig

_TYPES = {"TYPE_INT64": np.int64, "TYPE_FP32": np.float32}


def main(task: Given) -> None:
    """Run the task."""
    [home] = (task.folder / "triton").iterdir()
    config = text_format.Parse((home / "config.pbtxt").read_text(encoding="utf-8"), ModelConfig())
    assert (config.name, config.backend) == (home.name, "onnxruntime"), "Triton wants the folder's name, and a backend"
    assert [each.name for each in home.iterdir() if each.is_dir()] == ["1"], "a version is a folder of a number"
    file = home / "1" / config.default_model_filename
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert {each.name for each in config.input} == {each.name for each in session.get_inputs()}
    tokenizer = _tokenizer(task.folder)

    def run(texts: Sequence[str]) -> Any:
        assert len(texts) <= config.max_batch_size
        rows = tokenizer.encode_batch(list(texts))
        known = {
            "input_ids": [row.ids for row in rows],
            "attention_mask": [row.attention_mask for row in rows],
            "token_type_ids": [row.type_ids for row in rows],
        }
        feed = {each.name: _declared(np.array(known[each.name]), each) for each in config.input}
        names = [each.name for each in config.output]
        found = dict(zip(names, session.run(names, feed), strict=True))
        for each in config.output:
            assert found[each.name] is _declared(found[each.name], each), f"{each.name} is of another type"
        return mean_embeddings(found["last_hidden_state"], feed["attention_mask"])

    give(task, file, ["tritonclient"], run)


def _tokenizer(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    tokenizer.enable_truncation(MOST_TOKENS)
    return tokenizer


def _declared(array: Any, port: Any) -> Any:
    """An array as the config declares it: rows that Triton adds, then its sizes."""
    sizes = array.shape[1:]
    assert len(sizes) == len(port.dims), f"{port.name} has another rank"
    assert all(wanted in (-1, size) for wanted, size in zip(port.dims, sizes, strict=True)), f"{port.name} is {sizes}"
    return array.astype(_TYPES[DataType.Name(port.data_type)], copy=False)


if __name__ == "__main__":
    main(given())
