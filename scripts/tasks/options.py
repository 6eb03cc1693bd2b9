"""The options of the run scripts: the same names in all, those of the QDQBERT example where it has them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qdq_surgery.numerics.range_choice import method_names, takes_percentile
from qdq_surgery.targets.registry import TARGETS, runtimes

__all__ = ["Options", "parse"]


@dataclass(frozen=True)
class Options:
    """What one run is to do; one field for each option.

    Attributes:
        model_name_or_path: With ``--onnx``, that file.
    """

    model_name_or_path: Path
    tokenizer_name: Path
    train_file: Path | None
    validation_file: Path | None
    output_dir: Path
    max_seq_length: int
    doc_stride: int
    n_best_size: int
    max_answer_length: int
    fp32: bool
    rules: str | None
    do_calib: bool
    calibrator: str | None
    percentile: float | None
    num_calib_batch: int
    do_train: bool
    learn_ranges: bool
    disable_dropout: bool
    teacher: Path | None
    distill_temperature: float
    distill_weight: float
    learning_rate: float
    weight_decay: float
    num_train_epochs: float
    max_steps: int
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool
    bf16: bool
    warmup_ratio: float
    lr_scheduler_type: str
    save_steps: int
    resume_from_checkpoint: str | None
    seed: int
    do_eval: bool
    save_onnx: bool
    overwrite: bool
    target: str | None
    onnx: Path | None
    runtime: str | None


def parse(description: str, arguments: Sequence[str] | None, *, answers: bool = False) -> Options:
    """Read the command line; a mistake ends the program with a message.

    Args:
        description: What the script does.
        arguments: The command line, or ``None`` for the program's own.
        answers: Whether the options of question answering are among them.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    _add_files(parser)
    _add_quantization(parser)
    _add_training(parser)
    _add_onnx(parser)
    if answers:
        _add_answers(parser)
    else:
        parser.set_defaults(doc_stride=0, n_best_size=0, max_answer_length=0)
    given = parser.parse_args(arguments)
    _check(parser, given)
    _check_onnx(parser, given)
    if given.onnx is not None:
        given.model_name_or_path, given.tokenizer_name = given.onnx, given.tokenizer_name or given.onnx.parent
    given.tokenizer_name = given.tokenizer_name or given.model_name_or_path
    return Options(**vars(given))


def _add_files(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model, data and what to do")
    group.add_argument("--model_name_or_path", type=Path, help="folder: float, or one that this script quantized")
    group.add_argument("--tokenizer_name", type=Path, help="folder, if not the model's")
    group.add_argument("--train_file", type=Path, help="for --do_calib and --do_train")
    group.add_argument("--validation_file", type=Path, help="for --do_eval")
    group.add_argument("--output_dir", type=Path, required=True, help="model, results and checkpoints go there")
    group.add_argument("--max_seq_length", type=_count, default=128, help="in tokens")
    group.add_argument("--do_calib", action="store_true", help="find the ranges on training data")
    group.add_argument("--do_train", action="store_true", help="fine-tune; with quantizers this is QAT")
    group.add_argument("--do_eval", action="store_true", help="print and write the metrics")
    group.add_argument("--seed", type=int, default=0, help="of a new head, the order of data, dropout")


def _add_quantization(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quantization")
    group.add_argument("--fp32", action="store_true", help="no quantizers: the float model, for comparison")
    group.add_argument("--rules", help="name of a shipped rule set, or a rule file; qdqbert if left out")
    group.add_argument(
        "--calibrator", choices=method_names(), help="how ranges are found; each by its rule if left out"
    )
    group.add_argument("--percentile", type=float, help="for --calibrator percentile; 99.99 if left out")
    group.add_argument("--num_calib_batch", type=_count, default=16, help="of the training batch size")
    group.add_argument("--learn_ranges", action="store_true", help="train the ranges, too")
    group.add_argument("--teacher", type=Path, help="folder of a float model with the same head to learn from")
    group.add_argument("--distill_temperature", type=float, default=2.0, help="softens both models' outputs")
    group.add_argument("--distill_weight", type=float, default=0.5, help="share of the teacher in the loss, 0 to 1")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--learning_rate", type=float, default=5e-5, help="at its highest")
    group.add_argument("--weight_decay", type=float, default=0.0, help="of AdamW")
    group.add_argument("--num_train_epochs", type=float, default=2.0, help="passes over the training data")
    group.add_argument("--max_steps", type=int, default=-1, help="optimizer steps, instead of epochs")
    group.add_argument("--per_device_train_batch_size", type=_count, default=16, help="also of calibration")
    group.add_argument("--per_device_eval_batch_size", type=_count, default=32, help="of evaluation")
    group.add_argument("--gradient_accumulation_steps", type=_count, default=1, help="batches for one step")
    group.add_argument("--gradient_checkpointing", action="store_true", help="less memory, more time")
    group.add_argument("--disable_dropout", action="store_true", help="train without, as suits a short QAT")
    group.add_argument("--bf16", action="store_true", help="train in bfloat16 autocast")
    group.add_argument("--warmup_ratio", type=float, default=0.1, help="share of the steps that warm up")
    group.add_argument("--lr_scheduler_type", default="linear", help="as transformers names it")
    group.add_argument("--save_steps", type=int, default=0, help="steps between two checkpoints; 0 for none")
    group.add_argument("--resume_from_checkpoint", help="folder of a checkpoint, or 'last' for that in --output_dir")


def _add_onnx(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("ONNX")
    group.add_argument("--save_onnx", action="store_true", help="write model.onnx, with Q/DQ pairs if quantized")
    group.add_argument("--overwrite", action="store_true", help="replace the model.onnx that is there")
    group.add_argument("--target", choices=tuple(TARGETS), help="what to write it for; onnxruntime if left out")
    group.add_argument("--onnx", type=Path, help="a file that --save_onnx wrote: evaluate it, instead of a model")
    group.add_argument("--runtime", choices=runtimes(), help="what to run it on; onnxruntime if left out")


def _add_answers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("question answering")
    group.add_argument("--doc_stride", type=int, default=32, help="tokens that two windows share")
    group.add_argument("--n_best_size", type=_count, default=20, help="candidates kept for a question")
    group.add_argument("--max_answer_length", type=_count, default=30, help="in tokens")


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"{count} is less than 1")
    return count


def _check(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if not (given.do_calib or given.do_train or given.do_eval or given.save_onnx):
        parser.error("nothing to do: give --do_calib, --do_train, --do_eval or --save_onnx")
    for option in ("do_calib", "do_train"):
        if getattr(given, option) and given.train_file is None:
            parser.error(f"--{option} needs --train_file")
    if given.do_eval and given.validation_file is None:
        parser.error("--do_eval needs --validation_file")
    for option in ("do_calib", "learn_ranges"):
        if given.fp32 and getattr(given, option):
            parser.error(f"--{option} is about quantizers, and with --fp32 there are none; leave one of them out")
    for option, wanted in (
        ("learn_ranges", "do_train"),
        ("disable_dropout", "do_train"),
        ("teacher", "do_train"),
        ("calibrator", "do_calib"),
        ("percentile", "do_calib"),
        ("target", "save_onnx"),
        ("overwrite", "save_onnx"),
    ):
        if getattr(given, option) and not getattr(given, wanted):
            parser.error(f"--{option} says how to --{wanted}, which is not asked for; add it, or leave both out")
    if given.percentile is not None and not takes_percentile(given.calibrator):
        parser.error("--percentile goes with --calibrator percentile")
    if given.percentile is not None and not 0 < given.percentile <= 100:
        parser.error(f"--percentile {given.percentile} is no percentage: give more than 0 and at most 100")
    if not 0 <= given.warmup_ratio < 1:
        parser.error(f"--warmup_ratio {given.warmup_ratio} is no share of the steps: give 0 or more and less than 1")


def _check_onnx(parser: argparse.ArgumentParser, given: argparse.Namespace) -> None:
    if (given.onnx is None) == (given.model_name_or_path is None):
        parser.error("give either --model_name_or_path, the folder of a model, or --onnx, a file to evaluate")
    if given.runtime is not None and given.onnx is None:
        parser.error("--runtime says what to run --onnx on, which is not given; add it, or leave both out")
    for option in ("do_calib", "do_train", "save_onnx", "fp32", "rules"):
        if given.onnx is not None and getattr(given, option):
            parser.error(f"--onnx evaluates a file as it is; leave --{option} out")
    if given.target is not None and given.fp32:
        parser.error("--target is for quantized models; leave it or --fp32 out")
