"""What is said of batches that no model can be called with: by whatever takes batches, before anything runs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from exported import calibrated
from transformers import BertModel

import qdq_surgery as qs
from qdq_surgery.errors import CalibrationError, ModelError, OptionError

IDS = torch.tensor([[3, 4, 5]])

TAKERS = {
    "collect": qs.collect,
    "calibrate": qs.calibrate,
    "round_weights": qs.round_weights,
    "evaluate": qs.evaluate,
    "sensitivity": lambda qmodel, batches: qs.sensitivity(qmodel, batches, sites=False, layers=False),
}


@pytest.mark.parametrize("name", TAKERS)
@pytest.mark.parametrize(
    ("batches", "message"),
    [
        (None, r"batches is a NoneType, wanted an iterable of dicts of tensors"),
        (5, r"batches is a int, wanted an iterable"),
        ({"input_ids": IDS}, r"batches is one batch, a dict; give a list of batches"),
        ([{"input_ids": [[3, 4, 5]]}], r"^batch 0: input_ids is a list, wanted a tensor.*return_tensors='pt'"),
        ([{"input_ids": np.array([[3, 4]])}], r"^batch 0: input_ids is a ndarray, wanted a tensor"),
        ([{"input_ids": IDS, "attention_mask": [[1, 1, 1]]}], r"^batch 0: attention_mask is a list, wanted a tensor"),
        ([{"input_ids": IDS, 5: IDS}], r"^batch 0: it has the key 5, a int; its keys are names of arguments"),
        (
            [{"input_ids": IDS}, {"input_ids": IDS[:0]}],
            r"^batch 1: input_ids has the shape \(0, 3\), which holds nothing",
        ),
        ([{"input_ids": IDS[:, :0]}], r"^batch 0: input_ids has the shape \(1, 0\), which holds nothing"),
        ([{"input_ids": IDS}, {"input_ids": IDS + 90}], r"^batch 1: .* cannot run it: index out of range"),
        (  # which is not for the padding in it
            [{"input_ids": IDS, "token_type_ids": IDS + 90, "attention_mask": torch.tensor([[1, 1, 0]])}],
            r"^batch 0: .* cannot run it: index out of range",
        ),
    ],
)
def test_it_names_the_batch_and_what_is_wanted(name: str, batches: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        TAKERS[name](calibrated("bert", "BertModel"), batches)


@pytest.mark.parametrize("name", ["batches", "held_out"])
def test_tune_says_so_before_it_converts(name: str) -> None:
    given = {"batches": [{"input_ids": IDS}], "held_out": [{"input_ids": IDS}], name: 5}
    with pytest.raises(CalibrationError, match=f"^{name} is a int, wanted an iterable"):
        qs.tune(calibrated("bert", "BertModel"), given["batches"], held_out=given["held_out"])


@pytest.mark.parametrize("name", TAKERS)
def test_what_is_no_model(name: str) -> None:
    with pytest.raises(ModelError, match=r"found a NoneType, wanted a model that|there is no float model"):
        TAKERS[name](None, [{"input_ids": IDS}])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda data: qs.calibrate(calibrated("bert", "BertModel"), data, method="percentile", percentile="99"),
            "percentile '99' is out",
        ),
        (lambda data: qs.tune(calibrated("bert", "BertModel"), data, budget="1"), "budget='1' is no error"),
        (lambda data: qs.tune(calibrated("bert", "BertModel"), data, float_share=None), "=None is no share"),
        (lambda data: qs.evaluate(calibrated("bert", "BertModel"), data, metric=["mse"]), "metric .* is none"),
        (lambda data: qs.evaluate(calibrated("bert", "BertModel"), data).require("1"), "a loss of at most '1'"),
    ],
)
def test_options_of_another_type(call: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        call([{"input_ids": IDS}])


def test_a_misspelt_mask_is_seen_behind_a_forward_that_passes_on() -> None:
    class Mine(BertModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    qmodel = qs.convert(Mine(calibrated("bert", "BertModel").config).eval())
    with pytest.raises(
        CalibrationError, match="it has 'attention_masks', which Mine does not know; write 'attention_mask'"
    ):
        qs.calibrate(qmodel, [{"input_ids": IDS, "attention_masks": torch.ones_like(IDS)}])
