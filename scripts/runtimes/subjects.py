"""What is measured: encoders of known shapes with random weights, and the token ids they read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import BertConfig, BertForQuestionAnswering, PreTrainedModel

__all__ = ["INPUTS", "SUBJECTS", "Batch", "Shape", "Subject", "make_batch", "make_model"]

Batch = dict[str, NDArray[np.int64]]

#: In the order of the exported files.
INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Subject:
    """A model: what a table calls it, and what its config has that BERT-base's has not."""

    words: str
    config: dict[str, Any] = field(default_factory=dict)


SUBJECTS = {
    "base": Subject("BERT-base"),
    "minilm": Subject(
        "all-MiniLM-L6",
        {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    ),
}


@dataclass(frozen=True)
class Shape:
    """Rows and tokens of a call."""

    rows: int
    tokens: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """``8x128``."""
        rows, x, tokens = text.partition("x")
        if not (x and rows.isdigit() and tokens.isdigit() and int(rows) and int(tokens)):
            raise ValueError(f"a shape is rows x tokens, as in 8x128, not {text!r}")
        return cls(int(rows), int(tokens))

    def __str__(self) -> str:
        return f"{self.rows}x{self.tokens}"


def make_model(subject: Subject, seed: int = 0) -> PreTrainedModel:
    """A question-answering model. Nothing in it is a zero or a one, which a runtime would fold away.

    Its attention is eager: of what the exporter makes of the implementations, ONNX Runtime is fastest with that.
    """
    torch.manual_seed(seed)
    config = BertConfig(attn_implementation="eager", **subject.config)
    model: PreTrainedModel = BertForQuestionAnswering(config).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                module.weight.normal_(1.0, 0.1)
            if isinstance(module, nn.LayerNorm | nn.Linear):
                module.bias.normal_(0.0, 0.1)
    return model


def make_batch(model: PreTrainedModel, shape: Shape, seed: int) -> Batch:
    """Random token ids; every place is a token, two segments."""
    drawn = np.random.default_rng(seed)
    size = (shape.rows, shape.tokens)
    ids = drawn.integers(0, model.config.vocab_size, size, dtype=np.int64)
    segments = np.tile((np.arange(shape.tokens) >= shape.tokens // 3).astype(np.int64), (shape.rows, 1))
    return dict(zip(INPUTS, (ids, np.ones(size, np.int64), segments), strict=True))
