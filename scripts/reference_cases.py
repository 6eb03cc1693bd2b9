"""The calls that the tests compare with the real QDQBERT: data alone, for the real one and for the tests.

``make_reference.py`` runs them through the real QDQBERT, on the machine that the tests run on.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

#: Of torch. One thread alone sums a layer norm's gradients in another order than two.
THREADS = 2

# Heads of 16, whose square root is a power of two: there dividing the scores by it (4.40.2) and multiplying them by its
# reciprocal (today's transformers) is the same, as it is for the heads of 64 of every published BERT-base and -large.
TINY = {
    "pad_token_id": 0,
    "vocab_size": 32,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}

#: What ``load_calib_amax`` is called with. Of the entropy's candidates every 64th: the search is a loop in Python that
#: takes seconds for each quantizer, and tests/numerics/test_range_methods.py compares whole searches.
AMAX: dict[str, dict[str, Any]] = {
    "max": {},
    "percentile": {"method": "percentile", "percentile": 99.0},
    "entropy": {"method": "entropy", "stride": 64},
}


@dataclass(frozen=True)
class Case:
    """A model, what it is calibrated with, and what it is called with.

    Attributes:
        name: Of the file that holds what the real one computes.
        labels: The kind of labels; none if empty.
        head_mask: "heads" for one factor for each head, "layers" for one for each head of each layer; none if empty.
    """

    name: str
    head: str
    config: dict[str, Any] = field(default_factory=dict)
    calibrator: str = "max"
    padded: bool = True
    labels: str = ""
    head_mask: str = ""


CASES = [
    Case("model", "QDQBertModel"),
    Case("model-relu-unpadded", "QDQBertModel", {"hidden_act": "relu"}, padded=False),
    Case("model-percentile", "QDQBertModel", calibrator="percentile"),
    Case("model-entropy", "QDQBertModel", {"num_hidden_layers": 1}, calibrator="entropy"),
    Case("masked-lm", "QDQBertForMaskedLM", labels="tokens"),
    Case("masked-lm-percentile-relu", "QDQBertForMaskedLM", {"hidden_act": "relu"}, "percentile", labels="tokens"),
    Case("classification", "QDQBertForSequenceClassification", {"num_labels": 3}, labels="class"),
    Case("multi-label", "QDQBertForSequenceClassification", {"num_labels": 3}, labels="multi"),
    Case("regression", "QDQBertForSequenceClassification", {"num_labels": 1}, labels="real"),
    Case("next-sentence", "QDQBertForNextSentencePrediction", labels="pair"),
    Case("multiple-choice", "QDQBertForMultipleChoice", labels="choice"),
    Case("token-classification", "QDQBertForTokenClassification", {"num_labels": 4}, labels="tags"),
    Case("question-answering", "QDQBertForQuestionAnswering", labels="span"),
    Case(
        "question-answering-entropy", "QDQBertForQuestionAnswering", {"num_hidden_layers": 1}, "entropy", labels="span"
    ),
    Case("decoder", "QDQBertLMHeadModel", {"is_decoder": True}, labels="tokens"),
    Case("decoder-cross", "QDQBertLMHeadModel", {"is_decoder": True, "add_cross_attention": True}, labels="tokens"),
]
HEADS = sorted({case.head for case in CASES})

_SMALL = {"vocab_size": 16, "intermediate_size": 16}
HEAD_MASKS = [
    Case("model-heads", "QDQBertModel", _SMALL, head_mask="heads"),
    Case(
        "classification-layers",
        "QDQBertForSequenceClassification",
        {**_SMALL, "num_labels": 3},
        labels="class",
        head_mask="layers",
    ),
    Case(
        "decoder-cross-layers",
        "QDQBertLMHeadModel",
        {**_SMALL, "num_hidden_layers": 1, "is_decoder": True, "add_cross_attention": True},
        labels="tokens",
        head_mask="layers",
    ),
]


@dataclass(frozen=True)
class Checkpoint:
    """A folder as ``save_pretrained`` writes it.

    Attributes:
        positions: Its position ids are saved, as they were up to transformers 4.30.
    """

    name: str
    head: str
    config: dict[str, Any] = field(default_factory=dict)
    safe: bool = True
    shards: bool = False
    calibrated: bool = True
    positions: bool = False


OF_CHECKPOINTS = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": 24,
}
CHECKPOINTS = [
    Checkpoint("masked-lm-bin", "QDQBertForMaskedLM", safe=False, positions=True),
    Checkpoint("causal-lm", "QDQBertLMHeadModel", {"is_decoder": True}),
    Checkpoint("question-answering-shards", "QDQBertForQuestionAnswering", shards=True),
    Checkpoint("classification-uncalibrated", "QDQBertForSequenceClassification", {"num_labels": 3}, calibrated=False),
]
