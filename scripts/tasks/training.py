"""Fine-tuning by Hugging Face's Trainer; with quantizers in the model that is QAT."""

from __future__ import annotations

import inspect
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, TrainingArguments

from qdq_surgery.errors import ModelError
from qdq_surgery.trainer import QATTrainer
from tasks.errors import OptionError
from tasks.features import Collator, Feature, rows
from tasks.options import Options

__all__ = ["CHECKPOINTS", "train"]

#: Folder of the checkpoints, in the output folder.
CHECKPOINTS = "checkpoints"


def train(
    model: PreTrainedModel,
    features: Sequence[Feature],
    collator: Collator,
    options: Options,
    teacher: PreTrainedModel | None,
) -> tuple[int, float]:
    """Fine-tune in place.

    Returns:
        Number of optimizer steps, and seconds.
    """
    trainer = QATTrainer(
        model=model,
        args=_arguments(options),
        train_dataset=rows(features),
        data_collator=collator,
        teacher=teacher,
        temperature=options.distill_temperature,
        distill_weight=options.distill_weight,
    )
    start = time.perf_counter()
    with _without_dropout(model, options.disable_dropout):
        trainer.train(resume_from_checkpoint=_checkpoint(options))
    return trainer.state.global_step, time.perf_counter() - start


@contextmanager
def _without_dropout(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    layers = [module for module in model.modules() if wanted and isinstance(module, nn.Dropout)]
    before = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, p in zip(layers, before, strict=True):
            layer.p = p


def _arguments(options: Options) -> TrainingArguments:
    try:
        return TrainingArguments(
            output_dir=str(options.output_dir / CHECKPOINTS),
            learning_rate=options.learning_rate,
            weight_decay=options.weight_decay,
            num_train_epochs=options.num_train_epochs,
            max_steps=options.max_steps,
            per_device_train_batch_size=options.per_device_train_batch_size,
            gradient_accumulation_steps=options.gradient_accumulation_steps,
            **_checkpointing(options),
            bf16=options.bf16,
            warmup_steps=options.warmup_ratio,  # less than 1 is a share of the steps
            lr_scheduler_type=options.lr_scheduler_type,
            save_strategy="steps" if options.save_steps > 0 else "no",
            save_steps=max(options.save_steps, 1),
            save_total_limit=2,
            logging_steps=50,
            seed=options.seed,
            report_to="none",
            remove_unused_columns=False,
            disable_tqdm=not sys.stderr.isatty(),
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    except ValueError as error:
        raise OptionError(f"transformers refuses the training options: {error}") from error


def _checkpointing(options: Options) -> dict[str, Any]:
    """Recompute activations instead of keeping them; transformers has renamed these options on the way through 5."""
    if not options.gradient_checkpointing:
        return {}
    known = inspect.signature(TrainingArguments).parameters
    name = next(name for name in ("activation_checkpointing", "gradient_checkpointing") if name in known)
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}


def _checkpoint(options: Options) -> str | None:
    """The folder to go on from."""
    wanted = options.resume_from_checkpoint
    if wanted is None:
        return None
    if wanted == "last":
        found = sorted((options.output_dir / CHECKPOINTS).glob("checkpoint-*"), key=_step)
        if not found:
            raise ModelError(f"{options.output_dir / CHECKPOINTS} has no checkpoint; train with --save_steps first")
        return str(found[-1])
    if not Path(wanted).is_dir():
        raise ModelError(f"--resume_from_checkpoint {wanted} is no folder; give a checkpoint, or 'last'")
    return wanted


def _step(folder: Path) -> int:
    digits = folder.name.rpartition("-")[2]
    return int(digits) if digits.isdigit() else -1
