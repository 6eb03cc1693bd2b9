"""What each part costs at the output: right to the bit, not run twice, and the model is as it was."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BASE, batch_for, build
from outlier_model import CHANNELS, spoiled
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs
from fuzzing import interruptions
from fuzzing.state import global_state, state_of
from qdq_surgery.errors import CalibrationError, ModelError, OptionError
from qdq_surgery.sensitivity import output_error
from qdq_surgery.sensitivity.result import Cost
from qdq_surgery.sensitivity.runs import integer_products, kept_products
from qdq_surgery.sensitivity.runs.borrowed import Borrowed

#: It sees the hidden states with their outliers.
SPOILED = "encoder.layer.0.output.add_residual_input_quantizer"

#: Two batches: what is kept of one must not be given in another.
SHAPES = ((4, 10), (2, 7))

BATCH = batch_for(spoiled(), (2, 7))


@functools.cache
def _calibrated(model_type: str, head: str, rules: str) -> PreTrainedModel:
    model = spoiled() if model_type == "spoiled" else build(model_type, head)
    qmodel = qs.convert(model, rules)
    qs.calibrate(qmodel, batches_for(qmodel))
    return qmodel


def calibrated(model_type: str = "bert", head: str | None = None, rules: str = "qdqbert") -> PreTrainedModel:
    head = head or BASE.get(model_type, "BertModel")
    return copy.deepcopy(_calibrated(model_type, head, rules))


def batches_for(model: PreTrainedModel, **more: bool) -> list[dict[str, Tensor]]:
    return [batch_for(model, shape, **more) for shape in SHAPES]


def run_with(qmodel: PreTrainedModel, names: set[str], batch: Mapping[str, Any]) -> Any:
    """The outputs of a copy in which all other quantizers are disabled."""
    model = copy.deepcopy(qmodel).eval()
    for name, quantizer in qs.quantizers(model).items():
        if name not in names:
            quantizer.disable()
    with torch.no_grad():
        return model(**batch)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    found, wanted = found.double(), wanted.double()
    return float((found - wanted).square().sum()) / float(wanted.square().sum())


def figures(result: qs.Sensitivity) -> dict[tuple[str, str], Cost]:
    return {(each.what, each.name): each for each in result.costs}


# The figures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["qdqbert", "onnxruntime"])
def test_it_is_what_one_finds_by_hand(rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, but for products of integers. A weight alone in INT8 is rounded with the scales of its input."""
    monkeypatch.setattr(integer_products, "_fits", lambda _: False)
    qmodel = calibrated("spoiled", rules=rules)
    batch = {name: value[1:] for name, value in batch_for(qmodel, (4, 10)).items()}  # the first row is padded
    every = set(qs.quantizers(qmodel))
    plain, whole = (run_with(qmodel, names, batch).last_hidden_state for names in (set(), every))
    found = qs.sensitivity(qmodel, [batch])
    assert found.int8 == relative_error(whole, plain)
    places = ("query._weight_", "layer.1.output.dense._input_", "layer.1.output.dense._weight_", "layer.1.output.add_")
    sites = [name for name in sorted(every) if any(place in name for place in (*places, "layer.1.attention.self.mat"))]
    for name in sites:
        cost = figures(found)["site", name]
        assert cost.alone == relative_error(run_with(qmodel, {name}, batch).last_hidden_state, plain)
        assert cost.left == relative_error(run_with(qmodel, every - {name}, batch).last_hidden_state, plain)
        assert cost.gain == found.int8 - cost.left
    layer = {name for name in every if name.startswith("encoder.layer.1.")}
    cost = figures(found)["layer", "encoder.layer.1"]
    assert cost.quantizers == len(layer)
    assert cost.alone == relative_error(run_with(qmodel, layer, batch).last_hidden_state, plain)
    kind = {site.quantizer for site in qmodel_sites(qmodel) if (site.rule, site.capture) == ("encoder-linear", "w")}
    cost = figures(found)["kind", "encoder-linear(w)"]
    assert cost.left == relative_error(run_with(qmodel, every - kind, batch).last_hidden_state, plain)


@functools.cache
def of_outliers() -> qs.Sensitivity:
    """What several tests look at."""
    return qs.sensitivity(calibrated("spoiled"), batches_for(spoiled()))


def qmodel_sites(qmodel: PreTrainedModel) -> tuple[qs.Site, ...]:
    from qdq_surgery.surgery.model_state import plan_of

    return plan_of(qmodel).sites


def test_outlier_channels_rank_first_and_are_named() -> None:
    """The residual stream has them, and the linears that read it; values and attention have not."""
    found = of_outliers()
    kinds = found.of("kind")
    assert [each.name for each in kinds[:2]] == ["residual-add(residual)", "encoder-linear(x)"]
    assert sorted(kinds[0].outliers) == list(CHANNELS)
    assert kinds[0].alone > 10 * kinds[1].alone
    assert kinds[0].gain > 0
    sites = found.of("site")
    assert all(each.name.endswith("add_residual_input_quantizer") for each in sites[:2])
    assert sorted(figures(found)["site", SPOILED].outliers) == list(CHANNELS)
    assert min(figures(found)["site", SPOILED].outliers.values()) > 20
    weights = [each for each in found.of("site") if each.name.endswith("_weight_quantizer")]
    assert not any(each.outliers for each in weights)


ARCHITECTURES = ["bert", "deberta-v2", "modernbert", "albert"]


@pytest.mark.parametrize("model_type", [each for each in ARCHITECTURES if each != "albert"])  # which has none
def test_leaving_layers_out_changes_nothing(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = calibrated(model_type)
    data = batches_for(qmodel)[: None if model_type == "bert" else 1]
    # Which layers a site depends on is the same everywhere; what goes from one layer to the next is not.
    sites = model_type == "bert"
    found = qs.sensitivity(qmodel, data, sites=sites)
    monkeypatch.setattr(Borrowed, "depends", lambda *_: True)
    assert found.to_json() == qs.sensitivity(qmodel, data, sites=sites).to_json()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_which_models_have_layers_to_leave_out(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but ALBERT, whose one layer runs several times."""
    qmodel, told = calibrated(model_type), []
    depends = Borrowed.depends

    def noted(*args: Any) -> bool:
        told.append(depends(*args))
        return told[-1]

    monkeypatch.setattr(Borrowed, "depends", noted)
    qs.sensitivity(qmodel, batches_for(qmodel), sites=False, kinds=False)
    assert told == [model_type == "albert"] * len(SHAPES)


def test_sites_outside_the_layers(tmp_path: Path) -> None:
    """All layers run for them: they may stand before the first one."""
    path = tmp_path / "mine.yaml"
    path.write_text(
        "schema: 1\nname: mine\nextends: qdqbert\nrules:\n"
        '  - {name: pooling, why: w, match: {within: "*pooler*", pattern: "linear(x, w)"}, quantize: {x: default}}\n',
        encoding="utf-8",
    )
    qmodel = qs.convert(build("bert", "BertForSequenceClassification"), path)
    qs.calibrate(qmodel, [BATCH])
    name = "bert.pooler.dense._input_quantizer"
    found = qs.sensitivity(qmodel, [BATCH])
    plain, alone = (run_with(qmodel, names, BATCH).logits for names in (set[str](), {name}))
    assert figures(found)["site", name].alone == relative_error(alone, plain) > 0
    assert figures(found)["kind", "pooling(x)"].left == figures(found)["site", name].left
    assert {each.name for each in found.of("layer")} == {"bert.encoder.layer.0", "bert.encoder.layer.1"}


def test_half_precision_and_wrapped(tmp_path: Path) -> None:
    qmodel = calibrated().to(torch.bfloat16)
    options: Any = {"sites": False, "kinds": False}
    found = qs.sensitivity(qmodel, [BATCH], resume=tmp_path / "figures.json", **options)
    assert 0 < found.int8 < 1
    wrapped = torch.compile(qmodel, backend="eager")
    again = qs.sensitivity(wrapped, [BATCH], resume=tmp_path / "figures.json", **options)  # type: ignore[arg-type]
    assert again.to_json() == found.to_json()


def runs_of(qmodel: PreTrainedModel, paths: Mapping[str, str], **options: Any) -> Counter[str]:
    """How often modules are called while a model is measured on one batch."""
    counts: Counter[str] = Counter()
    hooks = [
        qmodel.get_submodule(path).register_forward_pre_hook(lambda *_, name=name: counts.update([name]))
        for name, path in paths.items()
    ]
    qs.sensitivity(qmodel, [batch_for(qmodel, (2, 7))], **options)
    for hook in hooks:
        hook.remove()
    return counts


def test_layers_before_a_site_are_not_run() -> None:
    paths = {str(layer): f"encoder.layer.{layer}.output.dense" for layer in (0, 1)}
    counts = runs_of(calibrated(), {**paths, "all": "embeddings.LayerNorm"}, kinds=False, layers=False)
    # Once in float and once in INT8; 20 sites, twice each; and one run shows that nothing depends on the first layer.
    assert counts == {"0": 2 + 20 * 2, "1": 3 + 40 * 2, "all": 3 + 40 * 2}


def test_layers_that_run_twice_are_run_each_time() -> None:
    counts = runs_of(
        calibrated("albert"), {"1": "encoder.albert_layer_groups.0.albert_layers.0.ffn"}, kinds=False, layers=False
    )
    assert counts["1"] == 2 * (2 + 20 * 2)


def test_what_depends_on_running_a_layer_runs_it() -> None:
    """Attentions are collected while the layers run."""
    qmodel = calibrated()
    batch: dict[str, Any] = {**batch_for(qmodel, (2, 7)), "output_attentions": True}
    seen = []

    def metric(outputs: Any, _: Any) -> float:
        seen.append(len(outputs.attentions))
        return float(outputs.attentions[0].double().sum())

    qs.sensitivity(qmodel, [batch], metric, kinds=False, layers=False)
    assert set(seen) == {2}


def test_a_weight_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_products.KeptProducts, "find", lambda *_: None)
    monkeypatch.setattr(integer_products, "_fits", lambda _: False)
    counts = runs_of(calibrated(), {"w": "encoder.layer.1.output.dense._weight_quantizer"}, sites=False)
    # In 23 runs (in float, without the first layer, in INT8, and two for each of eight kinds and two layers) it lets
    # the weight pass in 12, and rounds it in the first of the others.
    assert counts["w"] == 12 + 1


# Metrics --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "metric"),
    [
        ("BertForTokenClassification", "cosine"),
        ("BertForQuestionAnswering", "mse"),
        ("BertForQuestionAnswering", "kl"),  # which fills in another number
        ("BertForSequenceClassification", "mse"),
    ],
)
def test_padding_does_not_count(head: str, metric: str) -> None:
    qmodel = calibrated("bert", head)
    batch = batch_for(qmodel, (4, 10))
    other = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    wide = {name: torch.cat([value, torch.zeros_like(value[:, :5])], 1) for name, value in batch.items()}
    options: Any = {"sites": False, "kinds": False}
    found, elsewhere, wider = (qs.sensitivity(qmodel, [each], metric, **options) for each in (batch, other, wide))
    assert found.int8 > 0
    assert (found.rows, found.tokens) == (4, 37)
    # What stands in padding is masked by a large negative number, which leaves exact zeros.
    assert elsewhere.to_json() == found.to_json()
    assert wider.to_json() == found.to_json()


def test_metrics_by_their_formulas() -> None:
    qmodel = calibrated("bert", "BertForTokenClassification")
    batch = batch_for(qmodel, (4, 10))
    real = batch["attention_mask"].bool()
    plain, whole = (
        run_with(qmodel, names, batch).logits[real].double() for names in (set[str](), set(qs.quantizers(qmodel)))
    )
    wanted = {
        "mse": relative_error(whole, plain),
        "cosine": float((1 - torch.nn.functional.cosine_similarity(whole, plain)).mean()),
        "kl": float((plain.softmax(1) * (plain.log_softmax(1) - whole.log_softmax(1))).sum(1).mean()),
    }
    for metric, value in wanted.items():
        found = qs.sensitivity(qmodel, [batch], metric, sites=False, kinds=False)
        assert found.int8 == pytest.approx(value, rel=1e-6), metric
        assert found.metric == metric
        assert found.float_score is None


def test_many_rows_are_judged_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = calibrated("bert", "BertForTokenClassification")
    data = batches_for(qmodel)
    for metric in ("mse", "cosine", "kl"):
        with monkeypatch.context() as patch:
            whole = qs.sensitivity(qmodel, data, metric, sites=False, kinds=False).int8
            patch.setattr(output_error, "_PIECE", 5)
            pieces = qs.sensitivity(qmodel, data, metric, sites=False, kinds=False).int8
        assert pieces == pytest.approx(whole, rel=1e-9)


def accuracy(outputs: Any, batch: Mapping[str, Any]) -> float:
    return float((outputs.logits.argmax(-1) == batch["labels"]).double().mean())


def test_a_metric_of_the_user_s() -> None:
    """Its mean is over rows, and a fall of it is an error."""
    qmodel = calibrated("bert", "BertForSequenceClassification")
    data = batches_for(qmodel)
    for batch in data:
        batch["labels"] = run_with(qmodel, set(), batch).logits.argmax(-1)
    data[1]["labels"] = 1 - data[1]["labels"]
    found = qs.sensitivity(qmodel, data, accuracy, sites=False)
    assert found.float_score == 4 / 6
    assert found.metric.endswith("test_sensitivity.accuracy")
    scores = [accuracy(run_with(qmodel, set(qs.quantizers(qmodel)), batch), batch) for batch in data]
    assert found.int8 == pytest.approx(4 / 6 - (4 * scores[0] + 2 * scores[1]) / 6, abs=1e-12)
    assert "fall of" in found.to_text()


def test_what_does_not_fall_has_fallen_by_0() -> None:
    qmodel = calibrated("bert", "BertForSequenceClassification")
    found = qs.sensitivity(qmodel, batches_for(qmodel)[:1], lambda *_: 0.5, sites=False, kinds=False)
    assert "the whole model in INT8: 0\n" in found.to_text()
    assert "-0" not in found.to_text()


# The model is borrowed ------------------------------------------------------------------------------------------------


def test_the_model_is_as_it_was() -> None:
    qmodel = calibrated().train()
    qmodel.encoder.layer[0].eval()
    names = list(qs.quantizers(qmodel))
    qs.quantizers(qmodel)[names[0]].disable()
    qs.quantizers(qmodel)[names[1]].enable_calib()
    with qs.quantization_disabled(qmodel):  # leaves its own mark, as the first call of a model does
        qmodel(**batches_for(qmodel)[0])
    before = state_of(qmodel), global_state()
    found = qs.sensitivity(qmodel, batches_for(qmodel))
    assert (state_of(qmodel), global_state()) == before
    assert names[0] not in {each.name for each in found.costs}
    assert names[1] in {each.name for each in found.costs}


def test_batches_may_be_drawn_at_random_meanwhile() -> None:
    qmodel = calibrated()
    seen: list[Tensor] = []

    def metric(_: Any, batch: Mapping[str, Any]) -> float:
        seen.append(batch["input_ids"])
        return 0.0

    torch.manual_seed(3)
    wanted = [torch.randint(3, 60, (2, 5)) for _ in range(2)]
    torch.manual_seed(3)
    given = ({"input_ids": torch.randint(3, 60, (2, 5))} for _ in range(2))
    qs.sensitivity(qmodel, given, metric, sites=False, kinds=False)
    assert torch.equal(seen[0], wanted[0])
    assert torch.equal(seen[-1], wanted[1])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("when", [1, 2, 3, 30])
def test_the_model_is_as_it_was_however_it_ends(error: type[BaseException], when: int) -> None:
    qmodel = calibrated()
    with qs.quantization_disabled(qmodel):
        qmodel(**batches_for(qmodel)[0])
    before = state_of(qmodel), global_state()
    with pytest.raises(error):
        qs.sensitivity(qmodel, batches_for(qmodel), raising(error, when))
    assert (state_of(qmodel), global_state()) == before


def raising(error: type[BaseException], when: int) -> Callable[[Any, Any], float]:
    calls = []

    def metric(outputs: Any, _: Any) -> float:
        calls.append(1)
        if len(calls) == when:
            raise error
        return -float(outputs.last_hidden_state.double().square().mean())

    return metric


def test_an_interrupt_inside_a_layer_leaves_no_trace() -> None:
    qmodel = calibrated()
    with qs.quantization_disabled(qmodel):
        qmodel(**batches_for(qmodel)[0])
    before = state_of(qmodel)
    calls = []

    def interrupt(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 50:
            raise KeyboardInterrupt

    hook = qmodel.encoder.layer[1].output.dense.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        qs.sensitivity(qmodel, batches_for(qmodel))
    hook.remove()
    assert state_of(qmodel) == before


def measure(qmodel: PreTrainedModel) -> None:
    qs.sensitivity(qmodel, [batch_for(qmodel, (2, 5))], sites=False, kinds=False)


def start() -> PreTrainedModel:
    qmodel = calibrated()
    with qs.quantization_disabled(qmodel):
        qmodel(**BATCH)
    return qmodel


@pytest.mark.slow
def test_interrupted_at_any_line_the_model_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    operation = interruptions.Operation("sensitivity", start, measure)
    monkeypatch.setattr(interruptions, "OPERATIONS", (operation,))
    outcome = interruptions.run(20, 0, ["sensitivity"])
    assert outcome.read.total() == 20
    assert outcome.is_right, str(outcome)


def test_a_second_one_meanwhile_is_refused() -> None:
    qmodel = calibrated()
    data = batches_for(qmodel)

    calls = []

    def metric(*_: Any) -> float:
        calls.append(1)
        if len(calls) == 2:  # all of the model is in INT8
            qs.sensitivity(qmodel, data)
        return 0.0

    with pytest.raises(CalibrationError, match="of this BertModel is running"):
        qs.sensitivity(qmodel, data, metric)


# What cannot be -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "options", "error", "words"),
    [
        ([], {}, CalibrationError, "there are no batches"),
        ([[1]], {}, CalibrationError, "batch 0 is a list, wanted a dict"),
        (
            [BATCH, {**BATCH, "atention_mask": BATCH["attention_mask"]}],
            {},
            CalibrationError,
            "batch 1: it has 'atention_mask', which BertModel does not know; write 'attention_mask'",
        ),
        ([{"input_ids": torch.full((1, 3), 99)}], {}, CalibrationError, "batch 0: BertModel cannot run it: index out"),
        ([BATCH], {"metric": "mean"}, OptionError, "the metric 'mean' is none; give 'mse', 'cosine', 'kl' or"),
        ([BATCH], {"metric": 3}, OptionError, "the metric 3 is none"),
        ([BATCH], {"metric": "kl"}, OptionError, "BertModel has no logits but 'last_hidden_state'; take 'mse'"),
        ([BATCH], {"metric": lambda *_: "good"}, OptionError, "returns a str, wanted a number"),
        ([BATCH], {"metric": lambda *_: float("nan")}, CalibrationError, "batch 0: its .* is nan; look for"),
        ([BATCH], {"sites": False, "kinds": False, "layers": False}, OptionError, "nothing is to be measured"),
    ],
)
def test_what_cannot_be_measured(data: list[Any], options: dict[str, Any], error: type[Exception], words: str) -> None:
    qmodel = calibrated()
    with pytest.raises(error, match=words):
        qs.sensitivity(qmodel, data, **{"sites": False, **options})


def test_models_that_cannot_be_measured() -> None:
    with pytest.raises(ModelError, match="is not converted"):
        qs.sensitivity(build("bert", "BertModel"), [BATCH])
    qmodel = calibrated()
    names = list(qs.quantizers(qmodel))
    qs.quantizers(qmodel)[names[2]].reset_amax()
    with pytest.raises(CalibrationError, match=rf"1 of 40 quantizers have no range \(first: {names[2]}\); calibrate"):
        qs.sensitivity(qmodel, [BATCH])
    with (
        qs.quantization_disabled(qmodel),
        pytest.raises(CalibrationError, match="no quantizer quantizes, so the model is in float"),
    ):
        qs.sensitivity(qmodel, [BATCH])
    broken = calibrated()
    with torch.no_grad():
        broken.embeddings.word_embeddings.weight[:] = float("nan")
    with pytest.raises(CalibrationError, match="batch 0: its mse is nan"):
        qs.sensitivity(broken, [BATCH])


@pytest.mark.parametrize("metric", ["cosine", "kl"])
def test_one_number_has_no_direction_and_no_other_class(metric: str) -> None:
    qmodel = qs.convert(build("bert", "BertForSequenceClassification", num_labels=1))
    qs.calibrate(qmodel, [BATCH])
    with pytest.raises(OptionError, match="gives one a row: take 'mse'"):
        qs.sensitivity(qmodel, [BATCH], metric)
    assert qs.sensitivity(qmodel, [BATCH], sites=False, kinds=False).int8 > 0


# The table ------------------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    found = of_outliers()
    for what in ("site", "kind", "layer"):
        errors = [each.alone for each in found.of(what)]
        assert errors == sorted(errors, reverse=True)
    data = found.to_json()
    assert (data["schema"], data["metric"], data["rows"], data["batches"]) == (1, "mse", 6, 2)
    assert data["tokens"] == 37 + 12
    text = found.to_text()
    assert "mse at the output against the float model, on 49 tokens in 6 rows (2 batches)" in text
    assert "float alone" in text
    assert max(map(len, text.splitlines())) <= 120


def test_sites_folded_by_layer() -> None:
    found = of_outliers()
    folded = found.folded()
    sites = {each.name: each for each in folded.of("site")}
    assert len(sites) == 20
    name = "encoder.layer.{}.output.add_residual_input_quantizer"
    own = [figures(found)["site", name.format(layer)] for layer in (0, 1)]
    assert sites[name.format("*")].layers == "0-1"
    assert sites[name.format("*")].alone == max(each.alone for each in own)
    assert folded.of("layer") == found.of("layer")
    assert "0-1" in folded.to_text()
    assert folded.folded() == folded


def test_only_what_is_asked_for() -> None:
    found = qs.sensitivity(calibrated(), batches_for(calibrated()), sites=False, layers=False)
    assert {each.what for each in found.costs} == {"kind"}
    assert len(found.costs) == 8
