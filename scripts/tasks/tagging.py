"""Sentences with a tag for each word, as features, and back: a word's tag is predicted at its first piece."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tasks.conll_file import Tagged
from tasks.features import IGNORED, Feature

__all__ = ["tag_features", "tags_of"]


def tag_features(
    sentences: Sequence[Tagged], tokenizer: Any, labels: Mapping[str, int], max_length: int
) -> list[Feature]:
    """One feature for each sentence; words past ``max_length`` tokens are cut off."""
    found = tokenizer(
        [list(sentence.words) for sentence in sentences],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
    )
    features = []
    for index, sentence in enumerate(sentences):
        spans: list[tuple[int, int] | None] = []
        before = None
        for word in found.word_ids(index):
            spans.append(None if word is None or word == before else (word, word + 1))
            before = word
        targets = [IGNORED if span is None else labels[sentence.tags[span[0]]] for span in spans]
        inputs = {name: values[index] for name, values in found.items()}
        features.append(Feature(inputs, {"labels": targets}, index, tuple(spans)))
    return features


def tags_of(
    sentences: Sequence[Tagged], features: Sequence[Feature], logits: Sequence[Tensor], labels: Sequence[str]
) -> list[list[str]]:
    """For each sentence the tags with the largest logits; O for words that were cut off.

    Args:
        logits: Of each feature, (tokens or more, labels).
    """
    predicted = []
    for feature, scores in zip(features, logits, strict=True):
        tags = ["O"] * len(sentences[feature.example].words)
        best = scores.argmax(-1).tolist()
        for index, span in enumerate(feature.spans):
            if span is not None:
                tags[span[0]] = labels[best[index]]
        predicted.append(tags)
    return predicted
