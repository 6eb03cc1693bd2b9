"""A deployed folder in optimum-intel: the tool's own model classes over OpenVINO's form, run on texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from given import EMBEDDINGS, MOST_TOKENS, Given, give, given, mean_embeddings
from optimum.intel import OVModelForFeatureExtraction, OVModelForSequenceClassification
from transformers import AutoTokenizer

_FOLDER, _FILE = "openvino", "openvino_model_qint8_quantized.xml"


def main(task: Given) -> None:
    """Run the task."""
    embeds = task.wanted == EMBEDDINGS
    kind = OVModelForFeatureExtraction if embeds else OVModelForSequenceClassification
    tokenizer = AutoTokenizer.from_pretrained(task.folder)
    # (On CPUs with bfloat16, OpenVINO would compute in it what is not INT8.)
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    model = kind.from_pretrained(task.folder, subfolder=_FOLDER, file_name=_FILE, ov_config=options)

    def run(texts: Sequence[str]) -> Any:
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="np")
        outputs = model(**batch)
        return mean_embeddings(outputs.last_hidden_state, batch["attention_mask"]) if embeds else outputs.logits

    give(task, task.folder / _FOLDER / _FILE, ["optimum-intel", "transformers"], run, "openvino")


if __name__ == "__main__":
    main(given())
