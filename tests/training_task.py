"""A task for Hugging Face's Trainer that takes no time: random ids whose labels follow from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import TrainingArguments

Batch = dict[str, Tensor]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


class Texts(Dataset[Batch]):
    """Random ids; the label, or each token's, follows from them."""

    def __init__(self, rows: int = 16, tokens: int = 6, seed: int = 0, tagged: bool = False) -> None:
        self._ids = torch.randint(3, 60, (rows, tokens), generator=torch.Generator().manual_seed(seed))
        self._tagged = tagged

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Batch:
        ids = self._ids[index]
        mask = torch.ones_like(ids)
        mask[len(ids) - index % 3 :] = 0
        labels = (ids > 30).long()
        if self._tagged:
            return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}
        return {"input_ids": ids, "attention_mask": mask, "labels": labels[0]}


def inputs_of(texts: Texts) -> list[dict[str, Any]]:
    rows = [texts[index] for index in range(len(texts))]
    return [{name: torch.stack([row[name] for row in rows]) for name in ("input_ids", "attention_mask")}]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    given: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "seed": 1,
    }
    return TrainingArguments(**{**given, **options})
