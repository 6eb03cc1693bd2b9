"""The figures that an evaluation gives, all in percent."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_f1_score
from torchmetrics.functional.text import squad

from tasks.conll_file import Tagged
from tasks.squad_file import Question

__all__ = ["answer_scores", "class_scores", "tag_scores"]


def answer_scores(questions: Sequence[Question], answers: dict[str, str]) -> dict[str, float]:
    """SQuAD's exact match and F1 of the answers, by the questions' ids."""
    predictions = [{"id": question.id, "prediction_text": answers[question.id]} for question in questions]
    targets = [
        {
            "id": question.id,
            "answers": {
                "text": [answer.text for answer in question.answers],
                "answer_start": [answer.start for answer in question.answers],
            },
        }
        for question in questions
    ]
    found: dict[str, Tensor] = squad(predictions, targets)
    return {name: float(found[name]) for name in ("exact_match", "f1")}


def class_scores(predicted: Tensor, wanted: Tensor, classes: int) -> dict[str, float]:
    """Accuracy and F1: of the second class where there are two, as in GLUE, and the mean over the classes otherwise."""
    accuracy = multiclass_accuracy(predicted, wanted, classes, average="micro")
    each = multiclass_f1_score(predicted, wanted, classes, average="none")
    f1 = each[1] if classes == 2 else torch.mean(each)
    return {"accuracy": 100 * float(accuracy), "f1": 100 * float(f1)}


def tag_scores(sentences: Sequence[Tagged], predicted: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, as CoNLL's own script counts them."""
    from seqeval.metrics import f1_score, precision_score, recall_score

    wanted, found = [list(sentence.tags) for sentence in sentences], [list(tags) for tags in predicted]
    scores = {"precision": precision_score, "recall": recall_score, "f1": f1_score}
    return {name: 100 * float(score(wanted, found, zero_division=0)) for name, score in scores.items()}
