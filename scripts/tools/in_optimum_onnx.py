"""A deployed folder in optimum-onnx: the tool's own model classes, run on texts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from given import EMBEDDINGS, MOST_TOKENS, Given, give, given, mean_embeddings
from optimum.onnxruntime import ORTModelForFeatureExtraction, ORTModelForSequenceClassification
from transformers import AutoTokenizer


def main(task: Given) -> None:
    """Run the task."""
    embeds = task.wanted == EMBEDDINGS
    kind = ORTModelForFeatureExtraction if embeds else ORTModelForSequenceClassification
    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    model = kind.from_pretrained(task.folder, subfolder="onnx", file_name="model_quantized.onnx")

    def run(texts: Sequence[str]) -> Any:
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="np")
        outputs = model(**batch)
        return mean_embeddings(outputs.last_hidden_state, batch["attention_mask"]) if embeds else outputs.logits

    give(task, Path(model.path), ["optimum-onnx", "transformers"], run)


if __name__ == "__main__":
    main(given())
