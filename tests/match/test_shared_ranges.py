"""Shared ranges: which quantizers get one, by the entries of a rule file."""

from __future__ import annotations

import itertools

import pytest
from architectures import BY_TYPE, build

import qdq_surgery as qs
from qdq_surgery.errors import MatchError
from qdq_surgery.match.plan import Site
from qdq_surgery.match.shared_ranges import share_ranges
from qdq_surgery.rules.pattern import parse_pattern
from qdq_surgery.rules.spec import Place, Rule, RuleSet, Scope, Share
from qdq_surgery.rules.yaml_file import load_rules

BASE = {
    model_type: min((head for head in architecture.heads() if head.endswith("Model")), key=len)
    for model_type, architecture in BY_TYPE.items()
}


def site(owner: str, name: str, *, rule: str = "product", capture: str = "q", layer: int | None = 0) -> Site:
    """A quantizer in ``owner``: of a linear if it has a linear's name, of an edited forward otherwise."""
    routine = "module" if name in ("input_quantizer", "weight_quantizer") else "forward"
    return Site(
        quantizer=f"{owner}.{name}",
        owner=owner,
        routine=routine,
        origin=(),
        position=0,
        role="weight" if name == "weight_quantizer" else "input",
        operator="matmul",
        capture=capture,
        rule=rule,
        spec=None,
        layer=layer,
        source="",
    )


def attention(layer: int) -> list[Site]:
    """Three linears and a product in the block of one layer."""
    block = f"layer.{layer}.self"
    linears = [
        site(f"{block}.{linear}", f"{role}_quantizer", rule="linear", capture=capture, layer=layer)
        for linear in ("query", "key", "value")
        for role, capture in (("input", "x"), ("weight", "w"))
    ]
    return [*linears, *(site(block, f"{name}_quantizer", capture=name, layer=layer) for name in ("q", "k", "v"))]


SITES = [*attention(0), *attention(1), site("pooler.dense", "weight_quantizer", rule="linear", capture="w", layer=None)]


def rules(*share: Share) -> RuleSet:
    made = (
        Rule("linear", "w", parse_pattern("linear(x, w)"), {"x": Place("default"), "w": Place("default")}),
        Rule("product", "w", parse_pattern("where(q, k, v)"), {name: Place("default") for name in "qkv"}),
    )
    return RuleSet("mine", "", {}, made, share=share)


def groups(*share: Share) -> set[frozenset[str]]:
    found = share_ranges(rules(*share), SITES)
    assert all(list(group) == sorted(set(group)) for group in found)
    # No quantizer has two ranges.
    assert len(list(itertools.chain(*found))) == len(set(itertools.chain(*found)))
    return {frozenset(group) for group in found}


def block(layer: int, *names: str) -> frozenset[str]:
    return frozenset(f"layer.{layer}.self.{name}" for name in names)


WEIGHTS = ("query.weight_quantizer", "key.weight_quantizer", "value.weight_quantizer")
INPUTS = ("query.input_quantizer", "key.input_quantizer", "value.input_quantizer")
PRODUCT = ("q_quantizer", "k_quantizer", "v_quantizer")

GROUPS: dict[str, tuple[Share, set[frozenset[str]]]] = {
    "sites": (Share("w", sites=("q_*", "k_*")), {block(i, "q_quantizer", "k_quantizer") for i in (0, 1)}),
    "captures": (Share("w", captures=("q", "v")), {block(i, "q_quantizer", "v_quantizer") for i in (0, 1)}),
    # The pooler's weight is alone in its block.
    "weights-of-linears": (Share("w", captures=("w",)), {block(i, *WEIGHTS) for i in (0, 1)}),
    "rule": (Share("w", rules=("prod*",)), {block(i, *PRODUCT) for i in (0, 1)}),
    "one-layer": (Share("w", Scope(layers=(1,)), rules=("product",)), {block(1, *PRODUCT)}),
    "all-layers": (Share("w", Scope(layers="all"), captures=("x",)), {block(i, *INPUTS) for i in (0, 1)}),
    # The scope is about the module that has the quantizer: for a linear's, the linear.
    "modules": (
        Share("w", Scope(("*.query", "*.key")), captures=("w",)),
        {block(i, *WEIGHTS[:2]) for i in (0, 1)},
    ),
    "linears-and-their-block": (
        Share("w", sites=("weight_*", "q_*")),
        {block(i, *WEIGHTS, "q_quantizer") for i in (0, 1)},
    ),
    "everything-in-a-block": (Share("w", Scope(layers=(0,))), {block(0, *WEIGHTS, *INPUTS, *PRODUCT)}),
}


@pytest.mark.parametrize(("share", "wanted"), GROUPS.values(), ids=GROUPS.keys())
def test_one_group_in_each_block(share: Share, wanted: set[frozenset[str]]) -> None:
    assert groups(share) == wanted


def test_nothing_is_shared_without_entries() -> None:
    assert share_ranges(rules(), SITES) == ()


def test_groups_that_have_nothing_in_common_stay_apart() -> None:
    found = groups(Share("w", Scope(layers=(0,)), captures=("w",)), Share("w", Scope(layers=(0,)), rules=("product",)))
    assert found == {block(0, *WEIGHTS), block(0, *PRODUCT)}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
def test_overlapping_groups_become_one_whatever_their_order(order: tuple[int, ...]) -> None:
    # q-k and v-w only meet by k-v: an entry may join groups that were apart before it.
    scope = Scope(layers=(0,))
    entries = [
        Share("w", scope, captures=("q", "k")),
        Share("w", scope, captures=("v", "w")),
        Share("w", scope, captures=("k", "v")),
    ]
    assert groups(*(entries[index] for index in order)) == {block(0, *PRODUCT, *WEIGHTS)}


def test_an_entry_that_stands_twice_changes_nothing() -> None:
    share = Share("w", captures=("w",))
    assert groups(share, share) == groups(share)


ALONE: dict[str, Share] = {
    "no-such-site": Share("one GEMM", sites=("z_*",), source="mine.yaml:7"),
    "no-such-layer": Share("one GEMM", Scope(layers=(7,)), source="mine.yaml:7"),
    # One quantizer in each block is nothing to share.
    "one-in-each-block": Share("one GEMM", captures=("q",), source="mine.yaml:7"),
    "outside-the-layers": Share("one GEMM", Scope(("pooler.*",)), source="mine.yaml:7"),
}


@pytest.mark.parametrize("share", ALONE.values(), ids=ALONE.keys())
def test_nothing_to_share_is_an_error_unless_optional(share: Share) -> None:
    message = (
        r"^mine.yaml:7: a share entry finds no two quantizers in one block \(one GEMM\); correct its sites, rules or "
        r"scope, or mark it optional: true$"
    )
    with pytest.raises(MatchError, match=message):
        share_ranges(rules(share), SITES)
    with pytest.raises(MatchError, match=message):  # what another entry finds does not help
        share_ranges(rules(Share("w", captures=("w",)), share), SITES)
    optional = Share(**{**vars(share), "optional": True})
    assert share_ranges(rules(optional), SITES) == ()
    assert groups(optional, Share("w", rules=("product",))) == {block(i, *PRODUCT) for i in (0, 1)}


def test_an_entry_built_in_python_names_no_place() -> None:
    with pytest.raises(MatchError, match=r"^a share entry finds no two quantizers"):
        share_ranges(rules(Share("w", sites=("z_*",))), SITES)


def test_a_share_entry_that_fits_nothing_in_a_model_is_refused() -> None:
    model = build("bert", BASE["bert"])
    base = load_rules("qdqbert")
    bad = RuleSet("mine", "", base.specs, base.rules, share=(Share("typo", sites=("matmul_z_*",)),))
    with pytest.raises(MatchError, match=r"a share entry finds no two quantizers in one block \(typo\)"):
        qs.plan(model, bad)


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_fuse_qkv_fits_every_architecture(model_type: str) -> None:
    plan = qs.plan(build(model_type, BASE[model_type]), "fuse-qkv")
    sites = {site.quantizer: site for site in plan.sites}
    by_rule: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
    for group in plan.shared:
        roles = {sites[name].role for name in group}
        assert len(roles) == 1
        assert len({sites[name].layer for name in group}) == 1
        by_rule[roles == {"weight"}].append(group)
        # What shares a range is quantized in one way.
        assert len({(sites[name].spec is None, sites[name].spec) for name in group}) == 1
    outputs, weights = by_rule[False], by_rule[True]
    # Queries, keys and values of each layer; DeBERTa's positions have keys and queries, but products of their own.
    assert len(outputs) == plan.layers
    for group in outputs:
        assert sorted(sites[name].name for name in group) == [
            "matmul_k_input_quantizer",
            "matmul_q_input_quantizer",
            "matmul_v_input_quantizer",
        ]
    # ModernBERT's projection is fused already: one weight, so nothing to share.
    assert len(weights) == (0 if model_type == "modernbert" else plan.layers)
    for group in weights:
        assert sorted(sites[name].capture for name in group) == ["wk", "wq", "wv"]
        assert all(str(sites[name].spec) == "int8 per-tensor max" for name in group)
        assert len({name.rsplit(".", 2)[0] for name in group}) == 1
    assert plan.to_json()["shared"] == [list(group) for group in plan.shared]
