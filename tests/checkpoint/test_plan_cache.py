"""The lock: where it holds no rule is matched, and where it does not the model is the same."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from architectures import ARCHITECTURES, build, kind_of, layers
from ecosystem import CLASSIFIER, calibrated
from saved import (
    WEIGHTS,
    assert_reloaded,
    change_config,
    change_lock,
    config_of,
    count_matches,
    logits,
    metadata_of,
)
from transformers import BertForSequenceClassification, BertModel

import qdq_surgery as qs
from qdq_surgery.checkpoint import plan_cache as lock
from qdq_surgery.checkpoint.plan_cache import METADATA, fingerprint
from qdq_surgery.surgery.model_state import plan_of

#: Every architecture but those whose config and classes are RoBERTa's, with a head or without.
MODELS = [
    (architecture.model_type, next(name for name in architecture.heads() if kind_of(name) == kind))
    for architecture, kind in zip(ARCHITECTURES, itertools.cycle(("base", "sequence")))
    if architecture.model_type not in ("xlm-roberta", "camembert")
]


@pytest.mark.parametrize(("model_type", "head"), MODELS, ids=[head for _, head in MODELS])
def test_it_holds_for_every_architecture(
    model_type: str, head: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the config was made in Python, or read from a file, or read and written again."""
    cls = getattr(transformers, head)
    # One layer, but where another is not like the first.
    sizes = {} if model_type in ("bert", "albert", "modernbert") else layers(model_type, 1)
    # What is asked is the config. (Rules for linears alone are soon carried out.)
    rules = "qdqbert" if model_type in ("bert", "deberta-v2") else "linear-only"
    built = qs.convert(build(model_type, head, **sizes), rules, inplace=True)
    built.save_pretrained(tmp_path / "built")
    build(model_type, head, **sizes).save_pretrained(tmp_path / "float")
    qs.convert(cls.from_pretrained(tmp_path / "float"), rules, inplace=True).save_pretrained(tmp_path / "loaded")
    made = count_matches(monkeypatch)
    first = cls.from_pretrained(tmp_path / "built")
    first.save_pretrained(tmp_path / "again")
    for folder in ("loaded", "again"):
        assert_reloaded(cls.from_pretrained(tmp_path / folder), first)
    assert made == []
    # The converse: the counter counts.
    cls.from_pretrained(tmp_path / "float", quantization_config=qs.QDQConfig(rules))
    assert made == [head]


@pytest.mark.parametrize("options", [{"num_labels": 3, "ignore_mismatched_sizes": True}, {"dtype": torch.bfloat16}])
def test_it_holds_beside_what_makes_no_difference(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calibrated().save_pretrained(tmp_path)
    made = count_matches(monkeypatch)
    BertForSequenceClassification.from_pretrained(tmp_path, **options)
    assert made == []


def with_data(change: Callable[[Any], None]) -> Callable[[str], str]:
    def changed(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return changed


def forget_a_site(data: Any) -> None:
    del data["plan"]["coverage"]


LOCKS: dict[str, Callable[[str], str | None]] = {
    "none": lambda _: None,
    "no-json": lambda text: text[:-5],
    "a-list": lambda _: "[1, 2]",
    "a-number": lambda _: "7",
    "another-schema": with_data(lambda data: data.update(schema=99)),
    "another-fingerprint": with_data(lambda data: data.update(fits="0" * 64)),
    "no-plan": with_data(lambda data: data.pop("plan")),
    "a-plan-that-is-none": with_data(lambda data: data.update(plan=[])),
    "half-a-plan": with_data(forget_a_site),
    "coverage-that-is-none": with_data(lambda data: data["plan"].update(coverage=[1])),
    "sites-that-are-none": with_data(lambda data: data["plan"].update(sites=[["0-1"]])),
    "known-that-is-none": with_data(lambda data: data.update(known={"a": 1})),
}


@pytest.mark.parametrize(
    ("name", "signed"), [*((name, True) for name in LOCKS), *((name, False) for name in ("no-json", "no-plan"))]
)
def test_without_it_the_model_is_the_same(
    name: str, signed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    by_lock = BertForSequenceClassification.from_pretrained(tmp_path)
    change_lock(tmp_path, LOCKS[name], signed)
    made = count_matches(monkeypatch)
    found = BertForSequenceClassification.from_pretrained(tmp_path)
    assert made == [CLASSIFIER]
    assert_reloaded(found, qmodel)
    assert plan_of(found) == plan_of(by_lock)


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (lock.transformers, "__version__", "5.99.0"),
        (lock.torch, "__version__", "9.9.9"),
        (lock.sys, "version_info", (3, 99)),
    ],
    ids=["transformers", "torch", "python"],
)
def test_another_version_matches_anew(
    owner: Any, name: str, value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    qmodel = calibrated()
    text = fingerprint(qmodel, plan_of(qmodel).rules, dict(qmodel.named_modules()))
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, value)
        assert fingerprint(qmodel, plan_of(qmodel).rules, dict(qmodel.named_modules())) != text
        if owner is not sys:  # others read that one, too
            qmodel.save_pretrained(tmp_path)
    if owner is sys:
        return
    made = count_matches(monkeypatch)
    assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path), qmodel)
    assert made == [CLASSIFIER]


def test_another_class_or_config_matches_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated().save_pretrained(tmp_path)
    made = count_matches(monkeypatch)
    BertModel.from_pretrained(tmp_path)
    BertForSequenceClassification.from_pretrained(tmp_path, hidden_act="relu")
    assert made == ["BertModel", CLASSIFIER]


def test_a_fact_of_the_config_that_no_module_shows_is_part_of_it() -> None:
    qmodel = calibrated(num_hidden_layers=1)
    rules, modules = plan_of(qmodel).rules, dict(qmodel.named_modules())
    before = fingerprint(qmodel, rules, modules)
    qmodel.config.chunk_size_feed_forward = 2
    assert fingerprint(qmodel, rules, modules) != before


def test_rules_that_were_edited_are_heard(tmp_path: Path) -> None:
    """The lock was made by other rules, and does not hide that these find other sites."""
    calibrated().save_pretrained(tmp_path)
    layers = {"why": "the first stays in float", "layers": [0], "source": ""}
    change_config(tmp_path, lambda config: config["rules"].update(exclude=[layers]))
    with pytest.raises(qs.MatchError, match=r"they do not find 20 of them: bert\.encoder\.layer\.\*\.attention"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_a_lock_does_not_hide_sites_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated().save_pretrained(tmp_path)
    change_config(tmp_path, lambda config: config["sites"].popitem())
    made = count_matches(monkeypatch)
    with pytest.raises(qs.MatchError, match="they find 2 beyond them"):
        BertForSequenceClassification.from_pretrained(tmp_path)
    assert made == [CLASSIFIER]


def test_every_shard_has_it(tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path, max_shard_size=20_000)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert len({metadata_of(shard)[METADATA] for shard in shards}) == 1


def test_it_grows_by_a_few_bytes(tmp_path: Path) -> None:
    """Of a deep model as of a shallow one; the sites in config.json as well."""
    sizes = []
    for count in (2, 12):
        folder = tmp_path / str(count)
        qs.convert(build("bert", "BertModel", num_hidden_layers=count), inplace=True).save_pretrained(folder)
        sizes.append((len(metadata_of(folder / WEIGHTS)[METADATA]), len(json.dumps(config_of(folder)))))
    assert sizes[1][0] - sizes[0][0] < 100
    assert sizes[1][1] - sizes[0][1] < 100


def test_new_kinds_of_calls_are_recorded_after_loading_by_it(tmp_path: Path) -> None:
    qmodel = calibrated(is_decoder=True, add_cross_attention=False)
    qmodel.save_pretrained(tmp_path)
    found = BertForSequenceClassification.from_pretrained(tmp_path)
    for model in (found, qmodel):
        model.train()
        torch.manual_seed(0)
        ids = torch.arange(3, 9)[None]
        model(input_ids=ids, labels=torch.tensor([1])).loss.backward()
        model.eval()
    assert torch.equal(found.classifier.weight.grad, qmodel.classifier.weight.grad)
    assert torch.equal(logits(found), logits(qmodel))


def test_the_same_file_is_checked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated().save_pretrained(tmp_path)
    monkeypatch.setattr(lock, "_ACCEPTED", {})
    first = BertForSequenceClassification.from_pretrained(tmp_path)
    assert len(lock._ACCEPTED) == 1

    def fail(*_: Any) -> None:
        raise AssertionError("it was checked")

    with monkeypatch.context() as patched:
        patched.setattr(lock, "parse_json", fail)
        again = BertForSequenceClassification.from_pretrained(tmp_path)
    assert_reloaded(again, first)
    assert plan_of(again) == plan_of(first)
    assert plan_of(again).rules is not plan_of(first).rules


def test_another_text_under_a_known_digest_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibrated().save_pretrained(tmp_path)
    first = BertForSequenceClassification.from_pretrained(tmp_path)
    known = dict(lock._ACCEPTED)
    change_lock(tmp_path, lambda text: text.replace("residual", "residuum"))
    made = count_matches(monkeypatch)
    assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path), first)
    assert len(made) == 1
    assert known == lock._ACCEPTED


def test_few_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "_ACCEPTED", {})
    monkeypatch.setattr(lock, "_MOST_ACCEPTED", 2)
    for count in (1, 2, 3):
        qs.convert(build("bert", "BertModel", num_hidden_layers=count)).save_pretrained(tmp_path / str(count))
        BertModel.from_pretrained(tmp_path / str(count))
    assert len(lock._ACCEPTED) == 2
