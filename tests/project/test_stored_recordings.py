"""The tests' store of recordings: what differs in anything that a recording depends on is recorded by itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stored_recordings
import torch
from architectures import BASE, batch_for, build
from comparing import assert_same
from ecosystem import assert_equal, state
from torch import nn
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertOutput

import qdq_surgery as qs
from qdq_surgery.match import analyze
from qdq_surgery.rules.yaml_file import load_rules
from qdq_surgery.surgery.model_state import plan_of


def model_of(**options: Any) -> PreTrainedModel:
    return build("bert", "BertForSequenceClassification", num_hidden_layers=1, **options)


def fingerprint(model: Any, rules: str = "qdqbert", inputs: dict[str, Any] | None = None) -> str | None:
    return stored_recordings.fingerprint(model, load_rules(rules), inputs, [])


def sources(model: nn.Module) -> list[str]:
    """The code of all graphs that the model runs."""
    forwards = [
        forward
        for module in model.modules()
        for name in ("_qdq_forward", "_qdq_attention")
        if (forward := vars(module).get(name)) is not None
    ]
    return [variant.source for forward in forwards for variant in forward.variants.found]


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows whenever a model is really recorded; the store is empty."""
    made: list[str] = []
    really = analyze.recordings_of

    def counted(*args: Any) -> Any:
        made.append(type(args[0]).__name__)
        return really(*args)

    monkeypatch.setattr(analyze, "recordings_of", counted)
    monkeypatch.setattr(stored_recordings, "_store", type(stored_recordings._store)())
    stored_recordings.install(monkeypatch)
    return made


@pytest.mark.parametrize("rules", ["qdqbert", "fuse-qkv", "linear-only"])
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "albert", "modernbert"])
def test_what_is_stored_makes_the_same_model(model_type: str, rules: str, recorded: list[str]) -> None:
    model = build(model_type, BASE[model_type])
    first, *others = (qs.convert(copy.deepcopy(model), rules, inplace=True) for _ in range(3))
    assert recorded == [BASE[model_type]]
    assert bool(sources(first)) == (rules != "linear-only")
    for other in others:
        assert plan_of(other) == plan_of(first)
        assert sources(other) == sources(first)
        assert_equal(state(other), state(first))
        assert_same(model, other, batch_for(model, (3, 7)))
        assert_same(model.train(), other.train(), batch_for(model, (3, 7), mask=False))
        model.eval()


def test_what_one_model_does_to_its_graphs_is_no_others(recorded: list[str]) -> None:
    model = model_of()
    first = qs.convert(model)
    before = sources(qs.convert(model))
    for module in first.modules():
        for name in ("_qdq_forward", "_qdq_attention"):
            if (forward := vars(module).get(name)) is not None:
                forward.variants.found.clear()
    assert sources(first) == []
    assert sources(qs.convert(model)) == before
    assert len(recorded) == 1


def test_refused_models_are_refused_again(recorded: list[str]) -> None:
    model = model_of()
    for _ in range(2):
        with pytest.raises(qs.ModelError, match="does not run on the example inputs"):
            qs.convert(model, example_inputs={"input_ids": "no tensor"})
    assert recorded == []
    assert not stored_recordings._store


def other_dtype(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


def other_config(model: PreTrainedModel) -> None:
    model.config.chunk_size_feed_forward = 2


def other_module(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = nn.ReLU()


def other_number(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[0].output.LayerNorm.eps = 0.5


def other_gradients(model: PreTrainedModel) -> None:
    model.classifier.weight.requires_grad_(False)


def other_buffer(model: PreTrainedModel) -> None:
    model.bert.embeddings.token_type_ids += 1  # type: ignore[operator]


def other_ties(model: PreTrainedModel) -> None:
    layer = model.bert.encoder.layer[0]
    layer.output.dropout = layer.attention.output.dropout  # which has no parameters


def other_class(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[0].output.__class__ = type(
        "BertOutput", (BertOutput,), {"__module__": BertOutput.__module__}
    )


def other_function(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[0].feed_forward_chunk_more = other_function  # type: ignore[assignment]


def test_what_no_graph_holds_does_not_matter() -> None:
    model = model_of()
    assert fingerprint(model_of(seed=1)) == fingerprint(model)
    assert fingerprint(model.train()) == fingerprint(model_of())
    model.set_attn_implementation("sdpa")
    assert fingerprint(model) == fingerprint(model_of())


def test_where_it_was_loaded_from_does_not_matter(tmp_path: Path) -> None:
    model = model_of()
    loaded = [type(model).from_pretrained(model.save_pretrained(tmp_path / name) or tmp_path / name) for name in "ab"]
    assert loaded[0].name_or_path != loaded[1].name_or_path
    assert fingerprint(loaded[0]) == fingerprint(loaded[1])


CHANGES = [
    other_dtype,
    other_config,
    other_module,
    other_number,
    other_gradients,
    other_buffer,
    other_ties,
    other_class,
    other_function,
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_told(change: Callable[[PreTrainedModel], None]) -> None:
    model = model_of()
    before = fingerprint(model)
    assert before is not None
    assert fingerprint(model_of()) == before
    change(model)
    assert fingerprint(model) not in (None, before)


def hooked(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[0].register_forward_hook(lambda *_: None)


def own_forward(model: PreTrainedModel) -> None:
    model.dropout.forward = model.dropout.forward  # type: ignore[method-assign]


def own_object(model: PreTrainedModel) -> None:
    model.bert.something = object()  # type: ignore[assignment]


@pytest.mark.parametrize("change", [hooked, own_forward, own_object])
def test_what_cannot_be_compared_is_not_kept(change: Callable[[PreTrainedModel], None], recorded: list[str]) -> None:
    model = model_of()
    change(model)
    assert fingerprint(model) is None
    for _ in range(2):
        qs.plan(model)
    assert len(recorded) == 2
    assert not stored_recordings._store


def test_other_rules_and_inputs_are_told() -> None:
    model = model_of()
    long, short = batch_for(model, (2, 9)), batch_for(model, (2, 5))
    calls = [("qdqbert", None), ("fuse-qkv", None), ("qdqbert", long), ("qdqbert", short)]
    calls += [("qdqbert", {"input_ids": long["input_ids"]}), ("qdqbert", {**long, "use_cache": False})]
    keys = [fingerprint(model, rules, inputs) for rules, inputs in (*calls, *calls)]
    assert None not in keys
    assert len(set(keys)) == len(calls)


def test_few_are_kept(recorded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_recordings, "_SIZE", 2)
    models = [model_of(vocab_size=size) for size in (60, 61, 62)]
    for index in (0, 1, 0, 2, 0, 1):  # the second is the one that was not asked for when the third came
        qs.plan(models[index])
    assert len(recorded) == 4
    assert len(stored_recordings._store) == 2
