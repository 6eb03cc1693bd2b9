"""Ranges in a checkpoint's files: float32 whatever the rest is, complete, and none that cannot be."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem import assert_equal, calibrated, ranges
from safetensors.torch import save_file
from saved import WEIGHTS, assert_reloaded, change_weights
from torch import Tensor
from transformers import BertForSequenceClassification, BertModel

import qdq_surgery as qs
from qdq_surgery.pretrained.ranges import read_ranges

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST = "bert.encoder.layer.0.attention.self.query._input_quantizer"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_they_are_read_in_float32(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    tensors = {
        "a._input_quantizer._amax": torch.tensor(1.5, dtype=dtype),
        "a._weight_quantizer._amax": torch.tensor([[0.5], [0.0]], dtype=dtype),
        "a.weight": torch.ones(2, 2, dtype=dtype),
        "a._amax": torch.ones(1, dtype=dtype),
    }
    path = tmp_path / f"file.{kind}"
    if kind == "bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    found, _ = read_ranges([str(path)])
    wanted = {"a._input_quantizer": torch.tensor(1.5), "a._weight_quantizer": torch.tensor([[0.5], [0.0]])}
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value)
    # They are no view of the file.
    os.truncate(path, 0)
    assert torch.equal(found["a._weight_quantizer"], wanted["a._weight_quantizer"])


def test_files_without_any(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "file.safetensors")
    assert read_ranges([str(tmp_path / "file.safetensors")])[0] == {}
    assert read_ranges([]) == ({}, {})


@pytest.mark.parametrize("value", [-1.0, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("channel", [False, True])
def test_no_range_at_all(value: float, channel: bool, tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    name = FIRST.replace("_input", "_weight") if channel else FIRST

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}._amax"].view(-1)[-1] = value

    change_weights(tmp_path, change)
    with pytest.raises(qs.ModelError, match=f"range of {name} is negative or not finite; calibrate"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_zero_is_a_range(tmp_path: Path) -> None:
    qmodel = calibrated()
    qs.quantizers(qmodel)[FIRST].amax = 0.0
    qmodel.save_pretrained(tmp_path)
    assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path), qmodel)


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"torch_dtype": torch.float16}, {"dtype": "bfloat16"}])
def test_they_stay_in_float32(options: dict[str, Any], tmp_path: Path) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    found = BertForSequenceClassification.from_pretrained(tmp_path, **options)
    assert found.dtype in (torch.bfloat16, torch.float16)
    assert {each.amax.dtype for each in qs.quantizers(found).values()} == {torch.float32}
    assert_equal(ranges(found), ranges(qmodel))
    # And in a checkpoint of such a model.
    found.save_pretrained(tmp_path / "half")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "half")
    assert again.dtype == found.dtype
    assert_equal(ranges(again), ranges(qmodel))


def test_sharded(tmp_path: Path) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path, max_shard_size=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path), qmodel)


def test_pickled(tmp_path: Path) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    torch.save(qmodel.state_dict(), tmp_path / "pytorch_model.bin")
    assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path), qmodel)


@pytest.mark.parametrize("lost", [1, 40])
def test_ranges_that_are_missing(lost: int, tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in sorted(name for name in tensors if name.endswith("_amax"))[:lost]:
            del tensors[name]

    change_weights(tmp_path, change)
    with pytest.raises(qs.ModelError, match=f"no range for {lost} quantizers that were calibrated"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_ranges_of_nobody(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    extra = "bert.encoder.layer.0.output.mul_a_quantizer._amax"
    change_weights(tmp_path, lambda tensors: tensors.update({extra: torch.ones(())}))
    for cls in (BertForSequenceClassification, BertModel):
        with pytest.raises(qs.ModelError, match=r"ranges of 1 quantizers that its rules do not make .*mul_a_quantizer"):
            cls.from_pretrained(tmp_path)


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path, max_shard_size=20_000)
    sorted(tmp_path.glob("*.safetensors"))[0].unlink()
    with pytest.raises(OSError, match="model-00001-of"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_ranges_beside_a_float_config(tmp_path: Path) -> None:
    """Files of a state dict with ranges, and rules that are given at loading."""
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    floats = calibrated()
    floats.dequantize()
    floats.config.save_pretrained(tmp_path)
    assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=qs.QDQConfig()), qmodel)
    with pytest.raises(qs.ModelError, match="ranges of 16 quantizers that its rules do not make"):
        BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=qs.QDQConfig("linear-only"))


def test_under_names_that_are_mapped(tmp_path: Path) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)

    def change(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[name.replace("encoder.layer", "stack")] = tensors.pop(name)

    change_weights(tmp_path, change)
    found = BertForSequenceClassification.from_pretrained(tmp_path, key_mapping={r"bert\.stack": "bert.encoder.layer"})
    assert_reloaded(found, qmodel)


def test_a_state_dict_has_none(tmp_path: Path) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path, state_dict={n: v * 0 if "quantizer" in n else v for n, v in state_of(qmodel)})
    with pytest.raises(qs.ModelError, match="does not see the ranges in a state_dict="):
        BertForSequenceClassification.from_pretrained(None, config=qmodel.config, state_dict=qmodel.state_dict())
    assert all(float(each.amax.sum()) == 0 for each in qs.quantizers(BertModel.from_pretrained(tmp_path)).values())


def state_of(qmodel: Any) -> Any:
    return qmodel.state_dict().items()
