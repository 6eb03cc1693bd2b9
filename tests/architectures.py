"""Tiny random models of every supported architecture, with every head that transformers knows for it."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}

_BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class Architecture:
    """A model type, the options that make it tiny, and what a layer of it holds."""

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)

    def config(self, **more: Any) -> Any:
        kind = transformers.AutoConfig.for_model
        return kind(self.model_type, **{**self.options, **more})

    def heads(self) -> list[str]:
        """Names of all model classes, from transformers' own mappings from model types to classes."""
        names: set[str] = set()
        for attribute, mapping in vars(modeling_auto).items():
            if attribute.startswith("MODEL_") and attribute.endswith("_MAPPING_NAMES"):
                found = mapping.get(self.model_type, ())
                names.update((found,) if isinstance(found, str) else found)
        return sorted(names)


ARCHITECTURES = (
    Architecture("bert", _BERT),
    Architecture("roberta", _BERT),
    Architecture("xlm-roberta", _BERT),
    Architecture("camembert", _BERT),
    Architecture("electra", {**_BERT, "embedding_size": 16}),
    Architecture(
        "distilbert",
        {"vocab_size": 60, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "max_position_embeddings": 40},
    ),
    Architecture("albert", {**_BERT, "embedding_size": 16}),
    Architecture(
        "mobilebert",
        {
            **_BERT,
            "hidden_size": 32,
            "intra_bottleneck_size": 16,
            "embedding_size": 16,
            "true_hidden_size": 16,
        },
    ),
    Architecture("mpnet", {**_BERT, "pad_token_id": 1}),
    Architecture(
        "deberta-v2",
        {
            **_BERT,
            "relative_attention": True,
            "position_buckets": 8,
            "pos_att_type": ["c2p", "p2c"],
            "type_vocab_size": 2,
        },
    ),
    Architecture("roberta-prelayernorm", _BERT),
    Architecture("modernbert", {**_BERT, **_SPECIAL, "num_hidden_layers": 3, "local_attention": 8}),
)

BY_TYPE = {architecture.model_type: architecture for architecture in ARCHITECTURES}

#: (model type, class name) for every architecture and head.
EVERY_HEAD = [(a.model_type, head) for a in ARCHITECTURES for head in a.heads()]

_KINDS = {
    "masked-lm": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "sequence": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "span": "MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES",
    "choice": "MODEL_FOR_MULTIPLE_CHOICE_MAPPING_NAMES",
    "next-sentence": "MODEL_FOR_NEXT_SENTENCE_PREDICTION_MAPPING_NAMES",
    "pretraining": "MODEL_FOR_PRETRAINING_MAPPING_NAMES",
}


def layers(model_type: str, count: int) -> dict[str, int]:
    """The option that gives a model so many of them."""
    return {"n_layers" if model_type == "distilbert" else "num_hidden_layers": count}


def kind_of(head: str) -> str:
    """What a head is for; ``base`` if for nothing in particular."""
    for kind, mapping in _KINDS.items():
        if head in getattr(modeling_auto, mapping).values():
            return kind
    return "base"


def build(model_type: str, head: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A model with random weights, with eager attention, in eval mode. Weights are spread so that layers differ."""
    torch.default_generator.manual_seed(seed)  # of the CPU alone: torch.manual_seed formats the stack, for each device
    config = BY_TYPE[model_type].config(**options)
    model = getattr(transformers, head)._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embedding" not in name:
                parameter.mul_(4.0)
    return model


def batch_for(
    model: PreTrainedModel, shape: tuple[int, int], *, mask: bool = True, labels: bool = False, embeds: bool = False
) -> dict[str, Tensor]:
    """Arguments for ``model``'s forward: ids or embeddings, a padding mask, labels of the kind that the head takes."""
    kind = kind_of(type(model).__name__)
    generator = torch.Generator().manual_seed(shape[0] * 100 + shape[1])
    batch, tokens = shape
    size = (batch, 3, tokens) if kind == "choice" else shape
    made: dict[str, Tensor] = {}
    if embeds:
        width = model.get_input_embeddings().weight.shape[1]
        made["inputs_embeds"] = torch.randn(*size, width, generator=generator)
    else:
        made["input_ids"] = torch.randint(3, 60, size, generator=generator)
    if mask:
        made["attention_mask"] = torch.ones(size, dtype=torch.long)
        made["attention_mask"][0, ..., tokens - max(1, tokens // 3) :] = 0
        if tokens == 1:
            made["attention_mask"][:] = 1
    if labels:
        made.update(_labels(model, kind, shape, generator))
    return made


def _labels(model: PreTrainedModel, kind: str, shape: tuple[int, int], generator: torch.Generator) -> dict[str, Tensor]:
    batch, tokens = shape
    config = model.config

    def whole(high: int, *size: int) -> Tensor:
        return torch.randint(0, high, size, generator=generator)

    parameters = inspect.signature(model.forward).parameters
    if kind in ("masked-lm", "causal-lm", "pretraining") and type(model).__name__ != "ElectraForPreTraining":
        made = {"labels": whole(config.vocab_size, batch, tokens)}
        for name in ("next_sentence_label", "sentence_order_label"):
            if name in parameters:
                made[name] = whole(2, batch)
        return made
    if type(model).__name__ == "ElectraForPreTraining":
        return {"labels": whole(2, batch, tokens)}
    if kind == "span":
        return {"start_positions": whole(tokens, batch), "end_positions": whole(tokens, batch)}
    if kind == "token":
        return {"labels": whole(config.num_labels, batch, tokens)}
    if kind == "choice":
        return {"labels": whole(3, batch)}
    if kind == "next-sentence":
        return {"labels": whole(2, batch)}
    if kind == "sequence":
        if config.problem_type == "multi_label_classification":
            return {"labels": whole(2, batch, config.num_labels).float()}
        if config.problem_type == "regression" or config.num_labels == 1:
            return {"labels": torch.randn(batch, generator=generator)}
        return {"labels": whole(config.num_labels, batch)}
    return {}


def tensors_of(output: Any) -> dict[str, Tensor]:
    """All tensors in a model's output, by name; caches are left out."""
    found: dict[str, Tensor] = {}
    for name, value in output.items():
        if isinstance(value, Tensor):
            found[name] = value
        elif isinstance(value, tuple):
            found.update({f"{name}.{i}": item for i, item in enumerate(value) if isinstance(item, Tensor)})
    return found


#: The bare encoder of each type.
BASE = {
    model_type: min((head for head in architecture.heads() if head.endswith("Model")), key=len)
    for model_type, architecture in BY_TYPE.items()
}

#: Per encoder layer: linears, matmuls, residual adds, quantizers. ALBERT shares one layer among all.
EXPECTED = {
    "bert": (6, 2, 2, 20),
    "roberta": (6, 2, 2, 20),
    "xlm-roberta": (6, 2, 2, 20),
    "camembert": (6, 2, 2, 20),
    "electra": (6, 2, 2, 20),
    "distilbert": (6, 2, 2, 20),
    "albert": (6, 2, 2, 20),
    # Four feed-forward networks in a layer, and bottlenecks around it.
    "mobilebert": (15, 2, 6, 46),
    "mpnet": (6, 2, 2, 20),
    # Two of the linears and two of the matmuls are about relative positions.
    "deberta-v2": (8, 4, 2, 28),
    "roberta-prelayernorm": (6, 2, 2, 20),
    "modernbert": (4, 2, 2, 16),
}

DECODERS = [
    ("bert", "BertLMHeadModel"),
    ("roberta", "RobertaForCausalLM"),
    ("roberta-prelayernorm", "RobertaPreLayerNormForCausalLM"),
    ("electra", "ElectraForCausalLM"),
]

_WIDE = {"hidden_size": 64, "intermediate_size": 128}

#: Wide enough for the runtimes' integer kernels. Files of one size for several tests: they are traced once for all.
WIDTHS: dict[str, dict[str, Any]] = {
    "bert": _WIDE,
    "distilbert": {"dim": 64, "hidden_dim": 128, "n_layers": 1},
    "albert": _WIDE,  # whose second layer is the first once more
    "deberta-v2": {**_WIDE, "num_hidden_layers": 1},
    "mobilebert": {**_WIDE, "true_hidden_size": 64, "intra_bottleneck_size": 64, "num_hidden_layers": 1},
    "modernbert": {**_WIDE, "num_hidden_layers": 2},  # the second looks at its neighborhood only
}
