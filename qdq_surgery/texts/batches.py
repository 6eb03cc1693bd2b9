"""Samples as batches: tokens of the model's vocabulary, cut to what it takes, with as little padding as possible."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.hf.arguments import takes_any
from qdq_surgery.hf.config_facts import max_tokens
from qdq_surgery.texts.samples import Sample
from qdq_surgery.texts.tokenizers import REMEDY, load_tokenizer, special_tokens, unknown_token

__all__ = ["MOST_UNKNOWN", "TextData", "text_batches"]

#: Share of unknown tokens above which texts are refused. A model's own tokenizer gives well under 1 % on texts like
#: those that it was trained on, one of another kind 40 to 100 %: in between lie texts of another language or trade.
MOST_UNKNOWN = 0.10
#: Share above which a word is said.
_NOTED_UNKNOWN = 0.01

#: Tokens of a text, if nobody says another number.
_LENGTH = 128
#: Less is hardly ever enough; a calibration of BERT takes some hundred texts.
_FEW_TEXTS, _FEW_TOKENS = 32, 1000

_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"
_NO_LIMIT = 1 << 30


@dataclass(frozen=True)
class TextData:
    """What a model is called with.

    Attributes:
        batches: Keyword arguments of its forward.
        notes: What was done to the texts that whoever gave them should know.
    """

    batches: list[dict[str, Tensor]]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Row:
    """A sample in numbers.

    Attributes:
        inputs: By argument; lists of one length.
        full: Tokens before it was cut.
    """

    sample: Sample
    inputs: Mapping[str, Sequence[int]]
    full: int

    def __len__(self) -> int:
        return len(self.inputs[_IDS])


def text_batches(
    samples: Sequence[Sample], model: PreTrainedModel, folder: str | Path, rows: int = 16, length: int | None = None
) -> TextData:
    """The samples as the model takes them, sorted by length so that there is little padding.

    Args:
        samples: All of one kind.
        folder: Has the tokenizer, which samples of token ids do not need.
        rows: Samples in a batch.
        length: Most tokens of a sample; what is longer is cut off. 128 if left out.

    Raises:
        ModelError: The folder has no tokenizer, or one that does not fit the model.
        CalibrationError: ``rows`` or ``length`` is too small, or the model's vocabulary does not have the samples.
    """
    if rows < 1:
        raise CalibrationError(f"batches of {rows} texts hold nothing: give at least 1 (--batch on the command line)")
    if length is not None and length < 3:
        raise CalibrationError(
            f"texts of at most {length} tokens are nothing but the marks of begin and end: give at least 3 (--length "
            "on the command line)"
        )
    tokenizer = None if samples[0].inputs else load_tokenizer(folder, model.config)
    most, notes = _most(length, model, tokenizer)
    if tokenizer is None:
        made = [_cut_ids(sample, most) for sample in samples]
    elif samples[0].tokens:
        made = [_looked_up(sample, tokenizer, most) for sample in samples]
    else:
        made = _encoded(samples, tokenizer, most, folder)
    if tokenizer is not None:
        notes += _check_known(made, tokenizer, folder)
    _check_ids(made, model)
    made.sort(key=len)
    cut = sum(row.full > len(row) for row in made)
    notes += [f"{cut} of {len(made)} texts are cut at {most} tokens"] if cut else []
    notes += _enough(made)
    padding = _padding_id(model, tokenizer)
    batches = [_batch(made[start : start + rows], model, padding) for start in range(0, len(made), rows)]
    return TextData(batches, tuple(notes))


def _most(length: int | None, model: PreTrainedModel, tokenizer: Any) -> tuple[int, list[str]]:
    """How many tokens a text may have, and a word if that is less than was asked for."""
    limits = {type(model).__name__: max_tokens(model.config) or _NO_LIMIT}
    if tokenizer is not None:
        limits["its tokenizer"] = min(tokenizer.model_max_length, _NO_LIMIT)
    who = min(limits, key=lambda name: limits[name])
    most = limits[who]
    if most < 3:
        raise ModelError(f"{who} takes only {most} tokens, too few for a text")
    if length is None or length <= most:
        return min(length or _LENGTH, most), []
    return most, [f"--length {length} is more than the {most} tokens that {who} takes; {most} it is"]


def _encoded(samples: Sequence[Sample], tokenizer: Any, most: int, folder: str | Path) -> list[_Row]:
    made = []
    for sample in samples:
        try:
            whole = tokenizer(*sample.texts)
            full = len(whole[_IDS])
            inputs = tokenizer(*sample.texts, truncation=True, max_length=most) if full > most else whole
        except Exception as error:  # tokenizers raise whatever they like
            reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
            raise ModelError(f"the tokenizer of {folder} cannot read {sample.place}: {reason}; {REMEDY}") from error
        if not inputs[_IDS]:
            raise CalibrationError(f"{sample.place}: the tokenizer of {folder} makes no token of {sample.words}")
        made.append(_Row(sample, {name: inputs[name] for name in (_IDS, _MASK, _TYPES) if name in inputs}, full))
    return made


def _looked_up(sample: Sample, tokenizer: Any, most: int) -> _Row:
    """A text that is split already: its tokens' ids, with special tokens around them as around any other text."""
    ids = tokenizer.convert_tokens_to_ids(list(sample.tokens))
    lost = next((token for token, value in zip(sample.tokens, ids, strict=True) if value is None), None)
    if lost is not None:
        raise CalibrationError(f"{sample.place}: the tokenizer has no token {lost!r}, and none for what it lacks")
    before, after = _around(tokenizer)
    if ids[: len(before)] == before and ids[len(ids) - len(after) :] == after:
        before, after = [], []
    inside = ids[: most - len(before) - len(after)]
    whole = [*before, *inside, *after]
    return _Row(sample, {_IDS: whole, _MASK: [1] * len(whole)}, len(ids) + len(before) + len(after))


def _around(tokenizer: Any) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    empty = list(tokenizer("")[_IDS])
    known = special_tokens(tokenizer)
    first = {known[name] for name in ("cls", "bos") if name in known}
    # XLNet has its cls at the end.
    return (empty[:1], empty[1:]) if empty[:1] and empty[0] in first else ([], empty)


def _cut_ids(sample: Sample, most: int) -> _Row:
    inputs = {name: list(values[:most]) for name, values in sample.inputs.items()}
    inputs.setdefault(_MASK, [1] * len(inputs[_IDS]))
    if not any(inputs[_MASK]):
        raise CalibrationError(
            f"{sample.place}: all of its first {most} tokens are padding; put the padding at the end"
        )
    return _Row(sample, inputs, len(sample.inputs[_IDS]))


def _check_known(made: Sequence[_Row], tokenizer: Any, folder: str | Path) -> list[str]:
    """Refuse texts that the tokenizer does not know; a word if it does not know some."""
    unknown = unknown_token(tokenizer)
    special = set(special_tokens(tokenizer).values())
    if unknown is None:
        return []
    counts = [sum(value == unknown for value in row.inputs[_IDS]) for row in made]
    total = sum(sum(value not in special for value in row.inputs[_IDS]) for row in made)
    share = sum(counts) / max(total, 1)
    if share <= _NOTED_UNKNOWN:
        return []
    worst = made[max(range(len(made)), key=lambda index: counts[index])].sample
    words = (
        f"{100 * share:.1f} % of the tokens ({sum(counts)} of {total}) are unknown to the tokenizer of {folder}: it "
        f"reads them as {tokenizer.unk_token}, most in {worst.place}, {worst.words}"
    )
    if share > MOST_UNKNOWN:
        raise CalibrationError(f"{words}; more than {100 * MOST_UNKNOWN:g} % is another tokenizer's text: {REMEDY}")
    return [words]


def _check_ids(made: Sequence[_Row], model: PreTrainedModel) -> None:
    config = model.config.get_text_config()
    for name, size in ((_IDS, "vocab_size"), (_TYPES, "type_vocab_size")):
        limit = getattr(config, size, None)
        if not isinstance(limit, int) or limit < 1:
            continue
        for row in made:
            top = max(row.inputs.get(name, (0,)))
            if top >= limit:
                raise CalibrationError(
                    f"{row.sample.place} has {top} in '{name}', and {type(model).__name__} takes 0 to {limit - 1}; "
                    "use the tokenizer that the model was trained with"
                )


def _enough(made: Sequence[_Row]) -> list[str]:
    """A word if there is too little data."""
    tokens = sum(sum(row.inputs.get(_MASK, ()) or [1] * len(row)) for row in made)
    if len(made) >= _FEW_TEXTS and tokens >= _FEW_TOKENS:
        return []
    return [
        f"only {len(made)} {'text' if len(made) == 1 else 'texts'} with {tokens} tokens in all: ranges found on so "
        "little hold for little else; some 100 to 500 texts like those to come are sensible"
    ]


def _padding_id(model: PreTrainedModel, tokenizer: Any) -> int:
    found = None if tokenizer is None else tokenizer.pad_token_id
    found = getattr(model.config.get_text_config(), "pad_token_id", None) if found is None else found
    return found if isinstance(found, int) and found >= 0 else 0  # masked: any token will do


def _batch(rows: Sequence[_Row], model: PreTrainedModel, padding: int) -> dict[str, Tensor]:
    """The rows beside each other, padded at their ends; without arguments that the model does not have."""
    width = max(len(row) for row in rows)
    taken = inspect.signature(model.forward).parameters
    open_ended = takes_any(model)
    made = {}
    for name, fill in ((_IDS, padding), (_MASK, 0), (_TYPES, 0)):
        if name in rows[0].inputs and (name in taken or (open_ended and name != _TYPES)):
            made[name] = torch.tensor([[*row.inputs[name], *[fill] * (width - len(row))] for row in rows])
    return made
