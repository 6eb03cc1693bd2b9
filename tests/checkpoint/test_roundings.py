"""Adapted roundings in a checkpoint: each with its quantizer, and whatever else a file says is refused."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for, build
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

import qdq_surgery as qs

SITE = "bert.encoder.layer.0.intermediate.dense._weight_quantizer"
INPUT = SITE.replace("_weight_", "_input_")
KEY = f"{SITE}._rounding"


@functools.cache
def _rounded() -> PreTrainedModel:
    model = build("bert", "BertForSequenceClassification")
    qmodel = qs.convert(model)
    statistics = qs.collect(qmodel, [batch_for(model, (4, 8))], moments=True)
    qs.calibrate(qmodel, statistics)
    qs.round_weights(qmodel, statistics)
    return qmodel


def rounded() -> PreTrainedModel:
    return copy.deepcopy(_rounded())


def load(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder)
    return model


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata)


def change_record(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def test_a_model_without_any_has_none_in_its_files(tmp_path: Path) -> None:
    qmodel = rounded()
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.set_rounding(None)
    qmodel.save_pretrained(tmp_path)
    assert not any(name.endswith("_rounding") for name in load_file(tmp_path / "model.safetensors"))
    assert "rounded" not in (tmp_path / "config.json").read_text()


def test_pickles(tmp_path: Path) -> None:
    qmodel = rounded()
    qmodel.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    again = load(tmp_path)
    for name, value in qmodel.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


TENSORS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop(KEY), rf"no adapted rounding of {SITE}, which was saved with one"),
    "of-an-activation": (
        lambda t: t.update({f"{INPUT}._rounding": t[KEY].clone()}),
        rf"an adapted rounding of {INPUT}, of which its config says nothing",
    ),
    "no-range": (lambda t: t.pop(f"{SITE}._amax"), r"no range"),
    "another-shape": (lambda t: t.update({KEY: t[KEY].T.contiguous()}), r"the rounding has the shape"),
    "one-number": (lambda t: t.update({KEY: t[KEY].reshape(-1)[0].clone()}), r"the rounding has the shape \(\)"),
    "a-row-more": (lambda t: t.update({KEY: torch.cat([t[KEY], t[KEY][:1]])}), r"the rounding has the shape"),
    "floats": (lambda t: t.update({KEY: t[KEY].float()}), r"the rounding is in float32, wanted int8"),
    "int32": (lambda t: t.update({KEY: t[KEY].int()}), r"the rounding is in int32, wanted int8"),
    "uint8": (lambda t: t.update({KEY: t[KEY].byte()}), r"the rounding is in uint8, wanted int8"),
    "bool": (lambda t: t.update({KEY: t[KEY].bool()}), r"the rounding is in bool, wanted int8"),
    "bfloat16": (lambda t: t.update({KEY: t[KEY].bfloat16()}), r"the rounding is in bfloat16, wanted int8"),
}


@pytest.mark.parametrize("name", TENSORS)
def test_files_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    rounded().save_pretrained(tmp_path)
    change, words = TENSORS[name]
    change_tensors(tmp_path, change)
    with pytest.raises(qs.ModelError, match=words):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["meta", "sparse", "nested"])
@pytest.mark.parametrize("key", [KEY, f"{SITE}._amax"])
def test_tensors_of_a_pickle_have_values_in_a_row(kind: str, key: str, tmp_path: Path) -> None:
    rounded().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    made = {
        "meta": tensors[key].to("meta"),
        "sparse": tensors[key].to_sparse(),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    }
    torch.save({**tensors, key: made[kind]}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(qs.ModelError, match="damaged"):
        load(tmp_path)


RECORDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "says-nothing": (lambda r: r.pop("rounded"), r"an adapted rounding of .*, of which its config says nothing"),
    "says-too-much": (
        lambda r: r["rounded"].update({INPUT: None}),
        rf"no adapted rounding of {INPUT}, which was saved with one",
    ),
    "names-nobody": (lambda r: r["rounded"].update({"a.b_quantizer": None}), r"which is not in sites"),
    "is-a-list": (lambda r: r.update(rounded=[SITE]), r"rounded is list, wanted a mapping"),
}


@pytest.mark.parametrize("name", RECORDS)
def test_configs_that_do_not_fit_are_refused(name: str, tmp_path: Path) -> None:
    rounded().save_pretrained(tmp_path)
    change, words = RECORDS[name]
    change_record(tmp_path, change)
    with pytest.raises((qs.ModelError, qs.OptionError, ValueError), match=words):
        load(tmp_path)


def test_an_activations_in_both_is_refused(tmp_path: Path) -> None:
    rounded().save_pretrained(tmp_path)
    change_tensors(tmp_path, lambda tensors: tensors.update({f"{INPUT}._rounding": tensors[KEY].clone()}))
    change_record(tmp_path, lambda record: record["rounded"].update({INPUT: None}))
    with pytest.raises(qs.ModelError, match="an adapted rounding is for the weight of a linear"):
        load(tmp_path)
