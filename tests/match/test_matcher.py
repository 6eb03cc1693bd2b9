"""Which rule wins, what is refused and why, and which counts are errors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from architectures import build
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.match.analyze import analyze
from qdq_surgery.match.matcher import match
from qdq_surgery.match.plan import Plan
from qdq_surgery.trace.units import Survey

Write = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a rule file that extends the recipe: the text is what stands below ``rules:`` or beside it."""

    def make(text: str) -> Path:
        path = tmp_path / "own.yaml"
        path.write_text(f"schema: 1\nname: own\nextends: qdqbert\n{text}")
        return path

    return make


def rule(name: str, pattern: str, quantize: str, *, match: str = "", more: str = "") -> str:
    return f'  - {{name: {name}, why: test, match: {{{match}pattern: "{pattern}"}}, quantize: {{{quantize}}}{more}}}\n'


@functools.cache
def surveyed(model_type: str, head: str) -> tuple[PreTrainedModel, Survey]:
    """A model and what is recorded of it, whatever the rules are."""
    model = build(model_type, head)
    look, _ = analyze(model, qs.load_rules("linear-only"), None)
    return model, look.first


def plan_for(model_type: str, head: str, rules: str | Path | qs.RuleSet) -> Plan:
    return match(*surveyed(model_type, head), qs.load_rules(rules))


def bert_plan(rules: str | Path | qs.RuleSet) -> Plan:
    return plan_for("bert", "BertForSequenceClassification", rules)


def names_by_rule(made: Plan, rule_name: str) -> set[str]:
    return {site.quantizer for site in made.sites if site.rule == rule_name}


# --- patterns


@pytest.mark.parametrize(
    ("model_type", "head", "pattern", "count"),
    [
        ("bert", "BertModel", "layer_norm(add(local=maybe(dropout)(linear(_)), residual))", 4),
        ("bert", "BertModel", "layer_norm(add(residual, local=dropout(linear(_))))", 4),
        ("albert", "AlbertModel", "add(local=maybe(dropout)(linear(_)), residual)", 2),
        ("distilbert", "DistilBertModel", "layer_norm(add(local=dropout(linear(_)), residual))", 2),
        ("distilbert", "DistilBertModel", "layer_norm(add(local=linear(_), residual))", 2),
        ("modernbert", "ModernBertModel", "layer_norm(add(local=linear(_), residual=embedding(_)))", 0),
        ("modernbert", "ModernBertModel", "layer_norm(add(local=linear(_), residual))", 3),
        ("mobilebert", "MobileBertModel", "add(local=linear(_), residual=bias_add(_, _))", 10),
        ("bert", "BertModel", "linear(x=activation(linear(_)), w)", 2),
        ("bert", "BertModel", "linear(x=gelu(_), w)", 2),
        ("bert", "BertModel", "linear(x=layer_norm(_), w)", 2),
        ("bert", "BertModel", "linear(x=matmul(_, _), w)", 2),
        ("bert", "BertModel", "softmax(add(mul(matmul(q, k))))", 2),
        ("deberta-v2", "DebertaV2Model", "softmax(masked_fill(add(matmul(q, k), _)))", 2),
        ("deberta-v2", "DebertaV2Model", "gather(matmul(q, k))", 4),
        ("mpnet", "MPNetModel", "softmax(maybe(add)(maybe(add)(div(matmul(q, k)))))", 2),
        ("modernbert", "ModernBertModel", "matmul(q=add(mul(_, _), mul(_, _)), k)", 3),
        ("modernbert", "ModernBertModel", "mul(gate=gelu(_), value)", 3),
    ],
)
def test_patterns_find_across_blocks(model_type: str, head: str, pattern: str, count: int, write: Write) -> None:
    captures = [c for c in ("local", "x", "q", "gate") if f"{c}=" in pattern or f"({c}," in pattern][:1]
    text = rule("own", pattern, f"{captures[0]}: activation", match="layers: all, ", more=", optional: true")
    rules = qs.load_rules(write("rules:\n" + text))
    # Before all others, so that no rule of the recipe is there to win.
    first = qs.RuleSet("first", "", rules.specs, (rules.rule("own"), rules.rule("encoder-linear")))
    assert plan_for(model_type, head, first).matches["own"] == count


def test_the_first_match_wins_per_operand(write: Write) -> None:
    path = write(
        "specs:\n  low: {num_bits: 4}\nrules:\n"
        + rule("after-gelu", "linear(x=gelu(_), w)", "x: low", match="layers: all, ")
    )
    made = bert_plan(path)
    own = names_by_rule(made, "after-gelu")
    assert own == {f"bert.encoder.layer.{layer}.output.dense._input_quantizer" for layer in range(2)}
    # The weights of the same linears are still the recipe's.
    recipe = names_by_rule(made, "encoder-linear")
    assert {name.replace("_input_", "_weight_") for name in own} <= recipe
    assert not own & recipe
    assert len(made.sites) == 40


def test_a_rule_may_quantize_heads_and_poolers(write: Write) -> None:
    made = bert_plan(
        write(
            "rules:\n"
            + rule("head", "linear(x, w)", "x: default, w: default", match="within: [classifier, '*.pooler.*'], ")
        )
    )
    assert names_by_rule(made, "head") == {
        "classifier._input_quantizer",
        "classifier._weight_quantizer",
        "bert.pooler.dense._input_quantizer",
        "bert.pooler.dense._weight_quantizer",
    }
    assert made.refusals == ()


def test_a_rule_may_quantize_embeddings(write: Write) -> None:
    text = rule(
        "sum",
        "layer_norm(add(add(word, kind), place))",
        "place: {spec: default, as: add_place_input_quantizer}",
        match="within: '*embeddings*', ",
    )
    made = bert_plan(write("rules:\n" + text))
    assert names_by_rule(made, "sum") == {"bert.embeddings.add_place_input_quantizer"}


def test_layers_and_paths_scope_a_rule(write: Write) -> None:
    text = rule("low", "linear(x, w)", "x: low, w: low", match="layers: [1], within: '*.intermediate.*', ")
    made = bert_plan(write("specs:\n  low: {num_bits: 4}\nrules:\n" + text))
    assert names_by_rule(made, "low") == {
        "bert.encoder.layer.1.intermediate.dense._input_quantizer",
        "bert.encoder.layer.1.intermediate.dense._weight_quantizer",
    }
    assert {site.spec.num_bits for site in made.sites if site.rule == "low" and site.spec} == {4}


def test_second_places_in_one_block_are_numbered() -> None:
    made = qs.plan(build("distilbert", "DistilBertModel"))
    names = {site.name for site in made.sites if site.rule == "residual-add"}
    assert names == {
        "add_local_input_quantizer",
        "add_residual_input_quantizer",
        "add_local_2_input_quantizer",
        "add_residual_2_input_quantizer",
    }
    relative = {site.name for site in qs.plan(build("deberta-v2", "DebertaV2Model")).sites if "relative" in site.rule}
    assert all(name.endswith("_input_quantizer") for name in relative)
    assert len(relative) == 4


def test_unnamed_places_get_names_of_their_own(write: Write) -> None:
    made = bert_plan(
        write("rules:\n" + rule("gate", "gelu(x)", "x: activation", match="layers: all, ", more=", optional: true"))
    )
    # An activation module is no block and no linear: nothing can go in front of it, and that is said.
    [reason] = {r.reason for r in made.refusals if r.rule == "gate"}
    assert reason == "only linears and embeddings are swapped, and this is a gelu"


# --- exclusions and refusals


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ("{layers: 0, why: w}", 20),
        ("{layers: [0, 1], sites: 'add_*', why: w}", 8),
        ("{within: '*.attention.*', why: w}", 28),
        ("{sites: [_weight_quantizer], why: w}", 12),
        ("{rules: residual-add, why: w}", 8),
        ("{rules: 'attention-*', layers: 1, why: w}", 4),
    ],
)
def test_exclusions(exclude: str, left: int, write: Write) -> None:
    made = bert_plan(write(f"exclude:\n  - {exclude}\n"))
    assert len(made.sites) == 40 - left
    excluded = [r for r in made.refusals if r.reason.startswith("left in float by own.yaml:5")]
    assert sum(r.count for r in excluded) == left
    # Counts are about matches, so that a layer left out breaks no expectation.
    assert made.matches["encoder-linear"] == 12


def test_refusals_say_which_rule_was_near() -> None:
    rules = qs.load_rules("qdqbert")
    kept = tuple(r for r in rules.rules if r.name not in ("encoder-linear", "attention-context"))
    made = bert_plan(qs.RuleSet("some", "", rules.specs, kept))  # type: ignore[arg-type]
    reasons = {refusal.operator: refusal.reason for refusal in made.refusals if refusal.layer == 0}
    assert reasons["linear"] == "no rule is about a linear here"
    assert (
        reasons["matmul"]
        == "rule 'attention-scores': operand 'k' of matmul comes from 'linear', not maybe(div, mul)(transpose(_))"
    )
    assert made.coverage["matmul"].refused == 2


def test_a_residual_add_that_is_not_like_the_recipe_is_listed(write: Write) -> None:
    text = rule(
        "residual-add",
        "add(local=gelu(_), residual)",
        "local: activation",
        match="layers: all, ",
        more=", optional: true",
    )
    other = rule(
        "other-residual-add",
        "residual_add(relu(_), b)",
        "b: activation",
        match="layers: all, ",
        more=", optional: true",
    )
    made = bert_plan(write("rules:\n" + text + other))
    found = [refusal for refusal in made.refusals if refusal.operator == "residual add"]
    assert len(found) == 4
    assert {r.reason for r in found} == {
        "rule 'residual-add': operand 'local' of add comes from 'dropout', not gelu(_)"
    }
    assert {r.source.split(":")[0] for r in found} == {"modeling_bert.py"}


def test_what_the_example_does_not_reach_is_said() -> None:
    model = build("bert", "BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    ids = {"input_ids": torch.ones(2, 5, dtype=torch.long), "use_cache": False}
    made = qs.plan(model, example_inputs=ids)
    unreached = {r.path for r in made.refusals if "the example inputs never reach it" in r.reason}
    assert unreached == {
        f"bert.encoder.layer.{layer}.crossattention.{linear}"
        for layer in range(2)
        for linear in ("self.query", "self.key", "self.value", "output.dense")
    }
    assert made.coverage["linear"].refused == 8
    # The examples that are made for it do reach it.
    assert qs.plan(model).coverage["linear"].refused == 0


# --- errors


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rules:\n" + rule("typo", "linear(x, w)", "x: activation", match="within: '*.atention.*', "),
            r"own\.yaml:5: rule 'typo' matches nothing in BertForSequenceClassification .pattern linear.x, w.; "
            r"within \*\.atention\.\*.*mark it optional: true",
        ),
        (
            "rules:\n" + rule("deep", "layer_norm(matmul(a, b))", "a: activation"),
            r"rule 'deep' matches nothing .*nearest: rule 'deep': an operand of layer_norm comes from 'add', "
            r"not matmul.a, b. at bert\.embeddings\.LayerNorm .modeling_bert.py:\d+.",
        ),
        (
            "rules:\n"
            + rule("count", "linear(x, w)", "x: activation", match="layers: all, ", more=", expect: {per_layer: 5}"),
            r"own\.yaml:5: rule 'count' expects 5 matches per layer, found 6 in layer 0 of Bert",
        ),
        (
            "rules:\n"
            + rule("total", "linear(x, w)", "x: activation", match="layers: 1, ", more=", expect: {total: 12}"),
            r"rule 'total' expects 12 matches in all, found 6",
        ),
        (
            "rules:\n"
            + rule("type", "linear(x, w)", "x: activation", more=", expect: {per_layer: 6, model_types: {bert: 7}}"),
            r"rule 'type' expects 7 matches per layer, found 6",
        ),
        (
            "exclude:\n  - {sites: 'ad_*', why: typo}\n",
            r"own\.yaml:5: an exclude entry excludes nothing .typo.; sites are called for example _input_q",
        ),
        (
            "rules:\n" + rule("brt", "linear(x, w)", "x: activation", more=", expect: {model_types: {brt: 7}}"),
            r"own\.yaml:5: rule 'brt' expects something of the model type 'brt', .* and this model is a 'bert'",
        ),
        (
            "rules:\n" + rule("Bert", "linear(x, w)", "x: activation", more=", expect: {model_types: {Bert: 7}}"),
            r"of the model type 'Bert', which transformers does not know",
        ),
        (
            "exclude:\n  - {within: '*', why: all}\n",
            r"the rules of 'own' put no quantizer into Bert.*: their exclude entries leave all they match in float",
        ),
        (
            "rules:\n" + rule("deep", "linear(x, w)", "x: activation", match="layers: [0, 11], "),
            r"own\.yaml:5: rule 'deep' names layer 11, and the last encoder layer of Bert.* is 1; correct it, or mark",
        ),
        (
            "exclude:\n  - {layers: [0, 2], sites: 'add_*', why: ends}\n",
            r"own\.yaml:5: an exclude entry names layer 2, and the last encoder layer",
        ),
        (
            "share:\n  - {layers: [0, 2], rules: residual-add, why: ends}\n",
            r"own\.yaml:5: a share entry names layer 2, and the last encoder layer",
        ),
    ],
    ids=[
        *("matches-nothing", "nearest", "per-layer", "total", "model-type", "exclude-nothing"),
        *("misspelt", "misspelt-case", "exclude-all", "no-such-layer", "exclude-no-layer", "share-no-layer"),
    ],
)
def test_rules_that_do_not_fit_the_model(text: str, message: str, write: Write) -> None:
    with pytest.raises(qs.MatchError, match=message):
        bert_plan(write(text))


def test_what_a_model_may_lack_is_no_mistake(write: Write) -> None:
    """A layer of another depth where that is said, and a model type of somebody's own."""
    more = ", expect: {model_types: {mybert: 7, roberta: 6}}, optional: true"
    text = "rules:\n" + rule("own", "linear(x, w)", "x: activation", match="layers: [0, 11], ", more=more)
    text += "exclude:\n  - {layers: [1, 11], sites: 'add_*', why: ends, optional: true}\n"
    made = bert_plan(write(text))
    assert {site.layer for site in made.sites if site.operator == "add"} == {0}


def test_a_new_linear_in_bert_is_loud() -> None:
    """What happens when transformers changes the architecture: the recipe counts."""
    model = build("bert", "BertModel")
    intermediate = model.encoder.layer[0].intermediate
    intermediate.intermediate_act_fn = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(48, 48))
    with pytest.raises(qs.MatchError, match="encoder-linear' expects 6 or 10 matches per layer, found 7 in layer 0"):
        qs.convert(model)


def test_the_plan_as_data() -> None:
    made = bert_plan("qdqbert")
    data = made.to_json()
    assert data["schema"] == 1
    assert data["quantizers"] == {
        "encoder-linear": 24,
        "attention-context": 4,
        "relative-position-scores": 0,
        "attention-scores": 4,
        "residual-add": 8,
        "other-residual-add": 0,
    }
    assert data["sites"][0] == {
        "quantizer": "bert.encoder.layer.0.attention.self.matmul_a_input_quantizer",
        "rule": "attention-context",
        "operand": "matmul(a)",
        "spec": "default",
        "layer": 0,
        "source": data["sites"][0]["source"],
    }
    assert data["coverage"]["linear"] == {"found": 12, "quantized": 12, "refused": 0}
    assert [site.quantizer for site in made.under("bert.encoder.layer.1.intermediate")] == [  # type: ignore[union-attr]
        "bert.encoder.layer.1.intermediate.dense._input_quantizer",
        "bert.encoder.layer.1.intermediate.dense._weight_quantizer",
    ]
    assert "40 quantizers by rule set qdqbert in 2 layers" in str(made)


# --- what rules promise of architectures


def test_a_promise_of_a_known_architecture_holds_though_the_rule_is_optional(write: Write) -> None:
    def made(more: str) -> Plan:
        text = rule(
            "own", "linear(x=tanh(_), w)", "x: activation", match="layers: all, ", more=f", optional: true{more}"
        )
        return bert_plan(write("rules:\n" + text))

    assert made("").matches["own"] == 0
    with pytest.raises(qs.MatchError, match=r"rule 'own' expects 1 matches per layer, found 0 in layer 0"):
        made(", expect: {model_types: {bert: 1}}")
    assert made(", expect: {model_types: {albert: 1}}").matches["own"] == 0


def test_residual_adds_are_told_by_their_shape(write: Write) -> None:
    every = rule("own", "residual_add(a, b)", "a: activation", match="layers: all, ")
    assert bert_plan(write("rules:\n" + every)).matches["own"] == 4
    behind = rule("own", "residual_add(layer_norm(_), b)", "b: activation", match="layers: all, ")
    found = {site.owner for site in bert_plan(write("rules:\n" + behind)).sites if site.rule == "own"}
    assert found == {f"bert.encoder.layer.{layer}.output" for layer in range(2)}


def test_what_no_rule_is_about_is_left_in_float_and_said() -> None:
    config = transformers.FNetConfig(
        hidden_size=32, num_hidden_layers=2, intermediate_size=48, vocab_size=60, max_position_embeddings=40
    )
    made = qs.plan(transformers.FNetModel(config).eval())
    assert vars(made.coverage["linear"]) == {"found": 4, "quantized": 4, "refused": 0}
    assert made.matches["attention-scores"] == 0
    config = transformers.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=48, vocab_size=60)
    made = qs.plan(transformers.XLNetModel(config).eval())
    products = made.coverage["matmul"]
    assert products.quantized == 0
    assert products.found == products.refused > 8
    assert {refusal.reason for refusal in made.refusals if refusal.operator == "einsum"} == {
        "no rule is about a einsum here"
    }


def test_an_exclusion_may_be_of_what_not_every_model_has(write: Write) -> None:
    text = "exclude: [{why: where there are some, sites: nothing_like_it, optional: true}]\n"
    assert len(bert_plan(write(text)).sites) == 40


@pytest.mark.parametrize("rules", sorted({*qs.shipped_rules()} - {"fuse-qkv", "linear-only", "pytorch"}))
def test_rules_for_targets_take_models_without_softmax_or_linears(rules: str) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 48, "vocab_size": 60}
    assert qs.plan(transformers.FNetModel(transformers.FNetConfig(**sizes)).eval(), rules).sites
    groups = dict.fromkeys(("q_groups", "k_groups", "v_groups", "intermediate_groups", "output_groups"), 2)
    config = transformers.SqueezeBertConfig(**sizes, num_attention_heads=4, embedding_size=32, **groups)
    made = qs.plan(transformers.SqueezeBertModel(config).eval(), rules)
    assert {site.operator for site in made.sites} <= {"matmul", "add"}
    assert len([refusal for refusal in made.refusals if refusal.operator == "conv1d"]) == 6


class HeirConfig(transformers.BertConfig):
    """Somebody's own, of BERT's type."""


class Heir(transformers.PreTrainedModel):
    """Layers of its own under a config that inherits BERT's type."""

    config_class = HeirConfig

    def __init__(self, config: HeirConfig) -> None:
        super().__init__(config)
        self.embed = torch.nn.Embedding(60, 8)
        self.layers = torch.nn.ModuleList([torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU())])
        self.post_init()

    def forward(self, input_ids: torch.Tensor, **_: object) -> torch.Tensor:
        states: torch.Tensor = self.layers[0](self.embed(input_ids))
        return states


def test_what_is_promised_of_bert_is_not_promised_of_those_who_inherit_its_type(write: Write) -> None:
    model = Heir(HeirConfig(vocab_size=60)).eval()
    assert vars(qs.plan(model).coverage["linear"]) == {"found": 1, "quantized": 1, "refused": 0}
    own = rule("own", "linear(x, w)", "x: activation", match="layers: all, ", more=", expect: {model_types: {heir: 2}}")
    HeirConfig.model_type = "heir"
    try:
        with pytest.raises(qs.MatchError, match="rule 'own' expects 2 matches per layer, found 1"):
            qs.plan(model, write("rules:\n" + own))
    finally:
        del HeirConfig.model_type


def test_a_rule_does_not_fit_where_its_unless_does(write: Write) -> None:
    text = rule("own", "linear(x, w)", "x: activation", match="unless: linear(gelu(_)), layers: all, ")
    owners = {site.owner for site in bert_plan(write("rules:\n" + text)).sites if site.rule == "own"}
    assert len(owners) == 10
    assert not any(owner.endswith("output.dense") and "attention" not in owner for owner in owners)


def test_a_narrower_residual_rule_of_a_users_own_leaves_the_other_adds_in_float(write: Write) -> None:
    text = (
        "rules:\n  - name: residual-add\n    why: the first layer alone\n"
        '    match: {layers: [0], pattern: "add(local=maybe(dropout)(linear(_)), residual)"}\n'
        "    quantize: {local: activation, residual: activation}\n"
    )
    made = bert_plan(write(text))
    assert {site.layer for site in made.sites if site.operator == "add"} == {0}
    assert made.matches["other-residual-add"] == 0


# --- axes that an operand cannot have


@pytest.mark.parametrize(
    ("activation", "weight", "message"),
    [
        ("null", "-1", r"rule 'linears' gives 'w' .* axis: -1 at .*query.*, but that is for activations.*axis: 0"),
        ("null", "2", r"gives 'w' a spec with axis: 2 .* the tensor has 2 axes, counted from 0; write axis: 0"),
        ("0", "0", r"gives 'x' a spec with axis: 0 .* rows of an activation are others in each batch; .*axis: -1"),
        ("1", "0", r"gives 'x' a spec with axis: 1 .* another size there where texts have another length; .*axis: -1"),
        ("3", "0", r"own.yaml:\d+: rule .* gives 'x' a spec with axis: 3 .* the tensor has 3 axes"),
    ],
)
def test_an_axis_that_an_operand_cannot_have_is_refused(
    activation: str, weight: str, message: str, write: Write
) -> None:
    specs = f"specs: {{a: {{axis: {activation}}}, b: {{axis: {weight}}}}}\nrules:\n"
    path = write(specs + rule("linears", "linear(x, w)", "x: a, w: b", match="layers: all, "))
    with pytest.raises(qs.MatchError, match=message):
        bert_plan(path)


def test_axes_of_activations_that_stay_the_same_are_taken(write: Write) -> None:
    linears = rule("linears", "linear(x, w)", "x: a, w: b", match="layers: all, ")
    path = write("specs: {a: {axis: 2}, b: {axis: 1}}\nrules:\n" + linears)
    assert {str(site.spec) for site in bert_plan(path).sites if site.rule == "linears"} == {
        "int8 axis 2 max",
        "int8 axis 1 max",
    }
