"""A model is borrowed while it is calibrated or measured: no copy of it is made that would stay so."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for, build
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.errors import ModelError

Copy = Callable[[PreTrainedModel, Path], Any]

COPIES: dict[str, Copy] = {
    "copy": lambda model, _: copy.deepcopy(model),
    "saved model": lambda model, folder: model.save_pretrained(folder / "saved"),
}


def while_collected(model: PreTrainedModel, batch: dict[str, Tensor], make: Callable[[], Any]) -> None:
    def batches() -> Iterator[dict[str, Tensor]]:
        yield batch
        make()

    qs.collect(model, batches())


def while_calibrated_elsewhere(model: PreTrainedModel, batch: dict[str, Tensor], make: Callable[[], Any]) -> None:
    started, over = threading.Event(), threading.Event()

    def batches() -> Iterator[dict[str, Tensor]]:
        yield batch
        started.set()
        over.wait(60)

    other = threading.Thread(target=lambda: qs.calibrate(model, batches(), "max"))
    other.start()
    try:
        assert started.wait(60)
        make()
    finally:
        over.set()
        other.join(60)


def while_measured(model: PreTrainedModel, batch: dict[str, Tensor], make: Callable[[], Any]) -> None:
    def metric(*_: Any) -> float:
        make()
        return 0.0

    qs.sensitivity(model, [batch], metric, sites=False)


@pytest.fixture
def qmodel() -> PreTrainedModel:
    model = build("bert", "BertForSequenceClassification", num_hidden_layers=1)
    made = qs.convert(model, inplace=True)
    qs.calibrate(made, [batch_for(made, (3, 9), mask=True)])
    return made


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("borrow", [while_collected, while_calibrated_elsewhere, while_measured])
def test_it_is_refused_meanwhile_and_made_afterwards(
    borrow: Callable[..., None], way: str, qmodel: PreTrainedModel, tmp_path: Path
) -> None:
    batch, make = batch_for(qmodel, (3, 9), mask=True), COPIES[way]
    words = f"this BertForSequenceClassification is being calibrated or measured, .* make the {way} before that"
    with torch.no_grad():
        wanted = qmodel(**batch).logits
    with pytest.raises(ModelError, match=words):
        borrow(qmodel, batch, lambda: make(qmodel, tmp_path))
    assert not (tmp_path / "saved").exists()
    made = make(qmodel, tmp_path)
    if way == "saved model":
        made = type(qmodel).from_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(qmodel(**batch).logits, wanted)
        assert torch.equal(made(**batch).logits, wanted)


def test_nor_is_a_file_of_it_certified(qmodel: PreTrainedModel, tmp_path: Path) -> None:
    """The inputs of a certificate would be among the statistics."""
    batch = batch_for(qmodel, (3, 9), mask=True)
    for borrow in (while_collected, while_calibrated_elsewhere, while_measured):
        with pytest.raises(ModelError, match=r"being calibrated or measured, .* make the certificate before that"):
            borrow(qmodel, batch, lambda: qs.certify(qmodel, tmp_path / "never.onnx", batch))


def test_nor_is_it_pickled(qmodel: PreTrainedModel) -> None:
    batch = batch_for(qmodel, (3, 9), mask=True)
    for borrow in (while_collected, while_calibrated_elsewhere):
        with pytest.raises(ModelError, match="that is being calibrated cannot be pickled"):
            borrow(qmodel, batch, lambda: pickle.dumps(qmodel))
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(qmodel))(**batch).logits, qmodel(**batch).logits)
