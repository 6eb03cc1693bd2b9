"""Extractive question answering on SQuAD v1.1 files: calibrate, fine-tune (QAT or FP32), evaluate, export.

First the float model, then its calibration, then QAT; each run starts from the folder that the one before has written::

    data="--train_file data/qa_train.json --validation_file data/qa_held_out.json"
    python scripts/tasks/generate.py qa data
    python scripts/run_qa.py $data --fp32 --model_name_or_path MODEL --do_train --do_eval --output_dir out/fp32
    python scripts/run_qa.py $data --model_name_or_path out/fp32 --do_calib --do_eval --output_dir out/calibrated
    python scripts/run_qa.py $data --model_name_or_path out/calibrated --do_train --do_eval --output_dir out/qat

Add --save_onnx to any of them for model.onnx in its folder, --target for the runtime that it is for, and evaluate it::

    python scripts/run_qa.py $data --onnx out/qat/model.onnx --runtime onnxruntime --do_eval --output_dir out/onnx
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from tasks.features import Feature
from tasks.metrics import answer_scores
from tasks.options import Options, parse
from tasks.qa_answers import best_answers
from tasks.qa_windows import windows
from tasks.run import run_or_exit
from tasks.squad_file import Question, read_squad
from tasks.task import Task

__all__ = ["QuestionAnswering", "main"]


class QuestionAnswering(Task[Question]):
    """Answers are spans of a context; a long one is read in windows."""

    name = "question answering"
    head = "ForQuestionAnswering"
    outputs = ("start_logits", "end_logits")

    def read(self, path: Path) -> list[Question]:
        """The questions of a SQuAD v1.1 file."""
        return read_squad(path)

    def labels(self, examples: Sequence[Question]) -> set[str]:  # noqa: ARG002  there are none
        """None."""
        return set()

    def features(
        self,
        examples: Sequence[Question],
        tokenizer: Any,
        options: Options,
        labels: Mapping[str, int],  # noqa: ARG002  there are none
    ) -> list[Feature]:
        """The windows of all questions."""
        if not examples:
            return []
        return windows(examples, tokenizer, max_length=options.max_seq_length, stride=options.doc_stride)

    def score(
        self,
        examples: Sequence[Question],
        features: Sequence[Feature],
        logits: Sequence[Sequence[Tensor]],
        options: Options,
        labels: Sequence[str],  # noqa: ARG002  there are none
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Exact match and F1; the answers and the best candidates as files."""
        best = best_answers(
            examples, features, logits, count=options.n_best_size, max_answer_length=options.max_answer_length
        )
        answers = {name: candidates[0].text for name, candidates in best.items()}
        ranked = {name: [asdict(candidate) for candidate in candidates] for name, candidates in best.items()}
        files = {
            "predictions.json": json.dumps(answers, indent=2, ensure_ascii=False) + "\n",
            "nbest_predictions.json": json.dumps(ranked, indent=2, ensure_ascii=False) + "\n",
        }
        return answer_scores(examples, answers), files


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    run_or_exit(QuestionAnswering(), parse((__doc__ or "").splitlines()[0], arguments, answers=True))


if __name__ == "__main__":
    main()
