"""Running a model over features, without gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.serve.model import OnnxModel
from qdq_surgery.text.progress import track
from tasks.features import Collator, Feature

__all__ = ["predict"]


def predict(
    model: PreTrainedModel | OnnxModel, features: Sequence[Feature], collator: Collator, size: int
) -> list[list[Tensor]]:
    """For each feature the model's outputs (each of its logits), on the CPU, in float32, padding included."""
    model.eval()
    found: list[list[Tensor]] = []
    starts = range(0, len(features), size)
    with torch.inference_mode():
        for start in track(starts, "evaluating", len(starts)):
            batch = collator([dict(feature.inputs) for feature in features[start : start + size]])
            outputs = model(**{name: value.to(model.device) for name, value in batch.items()})
            logits = [value.float().cpu() for name, value in outputs.items() if name.endswith("logits")]
            found.extend(list(row) for row in zip(*logits, strict=True))
    return found
