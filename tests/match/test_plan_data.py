"""Plans as plain data: what comes back is the plan, and a deep model's is no longer than a shallow one's."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from architectures import BY_TYPE, build, kind_of
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.match.plan import Plan
from qdq_surgery.match.plan_data import known_from_data, known_to_data, plan_from_data, plan_to_data
from qdq_surgery.rules.yaml_file import shipped_rules
from qdq_surgery.safety.untrusted import DamagedError, Item
from qdq_surgery.surgery.model_state import plan_of, quantized_forwards


@functools.cache
def converted(model_type: str, rules: str, **options: Any) -> PreTrainedModel:
    """One for all tests, which only read its plan."""
    head = next(name for name in BY_TYPE[model_type].heads() if kind_of(name) == "sequence")
    return qs.convert(build(model_type, head, **options), rules, inplace=True)


def order(model: PreTrainedModel) -> Any:
    return {name: index for index, (name, _) in enumerate(model.named_modules())}.__getitem__


def known_of(qmodel: PreTrainedModel) -> dict[tuple[str, str], Any]:
    return {
        (name, kind): rewritten.known
        for name, module in qmodel.named_modules()
        for kind, rewritten in quantized_forwards(module).items()
    }


def text(plan: Plan, known: dict[tuple[str, str], Any]) -> str:
    layers = {site.owner: site.layer for site in plan.sites}
    return json.dumps([plan_to_data(plan), known_to_data(known, layers)], sort_keys=True, separators=(",", ":"))


@functools.cache
def fits(model_type: str, rules: str) -> bool:
    try:
        converted(model_type, rules)
    except qs.MatchError:
        return False
    return True


@pytest.mark.slow
def test_most_rules_fit_most_architectures() -> None:
    assert all(fits(model_type, "qdqbert") for model_type in BY_TYPE)
    assert sum(fits("bert", rules) for rules in shipped_rules()) >= 8


#: Each architecture by the reference's rules, and by others in turn.
CASES = [
    *((model_type, "qdqbert") for model_type in BY_TYPE),
    *zip(BY_TYPE, itertools.cycle(["linear-only", "fuse-qkv", "onnxruntime", "tensorrt"])),
    *(("bert", rules) for rules in ("fuse-qkv", "onnxruntime", "tensorrt")),
]


@pytest.mark.parametrize(("model_type", "rules"), CASES)
def test_a_plan_comes_back(model_type: str, rules: str) -> None:
    if not fits(model_type, rules):
        return
    qmodel = converted(model_type, rules)
    plan, known = plan_of(qmodel), known_of(qmodel)
    assert bool(known) == (rules != "linear-only")
    data, places = json.loads(text(plan, known))
    assert plan_from_data(Item(data, "plan"), plan.rules, order(qmodel)) == plan
    assert known_from_data(Item(places, "known")) == known


@pytest.mark.parametrize("rules", shipped_rules())
def test_every_rule_set(rules: str) -> None:
    plan = plan_of(converted("bert", rules))
    data = Item(json.loads(json.dumps(plan_to_data(plan))), "plan")
    again = plan_from_data(data, plan.rules, order(converted("bert", rules)))
    assert again == plan
    assert [site.quantizer for site in again.sites] == [site.quantizer for site in plan.sites]
    assert bool(plan.shared) == (rules == "fuse-qkv" or bool(plan.rules.share))


def test_a_refusal_of_several_places_comes_back() -> None:
    qmodel = converted("bert", "qdqbert")
    plan = plan_of(qmodel)
    first, *others = plan.refusals
    plan = dataclasses.replace(plan, refusals=(dataclasses.replace(first, count=3), *others))
    data = json.loads(json.dumps(plan_to_data(plan)))
    assert plan_from_data(Item(data, "plan"), plan.rules, order(qmodel)) == plan


@pytest.mark.parametrize("model_type", ["bert", "modernbert"])
def test_a_deep_model_is_no_longer(model_type: str) -> None:
    lengths = []
    for layers in (4, 10):
        qmodel = converted(model_type, "qdqbert", num_hidden_layers=layers)
        lengths.append(len(text(plan_of(qmodel), known_of(qmodel))))
    # Refusals stand one by one; ModernBERT's local and global layers alternate, which no run can say.
    plans = [plan_of(converted(model_type, "qdqbert", num_hidden_layers=layers)) for layers in (4, 10)]
    refused = [len(json.dumps(plan_to_data(plan)["refusals"])) for plan in plans]
    kinds = [len(plan_to_data(plan)["sites"]) for plan in plans]
    assert kinds[0] == kinds[1]
    assert lengths[1] - lengths[0] <= refused[1] - refused[0] + (800 if model_type == "modernbert" else 80)


@pytest.mark.parametrize("damage", ["sites", "coverage", "layers", "matches", "refusals"])
def test_what_lacks_a_part_is_no_plan(damage: str) -> None:
    plan = plan_of(converted("bert", "qdqbert"))
    data = json.loads(json.dumps(plan_to_data(plan)))
    del data[damage]
    with pytest.raises(DamagedError, match=damage):
        plan_from_data(Item(data, "plan"), plan.rules, lambda _: 0)


def test_other_rules_make_no_plan_of_it() -> None:
    plan = plan_of(converted("bert", "qdqbert"))
    with pytest.raises(DamagedError, match="which is not in the rules"):
        plan_from_data(
            Item(json.loads(json.dumps(plan_to_data(plan))), "plan"),
            plan_of(converted("bert", "linear-only")).rules,
            lambda _: 0,
        )


def site(data: Any, capture: str) -> Any:
    return next(entry for entry in data["sites"] if entry[7] == capture)


FORGED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "code-for-a-name": (
        lambda d: site(d, "q").__setitem__(1, 'bert.encoder.layer.*.attention.self.x"),print("x'),
        "the path of a quantizer",
    ),
    "another-name": (
        lambda d: site(d, "q").__setitem__(1, "bert.encoder.layer.*.attention.self.other_quantizer"),
        "the name that the rule 'attention-scores' gives",
    ),
    "the-name-of-a-child": (
        lambda d: site(d, "local").__setitem__(1, "bert.encoder.layer.*.output.LayerNorm"),
        "the path of a quantizer",
    ),
    "a-module-that-is-not-there": (
        lambda d: site(d, "q").__setitem__(1, "bert.decoder.layer.*.matmul_q_input_quantizer"),
        "which the model has not",
    ),
    "operands-exchanged": (
        lambda d: (site(d, "q").__setitem__(4, 1), site(d, "k").__setitem__(4, 0)),
        "is on the operand of another capture",
    ),
    "two-on-one-operand": (lambda d: site(d, "k").__setitem__(4, 0), "twice, or another on the same operand"),
    "a-third-operand": (lambda d: site(d, "k").__setitem__(4, 2), "a whole number from 0 to 1"),
    "an-operand-with-a-quote": (lambda d: site(d, "k").__setitem__(4, 'x"'), "the name of an argument"),
    "a-role-that-is-none": (lambda d: site(d, "q").__setitem__(5, "output"), "one of input, weight"),
    "weight-and-input-exchanged": (lambda d: site(d, "w").__setitem__(5, "input"), "the name that the rule"),
    "an-operator-that-is-none": (lambda d: site(d, "q").__setitem__(6, "exec"), "wanted one of"),
    "a-capture-that-is-none": (lambda d: site(d, "q").__setitem__(7, "z"), "not in the rules"),
    "a-rule-that-is-none": (lambda d: site(d, "q").__setitem__(8, []), "not in the rules"),
    "an-origin-that-is-a-mapping": (lambda d: site(d, "q").__setitem__(3, {"a": 1}), "a list"),
    "an-origin-too-deep": (lambda d: site(d, "q").__setitem__(3, [[[[[["a"]]]]]]), "nested less"),
    "a-hundred-thousand-layers": (lambda d: site(d, "q").__setitem__(0, "0-99999"), "layers such as 0-11"),
    "a-count-that-is-none": (lambda d: d["coverage"].update(linear=[1, 2, "3"]), "a whole number"),
    "a-refusal-that-is-none": (lambda d: d["refusals"].append([1]), "a list of 7 entries"),
    "matches-of-other-rules": (lambda d: d["matches"].update(x=1), "unknown key"),
    "an-unknown-key": (lambda d: d.update(code="x"), "unknown key"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_is_forged_is_no_plan(name: str) -> None:
    qmodel = converted("bert", "qdqbert")
    plan = plan_of(qmodel)
    data = json.loads(json.dumps(plan_to_data(plan)))
    change, reason = FORGED[name]
    change(data)
    with pytest.raises(DamagedError, match=re.escape(reason)):
        plan_from_data(Item(data, "plan"), plan.rules, order(qmodel))


def test_the_switch_of_attention_follows_from_the_sites() -> None:
    """And so do shared ranges: neither is stored, so neither can be forged."""
    data = plan_to_data(plan_of(converted("bert", "fuse-qkv")))
    assert not {"attention", "shared"} & data.keys()
