"""Plans as plain data: what comes back is the plan, and a deep model's is no longer than a shallow one's."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
from architectures import BY_TYPE, build, kind_of
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.converted import plan_of
from qdq_surgery.plan import Plan
from qdq_surgery.plan_data import known_from_data, known_to_data, plan_from_data, plan_to_data
from qdq_surgery.rewritten import Rewritten
from qdq_surgery.rule_file import shipped_rules

pytestmark = pytest.mark.usefixtures("one_thread")


def converted(model_type: str, rules: str, **options: Any) -> PreTrainedModel:
    head = next(name for name in BY_TYPE[model_type].heads() if kind_of(name) == "sequence")
    return qs.convert(build(model_type, head, **options), rules, inplace=True)


def order(model: PreTrainedModel) -> Any:
    return {name: index for index, (name, _) in enumerate(model.named_modules())}.__getitem__


def known_of(qmodel: PreTrainedModel) -> dict[tuple[str, str], Any]:
    return {
        (name, kind): rewritten.known
        for name, module in qmodel.named_modules()
        for kind in ("forward", "attention")
        if isinstance(rewritten := vars(module).get(f"_qdq_{kind}"), Rewritten)
    }


def text(plan: Plan, known: dict[tuple[str, str], Any]) -> str:
    layers = {site.owner: site.layer for site in plan.sites}
    return json.dumps([plan_to_data(plan), known_to_data(known, layers)], sort_keys=True, separators=(",", ":"))


@functools.cache
def fits(model_type: str, rules: str) -> bool:
    try:
        qs.plan(build(model_type, next(n for n in BY_TYPE[model_type].heads() if kind_of(n) == "sequence")), rules)
    except qs.MatchError:
        return False
    return True


def test_most_rules_fit_most_architectures() -> None:
    assert all(fits(model_type, "qdqbert") for model_type in BY_TYPE)
    assert sum(fits(model_type, rules) for model_type in ("bert", "modernbert") for rules in shipped_rules()) >= 14


@pytest.mark.parametrize("model_type", BY_TYPE)
@pytest.mark.parametrize("rules", ["qdqbert", "linear-only", "fuse-qkv", "onnxruntime", "tensorrt"])
def test_a_plan_comes_back(model_type: str, rules: str) -> None:
    if not fits(model_type, rules):
        with pytest.raises(qs.MatchError):
            converted(model_type, rules)
        return
    qmodel = converted(model_type, rules)
    plan, known = plan_of(qmodel), known_of(qmodel)
    assert bool(known) == (rules != "linear-only")
    data, places = json.loads(text(plan, known))
    assert plan_from_data(data, plan.rules, order(qmodel)) == plan
    assert known_from_data(places) == known


@pytest.mark.parametrize("rules", shipped_rules())
def test_every_rule_set(rules: str) -> None:
    plan = plan_of(converted("bert", rules))
    again = plan_from_data(json.loads(json.dumps(plan_to_data(plan))), plan.rules, order(converted("bert", rules)))
    assert again == plan
    assert [site.quantizer for site in again.sites] == [site.quantizer for site in plan.sites]
    assert bool(plan.shared) == (rules == "fuse-qkv" or bool(plan.rules.share))


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "modernbert"])
def test_a_deep_model_is_no_longer(model_type: str) -> None:
    lengths = []
    for layers in (4, 24):
        qmodel = converted(model_type, "qdqbert", num_hidden_layers=layers)
        lengths.append(len(text(plan_of(qmodel), known_of(qmodel))))
    # Refusals stand one by one; ModernBERT's local and global layers alternate, which no run can say.
    plans = [plan_of(converted(model_type, "qdqbert", num_hidden_layers=layers)) for layers in (4, 24)]
    refused = [len(json.dumps(plan_to_data(plan)["refusals"])) for plan in plans]
    kinds = [len(plan_to_data(plan)["sites"]) for plan in plans]
    assert kinds[0] == kinds[1]
    assert lengths[1] - lengths[0] <= refused[1] - refused[0] + (800 if model_type == "modernbert" else 80)


@pytest.mark.parametrize("damage", ["sites", "coverage", "layers", "matches", "shared"])
def test_what_lacks_a_part_is_no_plan(damage: str) -> None:
    plan = plan_of(converted("bert", "qdqbert"))
    data = plan_to_data(plan)
    del data[damage]
    with pytest.raises(KeyError, match=damage):
        plan_from_data(data, plan.rules, lambda _: 0)


def test_other_rules_make_no_plan_of_it() -> None:
    plan = plan_of(converted("bert", "qdqbert"))
    with pytest.raises(KeyError):
        plan_from_data(plan_to_data(plan), plan_of(converted("bert", "linear-only")).rules, lambda _: 0)
