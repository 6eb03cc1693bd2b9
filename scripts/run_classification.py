"""Classification of sentences or pairs in GLUE-style TSV: calibrate, fine-tune (QAT or FP32), evaluate, export.

The float model first; calibration and QAT as in run_qa.py::

    data="--train_file data/pairs_train.tsv --validation_file data/pairs_held_out.tsv"
    python scripts/tasks/generate.py pairs data
    python scripts/run_classification.py $data --fp32 --model_name_or_path MODEL --do_train --output_dir out/fp32
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tasks.errors import OptionError
from tasks.features import Feature
from tasks.metrics import class_scores
from tasks.options import Options, parse
from tasks.run import run_or_exit
from tasks.table_file import Row, read_table
from tasks.task import Task

__all__ = ["Classification", "main"]

#: More labels than this are numbers, as in STS-B.
_MOST_LABELS = 200


class Classification(Task[Row]):
    """One label for a sentence or a pair of them."""

    name = "classification"
    head = "ForSequenceClassification"

    def read(self, path: Path) -> list[Row]:
        """The rows of a tab-separated file."""
        return read_table(path)

    def labels(self, examples: Sequence[Row]) -> set[str]:
        """The labels that occur."""
        found = {row.label for row in examples}
        if len(found) > _MOST_LABELS:
            raise OptionError(
                f"the data has {len(found)} different labels (one: '{min(found)}'); give classes, regression is not "
                "supported"
            )
        return found

    def features(
        self, examples: Sequence[Row], tokenizer: Any, options: Options, labels: Mapping[str, int]
    ) -> list[Feature]:
        """One feature for each row; the longer sentence of a pair is cut first."""
        if not examples:
            return []
        texts = [list(column) for column in zip(*(row.sentences for row in examples), strict=True)]
        found = tokenizer(*texts, truncation=True, max_length=options.max_seq_length)
        return [
            Feature({name: values[index] for name, values in found.items()}, {"labels": labels[row.label]}, index)
            for index, row in enumerate(examples)
        ]

    def score(
        self,
        examples: Sequence[Row],
        features: Sequence[Feature],
        logits: Sequence[Sequence[Tensor]],
        options: Options,  # noqa: ARG002  nothing to choose
        labels: Sequence[str],
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Accuracy and F1; the labels predicted as a file."""
        predicted = torch.stack([scores for (scores,) in logits]).argmax(-1)
        wanted = torch.tensor([labels.index(examples[feature.example].label) for feature in features])
        lines = "".join(f"{index}\t{labels[label]}\n" for index, label in enumerate(predicted.tolist()))
        return class_scores(predicted, wanted, len(labels)), {"predictions.tsv": f"index\tprediction\n{lines}"}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    run_or_exit(Classification(), parse((__doc__ or "").splitlines()[0], arguments))


if __name__ == "__main__":
    main()
