"""``QDQConfig``: what ``config.json`` keeps, what is made of it, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for, build
from ecosystem import CLASSIFIER, calibrated
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from saved import assert_reloaded, change_config, config_of
from transformers import AutoConfig, AutoModel, BertForSequenceClassification

import qdq_surgery as qs
from qdq_surgery.checkpoint.config import QUANT_METHOD, QDQConfig
from qdq_surgery.checkpoint.quantizer_states import record_of
from qdq_surgery.quantize.descriptors import descriptor_from_data, descriptor_to_data
from qdq_surgery.safety.untrusted import DamagedError, Item

RULES = """\
schema: 1
name: mine
extends: qdqbert
exclude:
  - {layers: [0], sites: "add_*", why: the first layer's residual costs the most}
"""


def through_json(config: QDQConfig) -> QDQConfig:
    return QDQConfig.from_dict(json.loads(config.to_json_string()))  # type: ignore[no-any-return]


@pytest.mark.parametrize("rules", ["qdqbert", "linear-only", "fuse-qkv"])
@pytest.mark.parametrize("saved", [False, True])
def test_it_comes_back(rules: str, saved: bool) -> None:
    config = QDQConfig(rules, record_of(calibrated(rules=rules)) if saved else None)
    again = through_json(config)
    assert again == config
    assert again.to_dict() == config.to_dict()
    assert again.record == config.record
    assert QDQConfig.from_dict(config.to_dict(), return_unused_kwargs=True, other=1)[1] == {"other": 1}


def test_what_it_says() -> None:
    config = QDQConfig()
    assert config.quant_method == QUANT_METHOD
    assert list(config.to_dict()) == ["quant_method", "schema", "rules"]
    assert config.get("quant_method") == QUANT_METHOD
    assert config.get("load_in_8bit", False) is False
    assert "encoder-linear" in repr(config)
    assert copy.deepcopy(config) == config
    assert copy.deepcopy(config).rules is config.rules
    assert config != QDQConfig("linear-only")
    assert config != config.to_dict()
    assert QDQConfig.from_dict({"quant_method": QUANT_METHOD, "rules": "qdqbert"}) == config
    assert QDQConfig.from_dict({"quant_method": QUANT_METHOD}) == config


def test_a_model_config_that_has_one(tmp_path: Path) -> None:
    qmodel = calibrated()
    assert not hasattr(
        qmodel.config, "quantization_config"
    )  # contract 3: until it is saved, the config is the float one
    qmodel.save_pretrained(tmp_path)
    config = qmodel.config
    assert json.loads(config.to_json_string())["quantization_config"] == config.quantization_config.to_dict()
    assert copy.deepcopy(config).quantization_config == config.quantization_config
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).quantization_config == config.quantization_config.to_dict()
    # The config of a saved model, given to the next one.
    for given in (qmodel.config, AutoConfig.from_pretrained(tmp_path)):
        assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path, config=given), qmodel)


def test_rules_by_name_in_a_config_by_hand(tmp_path: Path) -> None:
    model = build("bert", CLASSIFIER)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": QUANT_METHOD, "rules": "linear-only"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = BertForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager")
    assert_reloaded(found, qs.convert(model, "linear-only"))


@pytest.mark.parametrize("given", ["object", "dict"])
def test_converted_by_an_argument(given: str, tmp_path: Path) -> None:
    model = build("bert", CLASSIFIER)
    model.save_pretrained(tmp_path)
    config = QDQConfig("tensorrt")
    option = config if given == "object" else config.to_dict()
    found = BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=option)
    assert_reloaded(found, qs.convert(model, "tensorrt"))
    # One object for two models.
    again = BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=option)
    qs.calibrate(found, [batch_for(found, (2, 6))])
    found.save_pretrained(tmp_path / "calibrated")
    assert config.record is None
    assert all(each.amax is None for each in qs.quantizers(again).values())


def test_a_rule_file_may_go(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(RULES)
    qmodel = qs.convert(build("bert", CLASSIFIER), path)
    path.unlink()
    qmodel.save_pretrained(tmp_path / "model")
    found = BertForSequenceClassification.from_pretrained(tmp_path / "model")
    assert_reloaded(found, qmodel)
    assert len(qs.quantizers(found)) == 36
    provenance = next(iter(qs.quantizers(found).values())).provenance
    assert provenance is not None
    assert provenance.rules == "mine"


def test_rules_from_python(tmp_path: Path) -> None:
    rules = qs.load_rules("qdqbert")
    for change in ({"rules": rules.rules[:1], "name": "other"}, {"specs": {**rules.specs, "weight": None}}):
        qmodel = qs.convert(build("bert", CLASSIFIER), dataclasses.replace(rules, **change))  # type: ignore[arg-type]
        qmodel.save_pretrained(tmp_path)
        assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager"), qmodel)


def test_rules_that_are_wrong() -> None:
    with pytest.raises(qs.RuleFileError, match="nothing"):
        QDQConfig("nothing")


@pytest.mark.parametrize("suffix", ["", ".yaml"])
def test_a_config_names_no_file(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"mine{suffix}"
    path.write_text(RULES)
    with pytest.raises(
        qs.RuleFileError, match=r"^the rules of the model's quantization_config are '.*', which is no"
    ) as e:
        QDQConfig.from_dict({"quant_method": QUANT_METHOD, "rules": str(path)})
    assert "write one of fuse-qkv, linear-only" in str(e.value)
    assert QDQConfig(path).rules.name == "mine"  # who writes Python may


@pytest.mark.parametrize("rules", [None, 5, [], ["qdqbert"]])
def test_rules_that_are_no_rules_are_refused(rules: Any) -> None:
    with pytest.raises(qs.RuleFileError, match="in place of the stored rules"):
        QDQConfig.from_dict({"quant_method": QUANT_METHOD, "rules": rules})


# Descriptors ---------------------------------------------------------------------------------------------------------

DESCRIPTORS = {
    "four-bits": QuantDescriptor(num_bits=4),
    "histogram": QuantDescriptor(num_bits=8, calib_method="histogram"),
    "fixed": QuantDescriptor(num_bits=8, amax=3.1),
    "unsigned-name": QuantDescriptor(num_bits=8, axis=None, name="mine", narrow_range=True),
}


@pytest.mark.parametrize(
    "descriptor",
    [
        *DESCRIPTORS.values(),
        QuantDescriptor(axis=(0,)),
        QuantDescriptor(axis=0, unsigned=True, narrow_range=True),
        QuantDescriptor(axis=(0, 1), fake_quant=False, scale_amax=0.9),
        QuantDescriptor(axis=(0,), amax=[[0.1], [0.7]]),
    ],
    ids=str,
)
def test_a_descriptor_comes_back(descriptor: QuantDescriptor) -> None:
    again = descriptor_from_data(Item(json.loads(json.dumps(descriptor_to_data(descriptor))), "input"))
    own, other = dict(vars(descriptor)), dict(vars(again))
    amax, theirs = own.pop("_amax"), other.pop("_amax")
    assert own == other
    assert (amax is None) == (theirs is None)
    assert amax is None or (amax == theirs).all()


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"num_bits": 8},
        {"axis": None, "num_bits": 8, "bits": 8},
        *({"axis": None, "num_bits": 8, **wrong} for wrong in [
            {"num_bits": "8"}, {"num_bits": 10**9}, {"num_bits": True}, {"axis": "0"}, {"axis": [0] * 99},
            {"calib_method": 7}, {"calib_method": "x"}, {"unsigned": 1}, {"name": 5}, {"amax": "1"}, {"amax": -1.0},
            {"amax": [[[[[1.0]]]]]}, {"amax": [[1.0], [1.0, 2.0]]}, {"learn_amax": True, "axis": 0}, {"axis": 1.5},
            {"scale_amax": []},
        ]),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_descriptor(data: dict[str, Any]) -> None:
    with pytest.raises(DamagedError, match=r"^input"):
        descriptor_from_data(Item(data, "input"))


@pytest.mark.usefixtures("default_descriptors")
@pytest.mark.parametrize(("name", "locked"), [*zip(DESCRIPTORS, itertools.cycle((True, False)), strict=False)])
def test_defaults_are_those_of_the_folder(name: str, locked: bool, tmp_path: Path) -> None:
    quant_nn.QuantLinear.set_default_quant_desc_input(DESCRIPTORS[name])
    qmodel = qs.convert(build("bert", CLASSIFIER))
    quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(num_bits=6, calib_method="histogram"))
    quant_nn.QuantLinear.set_default_quant_desc_weight(QuantDescriptor(num_bits=7))
    qmodel.save_pretrained(tmp_path)
    if not locked:
        change_config(tmp_path, lambda config: config["rules"]["rules"][0].update(why="as before"))
    found = BertForSequenceClassification.from_pretrained(tmp_path)
    if locked:
        assert_reloaded(found, qmodel)
    for each, other in zip(qs.quantizers(found).values(), qs.quantizers(qmodel).values(), strict=True):
        assert each.extra_repr() == other.extra_repr()
        assert type(each._calibrator) is type(other._calibrator)
    for each in (found, qmodel):
        qs.calibrate(each, [batch_for(each, (4, 8))])
    batch = batch_for(found, (2, 6))
    assert torch.equal(found(**batch).logits, qmodel(**batch).logits)


# Damage --------------------------------------------------------------------------------------------------------------

QUERY = "bert.encoder.layer.*.attention.self.query._input_quantizer"
DAMAGE: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "schema": (lambda c: c.update(schema=2), qs.ModelError, "has schema 2, and this release of qdq_surgery reads 1"),
    "unknown-key": (lambda c: c.update(extra=1), qs.ModelError, "is damaged: .*'extra'"),
    "no-sites": (lambda c: c.pop("sites"), qs.ModelError, "is damaged: .*'sites'"),
    "sites-a-list": (lambda c: c.update(sites=["a"]), qs.ModelError, "is damaged"),
    "layers-no-text": (lambda c: c["sites"].update({QUERY: [0, 1]}), qs.ModelError, "is damaged"),
    "layers-no-number": (lambda c: c["sites"].update({QUERY: "all"}), qs.ModelError, "is damaged: .*'all'"),
    "layers-without-end": (lambda c: c["sites"].update({QUERY: "0-9999999999"}), qs.ModelError, "are no layers"),
    "disabled-nobody": (
        lambda c: c.update(disabled={QUERY.replace("query", "querry"): "0"}),
        qs.ModelError,
        r"disabled has bert\.encoder\.layer\.0\.attention\.self\.querry\._input_quantizer, which is not in sites",
    ),
    "learned-in-a-layer-too-many": (lambda c: c.update(learned={QUERY: "0-2"}), qs.ModelError, "which is not in sites"),
    "versions-a-text": (lambda c: c.update(versions="1"), qs.ModelError, "is damaged"),
    "descriptors-a-list": (lambda c: c.update(descriptors=[1]), qs.ModelError, "is damaged"),
    "descriptor-none": (lambda c: c["descriptors"].update(input={}), qs.ModelError, "descriptors.input lacks"),
    "descriptor-of-no-role": (lambda c: c["descriptors"].update(output={}), qs.ModelError, "unknown key 'output'"),
    "model-a-list": (lambda c: c.update(model=[]), qs.ModelError, "model is list, wanted the name of a class"),
    "model-with-nul": (lambda c: c.update(model="Bert\0"), qs.ModelError, r"model is 'Bert\\x00'"),
    "a-name-with-a-quote": (lambda c: c["sites"].update({'x"._input_quantizer': None}), qs.ModelError, "a name in"),
    "many-layers": (
        lambda c: c.update(sites={f"a{i}._input_quantizer": "0-9999" for i in range(40)}),
        qs.ModelError,
        "400000",
    ),
    "rules": (lambda c: c["rules"].update(schema=7), qs.RuleFileError, "the stored rules have schema 7"),
    "rules-unknown": (lambda c: c.update(rules="nothing"), qs.RuleFileError, "nothing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_refused(name: str, tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    change, error, message = DAMAGE[name]
    change_config(tmp_path, change)
    with pytest.raises(error, match=message):
        AutoModel.from_pretrained(tmp_path)


def test_what_the_damaged_are_told(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    change_config(tmp_path, lambda config: [config.pop(name) for name in list(config) if name not in KEPT])
    # Ranges of its own files are taken, where the rules find the sites.
    found = BertForSequenceClassification.from_pretrained(tmp_path)
    assert_reloaded(found, calibrated())
    assert list(config_of(tmp_path)) == sorted(KEPT)


KEPT = ("quant_method", "rules")
