"""Tuning: what it says is what a model converted by its rules does, and it never ends above where it began."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BASE, batch_for, build, layers
from outlier_model import spoiled
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.numerics.range_choice import RANGE_METHODS
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.tuning import candidates
from qdq_surgery.tuning.measure import Measure
from qdq_surgery.tuning.trial import Trial

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


@functools.cache
def tuned(target: str) -> qs.Tuning:
    """By all that is tried, without a budget; what several tests look at."""
    model = spoiled(1)
    return qs.tune(model, batches_of(model), target, held_out=[batch_for(model, (5, 8))])


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind of sites has few other specs, so that the search is short."""
    monkeypatch.setattr(candidates, "_THRESHOLDS", (1.0, 2.0))
    monkeypatch.setattr(candidates, "_ALPHAS", (0.5,))
    some = {name: RANGE_METHODS[name] for name in ("max", "mse")}
    monkeypatch.setattr(candidates, "RANGE_METHODS", some)


@pytest.mark.parametrize("target", ["openvino", "fuse-qkv", "qdqbert"])
def test_the_figures_are_those_of_its_rules(target: str, tmp_path: Path) -> None:
    model, made = spoiled(1), tuned(target)
    data, others = batches_of(model), [batch_for(model, (5, 8))]
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


@pytest.mark.usefixtures("few")
def test_nothing_is_seen_of_it_on_the_model() -> None:
    model = spoiled(2)
    before = copy.deepcopy(model.state_dict())
    made = qs.tune(model, batches_of(model), "tensorrt")
    assert made.error == error_of(model, made.rules, batches_of(model)) < made.start
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(isinstance(each, qs.TensorQuantizer) for each in model.modules())


#: With other blocks than BERT: a layer that runs twice, more linears, products of positions, one linear for three.
ARCHITECTURES = ("albert", "mobilebert", "deberta-v2", "modernbert")


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_every_architecture(model_type: str) -> None:
    deep = model_type in ("albert", "modernbert")  # the second layer: the same again, a local one
    model = build(model_type, BASE[model_type], **layers(model_type, 2 if deep else 1))
    data = batches_of(model)
    made = qs.tune(model, data, "qdqbert-scaled")
    assert made.error == error_of(model, made.rules, data) <= made.start


def test_every_entry_has_its_reason_with_figures() -> None:
    base, made = qs.load_rules("openvino"), tuned("openvino")
    known = {rule.name: rule for rule in base.rules}
    changed = [rule for rule in made.rules.rules if rule.why != known[rule.name].why]
    assert changed
    for rule in changed:
        assert rule.why.startswith(known[rule.name].why)
        assert " -> " in rule.why
        assert rule.pattern == known[rule.name].pattern
    assert f"{made.start:.4g} before, {made.error:.4g} after" in made.rules.why


def rules_with(spec: str, folder: Path) -> Path:
    """A user's own rule file: all linears, their inputs by ``spec``."""
    path = folder / "own.yaml"
    path.write_text(
        f"schema: 1\nname: own\nspecs: {{s: {spec}}}\nrules:\n"
        '  - {name: all, why: w, match: {layers: all, pattern: "linear(x, w)"}, quantize: {x: s, w: default}}\n'
    )
    return path


@pytest.mark.usefixtures("few")
def test_rules_of_a_users_own_are_written_whole(tmp_path: Path) -> None:
    path = rules_with("{calibrator: max}", tmp_path)
    model = spoiled(1)
    made = qs.tune(model, batches_of(model), path, name="mine")
    assert made.rules.extends is None
    assert made.rules.name == "mine"
    assert error_of(model, made.rules, batches_of(model)) == made.error


@pytest.mark.parametrize("target", ["qdqbert", "fuse-qkv"])
def test_a_budget_leaves_as_little_as_it_takes_in_float(target: str) -> None:
    model = spoiled(1)
    data = batches_of(model)
    free = tuned(target)
    budget = 0.95 * free.error
    made = qs.tune(model, data, target, budget, float_share=0.5)
    assert made.met
    assert made.error == error_of(model, made.rules, data) <= budget
    assert 0 <= made.in_float <= 0.5
    left = [step for step in made.steps if step.change.startswith("left in float")]
    assert left
    # One fewer would not have done.
    assert left[-1].before > budget
    excluded = made.rules.exclude[len(qs.load_rules(target).exclude) :]
    assert len(excluded) == len(left)
    assert all("-> " in each.why and "% of the multiply-adds" in each.why for each in excluded)


@pytest.mark.usefixtures("few")
def test_adds_are_left_in_float_first() -> None:
    """They have no multiply-adds."""
    model = spoiled(1)
    data = batches_of(model)
    made = qs.tune(model, data, "qdqbert", 0.5 * tuned("qdqbert").error)
    left = [step.what.rpartition("(")[2] for step in made.steps if step.change.startswith("left in float")]
    assert left[0] == "add)"


def test_what_stays_in_float_has_no_part_in_a_shared_range() -> None:
    model = spoiled(1)
    data = batches_of(model)
    trial = Trial(qs.convert(model, "fuse-qkv").eval(), data)
    ranges = {name: each.amax.clone() for name, each in qs.quantizers(trial.qmodel).items()}
    group = [f"encoder.layer.0.attention.self.matmul_{each}_input_quantizer" for each in "qkv"]
    largest = max(group, key=lambda name: float(trial._statistics.seen[name].amax))
    rest = [name for name in group if name != largest]
    found = qs.quantizers(trial.qmodel)
    with trial.in_float([largest]):
        wanted = max(trial._statistics.seen[name].amax for name in rest)
        assert [found[name].amax for name in rest] == [wanted, wanted]
        assert wanted < ranges[largest]
    assert all(torch.equal(each.amax, ranges[name]) for name, each in found.items())


@pytest.mark.usefixtures("few")
def test_ranges_by_channel_of_an_activation_stay(tmp_path: Path) -> None:
    """No other method is for them."""
    path = rules_with("{axis: 2}", tmp_path)
    model = spoiled(1)
    made = qs.tune(model, batches_of(model), path)
    assert made.error == error_of(model, made.rules, batches_of(model)) <= made.start


def test_a_budget_that_is_met_by_specs_leaves_nothing_in_float() -> None:
    model = spoiled(1)
    free = tuned("qdqbert")
    made = qs.tune(model, batches_of(model), "qdqbert", free.error)
    assert made.met
    assert made.steps == free.steps


@pytest.mark.usefixtures("few")
def test_a_budget_that_cannot_be_met_is_said_with_the_best() -> None:
    model = spoiled(1)
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
    model = spoiled(1)
    # The third of the first text is padding, and the model runs it.
    found = Trial(qs.convert(model), [batch_for(model, (4, 9)), batch_for(model, (2, 5))]).operators()
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


@pytest.mark.usefixtures("few")
def test_a_users_metric() -> None:
    model = build("bert", "BertForSequenceClassification", num_hidden_layers=1)
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
        ({"name": "two\nlines"}, qs.RuleFileError, "the name"),
        ({"target": "nowhere"}, qs.RuleFileError, "'nowhere' is neither a shipped rule set nor a file"),
        ({"batches": []}, qs.CalibrationError, "there are no batches"),
        ({"held_out": []}, qs.CalibrationError, "held_out: there are no batches"),
        ({"batches": [{"input_id": torch.ones(1, 2)}]}, qs.CalibrationError, "batch 0: .*write 'input_ids'"),
    ],
)
def test_mistakes(options: dict[str, Any], kind: type[Exception], found: str) -> None:
    model = spoiled(1)
    given = {"batches": batches_of(model), "target": "linear-only", **options}
    with pytest.raises(kind, match=found):
        qs.tune(model, given.pop("batches"), **given)


def test_a_converted_model_is_refused() -> None:
    qmodel = qs.convert(spoiled(1))
    with pytest.raises(qs.AlreadyConvertedError):
        qs.tune(qmodel, batches_of(qmodel))


def test_a_file_that_is_there_needs_a_word(tmp_path: Path) -> None:
    made = tuned("openvino")
    path = tmp_path / "own.yaml"
    path.write_text("mine")
    with pytest.raises(qs.ExportError, match="exists"):
        made.save(path)
    with pytest.raises(qs.ExportError, match=r"a rule file ends in \.yaml; give own\.yaml"):
        made.save(tmp_path / "own.txt")
    assert path.read_text() == "mine"
    made.save(path, overwrite=True)
    assert path.read_text() == made.rules.text
