"""Ranges in a checkpoint's files: float32 whatever the rest is, complete, and none that cannot be."""

from __future__ import annotations

import math
import os
import re
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
from qdq_surgery.checkpoint.range_files import STATE_PATTERN, read_ranges
from qdq_surgery.match.site_names import STATE_SUFFIXES

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
    found = read_ranges([str(path)]).ranges
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
    assert read_ranges([str(tmp_path / "file.safetensors")]).ranges == {}
    assert read_ranges([]) == ({}, False, {}, {})


@pytest.mark.parametrize("which", [None, 0, 1])
@pytest.mark.parametrize("kind", ["_input_quantizer", "_weight_quantizer"])
def test_a_zero_in_any_file_is_seen(which: int | None, kind: str, tmp_path: Path) -> None:
    for number in range(2):
        tensors = {
            f"{number}._input_quantizer._amax": torch.tensor(1.5),
            f"{number}._weight_quantizer._amax": torch.tensor([[0.5], [2.0]]),
        }
        if number == which:
            tensors[f"{number}.{kind}._amax"].view(-1)[-1] = 0.0
        save_file(tensors, tmp_path / f"{number}.safetensors")
    assert read_ranges([str(tmp_path / f"{number}.safetensors") for number in range(2)]).zeros is (which is not None)


@pytest.mark.parametrize(
    "name",
    ["a._input_quantizer._amax", "_quantizer._amax", "a\nb._weight_quantizer._amax", "a._weight_quantizer._rounding"],
)
def test_the_pattern_is_the_suffix(name: str) -> None:
    among_others = re.compile(rf"(position_ids$)|({STATE_PATTERN})")  # as transformers puts them together
    for each in (name, f"{name}.weight", f"{name}2", name.replace("_quantizer", ""), name.replace("._", "__")):
        assert (among_others.search(each) is not None) is each.endswith(STATE_SUFFIXES), each


@pytest.mark.parametrize("value", [-1.0, -math.inf, math.inf, math.nan])
@pytest.mark.parametrize("channel", [False, True])
def test_no_range_at_all(value: float, channel: bool, tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    name = FIRST.replace("_input", "_weight") if channel else FIRST

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}._amax"].view(-1)[-1] = value

    change_weights(tmp_path, change)
    with pytest.raises(
        qs.ModelError, match=f"model.safetensors is damaged: the range of '{name}' is negative or not finite"
    ):
        BertForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("kind", ["_input_quantizer", "_weight_quantizer"])
def test_a_range_of_zero_is_neither_saved_nor_loaded(kind: str, tmp_path: Path) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    name = FIRST.replace("_input_quantizer", kind)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"{name}._amax"].view(-1)[-1] = 0.0

    change_weights(tmp_path, change)
    with pytest.raises(qs.ModelError, match=f"range of {name} does not fit: it is zero"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    qs.quantizers(qmodel)[name].amax.view(-1)[-1] = 0.0
    with pytest.raises(qs.ModelError, match=f"range of {name} is not saved: it is zero"):
        qmodel.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_channel_without_weights_has_a_range_of_zero(tmp_path: Path) -> None:
    qmodel = calibrated()
    linear = qmodel.bert.encoder.layer[0].attention.self.query
    with torch.no_grad():
        linear.weight[3] = 0.0
    qs.recalibrate_weights(qmodel)
    assert float(linear._weight_quantizer.amax[3]) == 0.0
    qmodel.save_pretrained(tmp_path)
    assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path), qmodel)


MISSHAPEN: dict[str, tuple[str, Any]] = {
    "weight-flat": ("_weight_quantizer", lambda value: value.reshape(-1)),
    "weight-along-the-other-axis": ("_weight_quantizer", lambda value: value.reshape(1, -1)),
    "weight-of-one": ("_weight_quantizer", lambda value: value.max()),
    "weight-of-two": ("_weight_quantizer", lambda value: value[:2]),
    "weight-of-none": ("_weight_quantizer", lambda value: value[:0]),
    "weight-one-less": ("_weight_quantizer", lambda value: value[:-1]),
    "input-of-a-channel-each": ("_input_quantizer", lambda value: value.expand(32)),
    "input-of-none": ("_input_quantizer", lambda value: value.reshape(1)[:0]),
    "input-with-axes": ("_input_quantizer", lambda value: value.reshape(1, 1)),
}


@pytest.mark.parametrize("name", MISSHAPEN)
def test_the_shape_of_a_range_is_its_quantizers(name: str, tmp_path: Path) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    kind, change = MISSHAPEN[name]
    key = f"{FIRST.replace('_input_quantizer', kind)}._amax"
    change_weights(tmp_path, lambda tensors: tensors.update({key: change(tensors[key]).clone()}))
    with pytest.raises(qs.ModelError, match=r"query\._(input|weight)_quantizer does not fit: the range has the shape"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    state = {**qmodel.state_dict(), key: change(qmodel.state_dict()[key]).clone()}
    if state[key].ndim > 0:  # (torch's own way takes a number for all channels)
        with pytest.raises(RuntimeError, match=r"quantizer\._amax: the range has the shape"):
            calibrated().load_state_dict(state)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn, torch.complex64])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_range_is_a_float(dtype: torch.dtype, kind: str, tmp_path: Path) -> None:
    tensors = {"a._input_quantizer._amax": torch.tensor(1.0).to(dtype)}
    path = tmp_path / f"file.{kind}"
    if kind == "bin":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    with pytest.raises(qs.ModelError, match=rf"file\.{kind} is damaged: the range 'a\._input.*wanted float32"):
        read_ranges([str(path)])


@pytest.mark.parametrize("content", [b"", b"\xff" * 100, (2**60).to_bytes(8, "little") + b"{}", b"PK\x03\x04garbage"])
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_damaged_file_is_named(content: bytes, kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"file.{kind}"
    path.write_bytes(content)
    with pytest.raises(qs.ModelError, match=rf"file\.{kind}"):
        read_ranges([str(path)])


def test_a_range_is_no_larger_than_a_range(tmp_path: Path) -> None:
    save_file({"a._input_quantizer._amax": torch.ones(1 << 25)}, tmp_path / "file.safetensors")
    with pytest.raises(qs.ModelError, match="which no range has"):
        read_ranges([str(tmp_path / "file.safetensors")])


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
    with pytest.raises(qs.ModelError, match=r"model-00001-of.*No such file"):
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
    qmodel.save_pretrained(tmp_path, state_dict={n: v * 2 if "quantizer" in n else v for n, v in state_of(qmodel)})
    with pytest.raises(qs.ModelError, match="does not see the ranges in a state_dict="):
        BertForSequenceClassification.from_pretrained(None, config=qmodel.config, state_dict=qmodel.state_dict())
    found, own = qs.quantizers(BertForSequenceClassification.from_pretrained(tmp_path)), qs.quantizers(qmodel)
    assert all(torch.equal(each.amax, 2 * own[name].amax) for name, each in found.items())


def state_of(qmodel: Any) -> Any:
    return qmodel.state_dict().items()
