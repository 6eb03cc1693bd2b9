"""Configurations as they are released, in small: converted, calibrated, saved, loaded, exported and served."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from padded_models import CASES, TINY, Case, Shared, Towers, spread
from torch import Tensor
from transformers import BertConfig, EncoderDecoderModel, PreTrainedModel
from transformers.utils import ModelOutput

import qdq_surgery as qs

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]


@dataclass
class Score(ModelOutput):  # type: ignore[misc]
    """What a bi-encoder gives: an export names the fields of such a class."""

    score: Tensor | None = None


class TwoTowers(Towers):
    def forward(
        self, input_ids: Tensor, passage_ids: Tensor, attention_mask: Any = None, passage_mask: Any = None
    ) -> Any:
        return Score(score=super().forward(input_ids, passage_ids, attention_mask, passage_mask))


class OneTowerTwice(Shared):
    def forward(
        self, input_ids: Tensor, passage_ids: Tensor, attention_mask: Any = None, passage_mask: Any = None
    ) -> Any:
        return Score(score=super().forward(input_ids, passage_ids, attention_mask, passage_mask))


def scoring(case: Case, kind: type[PreTrainedModel]) -> Case:
    return Case(lambda: kind(BertConfig(**TINY)), case.batch, case.texts, case.beside)


CONFIGURATIONS = {
    "deberta-v3": CASES["deberta-v3"],
    "two-towers": scoring(CASES["two-towers"], TwoTowers),
    "one-tower-twice": scoring(CASES["one-tower-twice"], OneTowerTwice),
    "bert2bert": CASES["bert2bert"],
    "layoutlmv3": CASES["layoutlmv3"],
    "luke": CASES["luke"],
}


#: Traced with open shapes: towers and entities have axes of their own. The others in half the time.
OPEN = ("two-towers", "luke")


def outputs(model: Any, batch: dict[str, Tensor], masks: tuple[str, ...]) -> dict[str, Tensor]:
    """What it says of tokens that are there, and of whole rows."""
    with torch.no_grad():
        returned = model(**batch)
    arrays = {name: value for name, value in returned.items() if isinstance(value, (Tensor, np.ndarray))}
    found = {name: torch.as_tensor(value) for name, value in arrays.items()}
    found = {name: value for name, value in found.items() if value.dtype.is_floating_point}
    for name, value in found.items():
        fitting = [mask for mask in masks if value.ndim == 3 and value.shape[:2] == batch[mask].shape]
        if fitting:
            found[name] = value[batch[fitting[-1]].bool()]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_its_whole_life(name: str, tmp_path: Path) -> None:
    case = CONFIGURATIONS[name]
    torch.manual_seed(0)
    model = spread(case.make())
    if isinstance(model, EncoderDecoderModel):  # whose parts come with an attention of their own choice
        model.encoder.set_attn_implementation("eager")
        model.decoder.set_attn_implementation("eager")
    masks = tuple(case.texts)
    qmodel = qs.convert(model, example_inputs=case.batch(0))
    with qs.quantization_disabled(qmodel):
        plain, wanted = outputs(qmodel, case.batch(1), masks), outputs(model, case.batch(1), masks)
    assert plain.keys() == wanted.keys()
    for field, value in wanted.items():
        assert torch.equal(plain[field], value), field
    qs.calibrate(qmodel, [case.batch(seed) for seed in range(3)])
    quantized = outputs(qmodel, case.batch(1), masks)

    qmodel.save_pretrained(tmp_path / "saved")
    found = type(qmodel).from_pretrained(tmp_path / "saved").eval()
    assert list(qs.quantizers(found)) == list(qs.quantizers(qmodel))
    for field, value in outputs(found, case.batch(1), masks).items():
        assert torch.equal(value, quantized[field]), field

    exported = qs.export_onnx(found, tmp_path / "model.onnx", case.batch(0), dynamic=name in OPEN)  # certified
    assert exported.parity is not None
    served = outputs(qs.load_onnx(tmp_path / "model.onnx"), case.batch(1), masks)
    assert served
    for field, value in served.items():
        # A value on a tie may be a step apart, and each site is compared by itself in the certificate.
        torch.testing.assert_close(value, quantized[field], rtol=0.05, atol=0.05)
