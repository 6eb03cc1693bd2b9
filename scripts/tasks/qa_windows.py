"""Questions as features: a long context becomes several windows that overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tasks.errors import OptionError
from tasks.features import Feature
from tasks.squad_file import Answer, Question

__all__ = ["windows"]


def windows(questions: Sequence[Question], tokenizer: Any, *, max_length: int, stride: int) -> list[Feature]:
    """One feature for each window of each question's context, with the first answer's place as target.

    The target of a window without the whole answer is its first token.

    Args:
        questions: Leading and trailing spaces of a question are dropped.
        tokenizer: A fast one.
        max_length: Tokens of question and window together.
        stride: Tokens that two windows of a context share.

    Raises:
        OptionError: A question leaves no room for a window that is longer than the stride.
    """
    texts = [question.question.strip() for question in questions]
    _check_room(questions, texts, tokenizer, max_length, stride)
    found = tokenizer(
        texts,
        [question.context for question in questions],
        truncation="only_second",
        max_length=max_length,
        stride=stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
    )
    owners, offsets = found.pop("overflow_to_sample_mapping"), found.pop("offset_mapping")
    features = []
    for index, owner in enumerate(owners):
        spans = tuple(
            tuple(offset) if sequence == 1 and offset[0] < offset[1] else None
            for offset, sequence in zip(offsets[index], found.sequence_ids(index), strict=True)
        )
        start, end = _target(spans, questions[owner].answers[0])
        inputs = {name: values[index] for name, values in found.items()}
        features.append(Feature(inputs, {"start_positions": start, "end_positions": end}, owner, spans))
    return features


def _check_room(questions: Sequence[Question], texts: list[str], tokenizer: Any, max_length: int, stride: int) -> None:
    lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    longest = max(range(len(texts)), key=lambda index: lengths[index])
    room = max_length - tokenizer.num_special_tokens_to_add(pair=True) - lengths[longest]
    if room <= stride:
        raise OptionError(
            f"--max_seq_length {max_length} leaves {max(room, 0)} tokens of context beside question "
            f"'{questions[longest].id}' ({lengths[longest]} tokens), and --doc_stride is {stride}; give a larger "
            "--max_seq_length or a smaller --doc_stride"
        )


def _target(spans: Sequence[tuple[int, int] | None], answer: Answer) -> tuple[int, int]:
    """First and last token of the answer, or the first token twice where the window does not hold all of it."""
    first, after = answer.start, answer.start + len(answer.text)
    inside = [index for index, span in enumerate(spans) if span is not None and span[0] < after and span[1] > first]
    known = [span for span in spans if span is not None]
    if not inside or known[0][0] > first or known[-1][1] < after:
        return 0, 0
    return inside[0], inside[-1]
