"""Tuning: what it says is what a model converted by its rules does, and it never ends above where it began."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BASE, BY_TYPE, batch_for, build
from outlier_model import spoiled
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.tuning.measure import Measure

Batches = list[dict[str, Any]]


def batches_of(model: PreTrainedModel) -> Batches:
    return [batch_for(model, (4, 9)), batch_for(model, (3, 7))]


def error_of(
    model: PreTrainedModel, rules: str | RuleSet, data: Batches, on: Batches | None = None, metric: Any = None
) -> float:
    """Brute force: convert, calibrate, measure."""
    qmodel = qs.convert(model, rules).eval()
    qs.calibrate(qmodel, data)
    return Measure(qmodel, data if on is None else on, metric).error()


@pytest.mark.parametrize("target", ["openvino", "qdqbert", "fuse-qkv", "linear-only", "tensorrt"])
def test_the_figures_are_those_of_its_rules(target: str, tmp_path: Path) -> None:
    model = spoiled()
    before = copy.deepcopy(model.state_dict())
    data, others = batches_of(model), [batch_for(model, (5, 8))]
    made = qs.tune(model, data, target, held_out=others)
    assert made.error == error_of(model, made.rules, data) < made.start == error_of(model, target, data)
    assert made.held_out == (error_of(model, target, data, others), error_of(model, made.rules, data, others))
    assert made.steps[0].before == made.start
    assert made.steps[-1].after == made.error
    assert [step.before for step in made.steps[1:]] == [step.after for step in made.steps[:-1]]
    assert made.met
    assert made.in_float == 0
    made.save(tmp_path / "own.yaml")
    assert error_of(model, qs.load_rules(tmp_path / "own.yaml"), data) == made.error
    assert made.rules.extends == target
    assert f"extends: {target}\n" in made.rules.text
    # Nothing is seen of it on the model.
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(each, qs.TensorQuantizer) for each in model.modules())


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_every_architecture(model_type: str) -> None:
    model = build(model_type, BASE[model_type], num_hidden_layers=1) if model_type == "bert" else None
    model = build(model_type, BASE[model_type]) if model is None else model
    data = batches_of(model)
    rules = "qdqbert-scaled"
    made = qs.tune(model, data, rules)
    assert made.error == error_of(model, made.rules, data) <= made.start


def test_every_entry_has_its_reason_with_figures() -> None:
    model = spoiled()
    base = qs.load_rules("openvino")
    made = qs.tune(model, batches_of(model), base)
    known = {rule.name: rule for rule in base.rules}
    changed = [rule for rule in made.rules.rules if rule.why != known[rule.name].why]
    assert changed
    for rule in changed:
        assert rule.why.startswith(known[rule.name].why)
        assert " -> " in rule.why
        assert rule.pattern == known[rule.name].pattern
    assert f"{made.start:.4g} before, {made.error:.4g} after" in made.rules.why


def test_rules_of_a_users_own_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "schema: 1\nname: own\nspecs: {s: {calibrator: max}}\nrules:\n"
        '  - {name: all, why: w, match: {layers: all, pattern: "linear(x, w)"}, quantize: {x: s, w: default}}\n'
    )
    model = spoiled()
    made = qs.tune(model, batches_of(model), path, name="mine")
    assert made.rules.extends is None
    assert made.rules.name == "mine"
    assert error_of(model, made.rules, batches_of(model)) == made.error


def test_a_budget_leaves_as_little_as_it_takes_in_float() -> None:
    model = spoiled()
    data = batches_of(model)
    free = qs.tune(model, data, "qdqbert")
    budget = 0.8 * free.error
    made = qs.tune(model, data, "qdqbert", budget, float_share=0.5)
    assert made.met
    assert made.error == error_of(model, made.rules, data) <= budget
    assert 0 <= made.in_float <= 0.5
    left = [step for step in made.steps if step.change.startswith("left in float")]
    assert left
    # One fewer would not have done.
    assert left[-1].before > budget
    # Adds, which have no multiply-adds, come first.
    kinds = [step.what.rpartition("(")[2] for step in left]
    assert kinds == sorted(kinds, key=lambda kind: kind != "add)")
    excluded = made.rules.exclude[len(qs.load_rules("qdqbert").exclude) :]
    assert len(excluded) == len(left)
    assert all("-> " in each.why and "% of the multiply-adds" in each.why for each in excluded)


def test_a_budget_that_is_met_by_specs_leaves_nothing_in_float() -> None:
    model = spoiled()
    data = batches_of(model)
    free = qs.tune(model, data, "qdqbert")
    made = qs.tune(model, data, "qdqbert", free.error)
    assert made.met
    assert made.steps == free.steps


def test_a_budget_that_cannot_be_met_is_said_with_the_best() -> None:
    model = spoiled()
    data = batches_of(model)
    made = qs.tune(model, data, "qdqbert", 1e-12, float_share=0.2)
    assert not made.met
    assert made.in_float <= 0.2
    assert made.error == error_of(model, made.rules, data) < made.start
    assert "the budget of 1e-12 is not met: this is the best that was found" in str(made)
    assert made.to_json()["met"] is False


def test_without_a_limit_everything_can_stay_in_float() -> None:
    model = spoiled()
    made = qs.tune(model, batches_of(model), "linear-only", 0.0, float_share=1.0)
    assert made.met
    assert made.error == 0.0
    assert made.in_float == 1.0


def test_the_work_is_counted_in_multiply_adds() -> None:
    from qdq_surgery.tuning.trial import Trial

    model = spoiled()
    batch = batch_for(model, (4, 9), mask=False)
    found = Trial(qs.convert(model), [batch]).operators()
    rows, tokens, width, heads, wide = 4, 9, 32, 4, 48
    of_linears = {
        each.owner.rpartition("layer.0.")[2]: each.work
        for each in found
        if ".layer.0." in each.owner and each.operator == "linear"
    }
    assert of_linears == {
        **{f"attention.self.{name}": rows * tokens * width * width for name in ("query", "key", "value")},
        "attention.output.dense": rows * tokens * width * width,
        "intermediate.dense": rows * tokens * width * wide,
        "output.dense": rows * tokens * wide * width,
    }
    products = [each.work for each in found if each.operator == "matmul"]
    assert products == [rows * heads * tokens * tokens * (width // heads)] * len(products)
    assert {each.work for each in found if each.operator == "add"} == {0}


def test_a_users_metric() -> None:
    model = build("bert", "BertForSequenceClassification")
    data = batches_of(model)

    def score(outputs: Any, inputs: Mapping[str, Any]) -> float:
        return -float(outputs.logits.square().mean()) * len(inputs["input_ids"])

    made = qs.tune(model, data, "qdqbert", metric=score)
    assert made.float_score is not None
    assert made.error == error_of(model, made.rules, data, metric=score) <= made.start


@pytest.mark.parametrize(
    ("options", "kind", "found"),
    [
        ({"budget": -1.0}, qs.OptionError, "budget=-1.0 is no error"),
        ({"budget": float("nan")}, qs.OptionError, "budget=nan is no error"),
        ({"float_share": 1.5}, qs.OptionError, "float_share=1.5 is no share"),
        ({"metric": "loss"}, qs.OptionError, "the metric 'loss' is none"),
        ({"target": "nowhere"}, qs.RuleFileError, "'nowhere' is neither a shipped rule set nor a file"),
        ({"batches": []}, qs.CalibrationError, "there are no batches"),
        ({"held_out": []}, qs.CalibrationError, "held_out: there are no batches"),
        ({"batches": [{"input_id": torch.ones(1, 2)}]}, qs.CalibrationError, "batch 0: .*write 'input_ids'"),
    ],
)
def test_mistakes(options: dict[str, Any], kind: type[Exception], found: str) -> None:
    model = spoiled()
    given = {"batches": batches_of(model), "target": "linear-only", **options}
    with pytest.raises(kind, match=found):
        qs.tune(model, given.pop("batches"), **given)


def test_a_converted_model_is_refused() -> None:
    qmodel = qs.convert(spoiled())
    with pytest.raises(qs.AlreadyConvertedError):
        qs.tune(qmodel, batches_of(qmodel))


def test_a_file_that_is_there_needs_a_word(tmp_path: Path) -> None:
    model = spoiled()
    made = qs.tune(model, batches_of(model), "linear-only")
    path = tmp_path / "own.yaml"
    path.write_text("mine")
    with pytest.raises(qs.ExportError, match="exists"):
        made.save(path)
    assert path.read_text() == "mine"
    made.save(path, overwrite=True)
    assert path.read_text() == made.rules.text
