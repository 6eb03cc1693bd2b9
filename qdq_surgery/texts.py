"""Texts as batches: from a file, by the tokenizer of a model's folder."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.positions import longest_text

__all__ = ["read_texts", "text_batches"]


def read_texts(path: str | Path) -> list[str]:
    """The lines of a file that are not empty.

    Raises:
        CalibrationError: The file cannot be read, is not UTF-8, or has no text.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path} is not UTF-8 at byte {error.start}; save it as UTF-8") from None
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise CalibrationError(f"{path} has no text; write one in each line")
    return texts


def text_batches(folder: str | Path, texts: Sequence[str], rows: int, length: int) -> list[dict[str, Any]]:
    """The texts as the tokenizer in ``folder`` gives them, sorted by length so that there is little padding.

    Args:
        rows: Texts in a batch.
        length: Most tokens of a text; what is longer is cut off.

    Raises:
        ModelError: The folder has no tokenizer.
        CalibrationError: ``rows`` or ``length`` is too small.
    """
    if rows < 1 or length < 3:
        raise CalibrationError(f"batches of {rows} texts with at most {length} tokens: give at least 1 and 3")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(f"{folder} has no tokenizer: {reason[0] if reason else type(error).__name__}") from error
    ordered = sorted(texts, key=len)
    length = min(length, tokenizer.model_max_length, _positions(folder))
    try:
        return [
            dict(
                tokenizer(ordered[i : i + rows], padding=True, truncation=True, max_length=length, return_tensors="pt")
            )
            for i in range(0, len(ordered), rows)
        ]
    except ValueError as error:  # no padding token, above all
        raise ModelError(f"the tokenizer of {folder} cannot make batches: {str(error).splitlines()[0]}") from error


def _positions(folder: str | Path) -> int:
    """How many tokens the model takes."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    return longest_text(config) or sys.maxsize
