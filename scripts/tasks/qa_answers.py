"""From a window's logits to the answer of a question: the best span over all of its windows."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tasks.features import Feature
from tasks.squad_file import Question

__all__ = ["Candidate", "best_answers"]


@dataclass(frozen=True, order=True)
class Candidate:
    """A possible answer.

    Attributes:
        score: Sum of the logits of its first and last token.
        text: The span of the context.
        probability: Among the candidates of its question.
    """

    score: float
    text: str
    probability: float = 0.0


def best_answers(
    questions: Sequence[Question],
    features: Sequence[Feature],
    logits: Sequence[Sequence[Tensor]],
    *,
    count: int,
    max_answer_length: int,
) -> dict[str, list[Candidate]]:
    """For each question's id up to ``count`` answers, the best one first.

    Args:
        features: Windows of the questions.
        logits: For each window those of the start and of the end, (tokens,) or longer by padding.
        max_answer_length: In tokens.
    """
    found: dict[int, list[Candidate]] = defaultdict(list)
    for feature, (starts, ends) in zip(features, logits, strict=True):
        context = questions[feature.example].context
        found[feature.example] += _window(feature, starts, ends, context, count, max_answer_length)
    return {question.id: _ranked(found[index], count) for index, question in enumerate(questions)}


def _window(
    feature: Feature, starts: Tensor, ends: Tensor, context: str, count: int, max_answer_length: int
) -> list[Candidate]:
    """The best spans of one window: both ends in the context, in order, and no longer than allowed."""
    length = len(feature.spans)
    usable = torch.tensor([span is not None for span in feature.spans])
    allowed = torch.ones(length, length, dtype=torch.bool).triu().tril(max_answer_length - 1)
    allowed &= usable[:, None] & usable[None, :]
    scores = (starts[:length, None] + ends[None, :length]).masked_fill(~allowed, -torch.inf).flatten()
    values, places = scores.topk(min(count, int(allowed.sum())))
    candidates = []
    for value, place in zip(values.tolist(), places.tolist(), strict=True):
        first, last = feature.spans[place // length], feature.spans[place % length]
        assert first is not None
        assert last is not None
        candidates.append(Candidate(value, context[first[0] : last[1]]))
    return candidates


def _ranked(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The best of each text, with probabilities among those kept; an empty answer where there is none at all."""
    best: dict[str, float] = {}
    for candidate in candidates:
        best[candidate.text] = max(candidate.score, best.get(candidate.text, candidate.score))
    kept = heapq.nlargest(count, best.items(), key=lambda item: item[1]) or [("", 0.0)]
    shares = torch.tensor([score for _, score in kept]).softmax(0).tolist()
    return [Candidate(score, text, share) for (text, score), share in zip(kept, shares, strict=True)]
