"""The folders that the tools load, all-MiniLM-L6-v2 and a classifier on it, quantized by the command; and our numbers.

The classifier's head is random: what is compared is the runs of one file.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import qdq_surgery as qs
from qdq_surgery.cli.commands import main as command
from qdq_surgery.cli.demo.files import checkpoint
from qdq_surgery.deployment.folder import FILE
from qdq_surgery.padding.token_masks import token_means
from qdq_surgery.targets.registry import session_on
from qdq_surgery.texts.standard_library import standard_library_texts
from tools.compared import Rows
from tools.given import EMBEDDINGS, MOST_TOKENS

__all__ = ["deploy", "given_batches", "ours"]

_CALIBRATION, _TEXTS, _BATCH, _CLASSES = 160, 64, 16, 3


def given_batches(output: Path) -> list[list[str]]:
    """Docstrings of the standard library in batches, written as the programs read them."""
    texts = standard_library_texts(_CALIBRATION + _TEXTS)[_CALIBRATION:]
    batches = [texts[at : at + _BATCH] for at in range(0, len(texts), _BATCH)]
    output.write_text(json.dumps(batches), encoding="utf-8")
    return batches


def deploy(output: Path, target: str, wanted: str) -> Path:
    """Quantize the model that gives what is wanted into a folder, as a user does; what was there is made anew.

    Raises:
        RuntimeError: The command failed; it has said why.
    """
    shutil.rmtree(output, ignore_errors=True)
    texts = output.with_name("calibration.txt")
    texts.write_text("\n".join(standard_library_texts(_CALIBRATION)) + "\n", encoding="utf-8")
    options = [
        "--target",
        target,
        "--no-round-weights",
        "--triton",
        "int8",
        *(["--metric", "cosine"] if wanted == EMBEDDINGS else []),
    ]
    model = checkpoint() if wanted == EMBEDDINGS else _classifier(output.with_name("classifier"))
    with contextlib.redirect_stdout(sys.stderr):  # standard output is the table's
        if command(["quantize", str(model), str(texts), str(output), *options]) != 0:
            raise RuntimeError(f"qdq-surgery quantize {model} for {target} failed")
    return output


def _classifier(folder: Path) -> Path:
    if not folder.exists():
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_pretrained(checkpoint(), num_labels=_CLASSES)
        AutoTokenizer.from_pretrained(checkpoint()).save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def ours(folder: Path, target: str, batches: Sequence[Sequence[str]], wanted: str) -> Rows:
    """What :func:`qdq_surgery.load_onnx` makes of the texts, from the ONNX file of a deployed folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    precision = "float32" if target == "openvino" else None  # as the programs ask for
    served = qs.load_onnx(folder / FILE, target, precision=precision)
    rows = []
    for texts in batches:
        batch = tokenizer(list(texts), padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt")
        outputs = served(**batch)
        if wanted == EMBEDDINGS:
            means = token_means(outputs.last_hidden_state, batch["attention_mask"])
            rows.append(torch.nn.functional.normalize(means, dim=-1))
        else:
            rows.append(outputs.logits)
    version = session_on(target).installed()
    return Rows(FILE.as_posix(), {"qdq_surgery": qs.__version__}, (target, version), torch.cat(rows).numpy())
