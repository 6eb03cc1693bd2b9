"""Named entities in CoNLL-2003-style files: calibrate, fine-tune (QAT or FP32), evaluate, export.

The float model first; calibration and QAT as in run_qa.py::

    data="--train_file data/ner_train.txt --validation_file data/ner_held_out.txt"
    python scripts/tasks/generate.py ner data
    python scripts/run_ner.py $data --fp32 --model_name_or_path MODEL --do_train --do_eval --output_dir out/fp32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from tasks.conll_file import Tagged, read_conll
from tasks.features import Feature
from tasks.metrics import tag_scores
from tasks.options import Options, parse
from tasks.run import run_or_exit
from tasks.tagging import tag_features, tags_of
from tasks.task import Task

__all__ = ["NamedEntities", "main"]


class NamedEntities(Task[Tagged]):
    """One tag for each word."""

    name = "named entities"
    head = "ForTokenClassification"
    words = True

    def read(self, path: Path) -> list[Tagged]:
        """The sentences of a CoNLL file."""
        return read_conll(path)

    def labels(self, examples: Sequence[Tagged]) -> set[str]:
        """The tags that occur."""
        return {tag for sentence in examples for tag in sentence.tags}

    def features(
        self, examples: Sequence[Tagged], tokenizer: Any, options: Options, labels: Mapping[str, int]
    ) -> list[Feature]:
        """One feature for each sentence."""
        return tag_features(examples, tokenizer, labels, options.max_seq_length) if examples else []

    def score(
        self,
        examples: Sequence[Tagged],
        features: Sequence[Feature],
        logits: Sequence[Sequence[Tensor]],
        options: Options,  # noqa: ARG002  nothing to choose
        labels: Sequence[str],
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Precision, recall and F1 of entities; words with the tags wanted and predicted as a file."""
        predicted = tags_of(examples, features, [scores for (scores,) in logits], labels)
        blocks = (
            "".join(f"{word} {wanted} {tag}\n" for word, wanted, tag in zip(s.words, s.tags, tags, strict=True))
            for s, tags in zip(examples, predicted, strict=True)
        )
        return tag_scores(examples, predicted), {"predictions.txt": "\n".join(blocks)}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    run_or_exit(NamedEntities(), parse((__doc__ or "").splitlines()[0], arguments))


if __name__ == "__main__":
    main()
