"""Saved models for the tests of loading: the files of a folder, changed by hand."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for
from ecosystem import assert_equal, state
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.checkpoint import plugin
from qdq_surgery.checkpoint.plan_cache import DIGEST, METADATA
from qdq_surgery.surgery.model_state import plan_of

WEIGHTS = "model.safetensors"


def config_of(folder: Path) -> dict[str, Any]:
    """The ``quantization_config`` in a folder."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]  # type: ignore[no-any-return]


def change_config(folder: Path, change: Callable[[Any], Any]) -> None:
    """Apply ``change`` to the ``quantization_config`` in a folder."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def metadata_of(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def change_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply ``change`` to the tensors in a folder."""
    metadata = metadata_of(folder / WEIGHTS)
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata=metadata)


def change_lock(folder: Path, change: Callable[[str], str | None], signed: bool = False) -> None:
    """Put another lock into a folder; ``None`` takes it out.

    Args:
        signed: With the digest that belongs to it, as a forger would.
    """
    metadata = metadata_of(folder / WEIGHTS)
    text = change(metadata.pop(METADATA))
    if signed and text is not None:
        metadata[DIGEST] = hashlib.sha256(text.encode()).hexdigest()
    save_file(
        load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={**metadata, **({METADATA: text} if text else {})}
    )


def logits(model: PreTrainedModel) -> Tensor:
    """What the model says of one batch."""
    with torch.no_grad():
        output = model(**batch_for(model, (3, 7)))
    return output[0].clone()  # type: ignore[no-any-return]


def assert_reloaded(found: PreTrainedModel, wanted: PreTrainedModel) -> None:
    """The same class, tensors, sites and output, all to the bit."""
    assert type(found) is type(wanted)
    assert_equal(state(found), state(wanted))
    assert plan_of(found).sites == plan_of(wanted).sites
    assert list(qs.quantizers(found)) == list(qs.quantizers(wanted))
    assert torch.equal(logits(found), logits(wanted))


def count_matches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows whenever loading matches rules, rather than trusting a lock."""
    made: list[str] = []
    analyze = plugin.analyze

    def counted(model: PreTrainedModel, *args: Any) -> Any:
        made.append(type(model).__name__)
        return analyze(model, *args)

    monkeypatch.setattr(plugin, "analyze", counted)
    return made
