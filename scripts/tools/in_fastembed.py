"""A deployed folder in fastembed, as a model of one's own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from fastembed import TextEmbedding
from fastembed.common.model_description import ModelSource, PoolingType
from given import Given, give, given

_NAME, _FILE = "deployed/int8", "onnx/model_quantized.onnx"


def main(task: Given) -> None:
    """Run the task."""
    size = json.loads((task.folder / "config.json").read_text(encoding="utf-8"))["hidden_size"]
    # (A source has to be named; nothing is fetched from there where specific_model_path is given.)
    TextEmbedding.add_custom_model(
        model=_NAME,
        pooling=PoolingType.MEAN,
        normalization=True,
        sources=ModelSource(hf=_NAME),
        dim=size,
        model_file=_FILE,
    )
    model = TextEmbedding(_NAME, specific_model_path=str(task.folder))

    def run(texts: Sequence[str]) -> Any:
        return np.stack(list(model.embed(list(texts), batch_size=len(texts))))

    give(task, task.folder / _FILE, ["fastembed", "tokenizers"], run)


if __name__ == "__main__":
    main(given())
