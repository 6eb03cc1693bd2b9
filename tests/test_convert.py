"""convert() and plan(): what they refuse, what they leave alone, what they keep."""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BASE, batch_for, build, tensors_of
from comparing import assert_same
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import nn
from transformers import BertConfig, BertModel, PreTrainedModel
from transformers.models.bert.modeling_bert import BertOutput

import qdq_surgery as qs
from qdq_surgery.hf.example_inputs import sample_inputs
from qdq_surgery.surgery import apply as surgery
from qdq_surgery.surgery.quantized_forward import QuantizedForward
from qdq_surgery.trace.attention import QDQ_ATTENTION


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a conversion could touch."""
    return {
        "classes": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "tensors": [(name, id(p), p._version) for name, p in (*model.named_parameters(), *model.named_buffers())],
        "configs": [id(vars(module).get("config")) for module in model.modules()],
        "attention": model.config._attn_implementation,
        "training": [module.training for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
    }


# --- what is refused


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Linear(2, 2), qs.ModelError, "found a Linear, wanted a Hugging Face PreTrainedModel"),
        (lambda: torch.compile(build("bert", "BertModel")), qs.ModelError, "convert it before torch.compile"),
        (
            lambda: qs.convert(build("bert", "BertModel")),
            qs.AlreadyConvertedError,
            "holds quantizers already .first: enc",
        ),
        (lambda: build("bert", "BertModel").to("meta"), qs.ModelError, "has no data .meta device.; load the weights"),
    ],
    ids=["no-transformer", "compiled", "twice", "meta"],
)
def test_models_that_cannot_be_converted(make: Callable[[], Any], error: type[Exception], message: str) -> None:
    model = make()
    for call in (qs.convert, qs.plan):
        with pytest.raises(error, match=message):
            call(model)


@pytest.mark.parametrize(
    ("model_type", "head", "inputs", "message"),
    [
        ("bert", "BertModel", [1, 2], "example_inputs is a list; pass a dict"),
        # (Every supported head has **kwargs, which take any name; then it is the model that refuses.)
        (
            "bert",
            "BertModel",
            {"pixels": torch.ones(1, 2)},
            "BertModel does not run on the example inputs .pixels.: Value",
        ),
        (
            "bert",
            "BertModel",
            {"input_ids": torch.full((1, 3), 999)},
            "BertModel does not run on the example inputs .input_ids.: IndexError",
        ),
    ],
    ids=["no-dict", "any-argument", "does-not-run"],
)
def test_wrong_example_inputs(model_type: str, head: str, inputs: Any, message: str) -> None:
    with pytest.raises(qs.ModelError, match=message):
        qs.convert(build(model_type, head), example_inputs=inputs)


def test_an_argument_that_the_forward_does_not_take() -> None:
    class Strict(BertModel):
        def forward(self, input_ids: torch.Tensor) -> Any:
            return super().forward(input_ids)

    model = build("bert", "BertModel")
    model.__class__ = Strict
    with pytest.raises(qs.ModelError, match=r"example_inputs has 'pixels', which Strict.forward does not take"):
        qs.convert(model, example_inputs={"pixels": torch.ones(1, 2)})
    assert len(qs.quantizers(qs.convert(model))) == 40


def test_own_example_inputs() -> None:
    model = build("bert", "BertModel")
    qmodel = qs.convert(model, example_inputs=batch_for(model, (1, 6)))
    assert len(qs.quantizers(qmodel)) == 40
    assert_same(model, qmodel, batch_for(model, (3, 9), mask=False))


# --- what stays as it is


@pytest.mark.parametrize("model_type_head", [("bert", "BertModel"), ("albert", "AlbertModel")])
def test_plan_and_convert_leave_the_original_alone(model_type_head: tuple[str, str]) -> None:
    model = build(*model_type_head)
    model.train()
    fired: list[int] = []
    model.base_model.register_forward_hook(lambda *_: fired.append(1))
    before = fingerprint(model)
    random = torch.get_rng_state()
    qs.plan(model)
    qmodel = qs.convert(model)
    qs.diff(model, qmodel)
    assert fingerprint(model) == before
    assert fired == []
    assert torch.equal(torch.get_rng_state(), random)
    assert qmodel.training
    assert all(quantizer.training for quantizer in qs.quantizers(qmodel).values())


def test_inplace_changes_the_model_itself_and_shares_everything() -> None:
    model = build("bert", "BertForMaskedLM")
    parameters = {name: id(p) for name, p in model.named_parameters()}
    linear = model.bert.encoder.layer[0].output.dense
    fired: list[int] = []
    linear.register_forward_hook(lambda *_: fired.append(1))
    qmodel = qs.convert(model, inplace=True)
    assert qmodel is model
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert model.bert.encoder.layer[0].output.dense is linear
    assert isinstance(linear, quant_nn.QuantLinear)
    assert fired == []  # converting did not run the user's hooks
    model(**batch_for(model, (2, 4)))
    assert fired == [1]


@pytest.mark.parametrize(
    ("after", "inplace"), [("_own_configs", True), ("_swap_module", True), ("_rewrite", True), ("_rewrite", False)]
)
def test_a_failure_half_way_leaves_the_model_as_it_was(
    after: str, inplace: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("albert", "AlbertModel")
    before = fingerprint(model)
    real = getattr(surgery._Surgeon, after)
    calls: list[int] = []

    def fail(self: Any, *args: Any) -> None:
        real(self, *args)
        calls.append(1)
        if after == "_own_configs" or len(calls) == 2:
            raise RuntimeError("half-way")

    monkeypatch.setattr(surgery._Surgeon, after, fail)
    with pytest.raises(RuntimeError, match="half-way"):
        qs.convert(model, inplace=inplace)
    assert fingerprint(model) == before
    assert not qs.quantizers(model)
    monkeypatch.undo()
    assert len(qs.quantizers(qs.convert(model))) == 20


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "albert", "modernbert", "deberta-v2"])
def test_every_kind_of_call_is_recorded_when_a_model_is_converted(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = qs.convert(build(model_type, BASE[model_type]))

    def fail(*_: Any) -> None:
        raise AssertionError("a call of a kind that was not recorded")

    monkeypatch.setattr(QuantizedForward, "_compile_for", fail)
    for training in (False, True):
        for mask in (True, False):
            model.train(training)(**batch_for(model, (3, 7), mask=mask))


def test_tied_weights_stay_tied() -> None:
    qmodel = qs.convert(build("bert", "BertForMaskedLM"))
    assert qmodel.cls.predictions.decoder.weight is qmodel.bert.embeddings.word_embeddings.weight


def test_shared_layers_share_their_quantizers() -> None:
    qmodel = qs.convert(build("albert", "AlbertModel", num_hidden_layers=6))
    assert len(qs.quantizers(qmodel)) == 20


def test_frozen_parameters_stay_frozen() -> None:
    model = build("bert", "BertModel")
    model.encoder.layer[0].requires_grad_(False)
    qmodel = qs.convert(model)
    assert [p.requires_grad for p in qmodel.parameters()] == [p.requires_grad for p in model.parameters()]


def test_two_models_in_one_process_do_not_meet() -> None:
    first, second = build("bert", "BertModel"), build("bert", "BertModel", seed=1)
    batch = batch_for(first, (2, 5))
    alone = tensors_of(qs.convert(first)(**batch))
    a = qs.convert(first)
    b = qs.convert(second, "linear-only")
    for quantizer in qs.quantizers(b).values():
        quantizer.amax = 0.5
    found = tensors_of(a(**batch))
    assert all(torch.equal(found[name], alone[name]) for name in alone)


def test_a_shared_config_object_is_not_shared_any_more() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=60)
    one, other = BertModel(config).eval(), BertModel(config).eval()
    assert one.config is other.config
    implementation = other.config._attn_implementation
    batch = batch_for(one, (2, 4))
    wanted = other(**batch).last_hidden_state
    qs.convert(one, inplace=True)
    assert one.config._attn_implementation == QDQ_ATTENTION
    assert other.config._attn_implementation == implementation
    assert torch.equal(other(**batch).last_hidden_state, wanted)


# --- attention


def test_sdpa_is_switched_and_the_plan_says_so() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=60)
    model = BertModel._from_config(config, attn_implementation="sdpa").eval()
    assert qs.plan(model).attention == QDQ_ATTENTION
    qmodel = qs.convert(model)
    assert qmodel.config._attn_implementation == QDQ_ATTENTION
    assert model.config._attn_implementation == "sdpa"
    batch = batch_for(model, (2, 5))
    with qs.quantization_disabled(qmodel):
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        assert torch.equal(qmodel(**batch).last_hidden_state, eager(**batch).last_hidden_state)


def test_rules_without_attention_leave_the_implementation() -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, vocab_size=60)
    model = BertModel._from_config(config, attn_implementation="sdpa").eval()
    qmodel = qs.convert(model, "linear-only")
    assert qmodel.config._attn_implementation == "sdpa"
    batch = batch_for(model, (2, 5))
    with qs.quantization_disabled(qmodel):
        assert torch.equal(qmodel(**batch).last_hidden_state, model(**batch).last_hidden_state)


@pytest.mark.parametrize(
    ("model_type_head", "implementation"), [(("bert", "BertModel"), "eager"), (("albert", "AlbertModel"), "sdpa")]
)
def test_switching_attention_later_is_an_error(model_type_head: tuple[str, str], implementation: str) -> None:
    qmodel = qs.convert(build(*model_type_head))
    batch = batch_for(qmodel, (2, 5))
    qmodel(**batch)
    qmodel.set_attn_implementation(implementation)
    with pytest.raises(qs.AttentionBypassError, match=f"'{implementation}'.*set_attn_implementation.'{QDQ_ATTENTION}'"):
        qmodel(**batch)
    qmodel.set_attn_implementation(QDQ_ATTENTION)
    qmodel(**batch)


def test_an_unconverted_model_may_use_the_name() -> None:
    model = build("bert", "BertModel")
    batch = batch_for(model, (2, 5))
    wanted = model(**batch).last_hidden_state
    model.set_attn_implementation(QDQ_ATTENTION)
    assert torch.equal(model(**batch).last_hidden_state, wanted)


# --- options and corners


@pytest.mark.usefixtures("default_descriptors")
def test_default_descriptors_are_read_at_conversion() -> None:
    model = build("bert", "BertModel")
    quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(num_bits=4, calib_method="histogram"))
    quant_nn.QuantLinear.set_default_quant_desc_weight(QuantDescriptor(num_bits=6))
    for name, quantizer in qs.quantizers(qs.convert(model)).items():
        weight = name.endswith("_weight_quantizer")
        assert quantizer.num_bits == (6 if weight else 4)
        assert type(quantizer._calibrator).__name__ == ("MaxCalibrator" if weight else "HistogramCalibrator")
        assert quantizer.provenance is not None
        assert quantizer.provenance.descriptor == (
            "int6 per-tensor max (default)" if weight else "int4 per-tensor histogram (default)"
        )


def test_a_linear_of_its_own_kind_is_refused(tmp_path: Path) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = build("bert", "BertModel")
    model.encoder.layer[1].intermediate.dense.__class__ = Scaled
    rules = tmp_path / "rules.yaml"
    rules.write_text(Path(str(qs.shipped_rules()["qdqbert"])).read_text().replace("bert: [6, 10]", "bert: [5, 6, 10]"))
    made = qs.plan(model, rules)
    assert [(r.path, r.reason) for r in made.refusals if r.layer == 1] == [
        (
            "encoder.layer.1.intermediate.dense",
            "Scaled is no plain nn.Linear: it has a class, a forward or a weight of its own",
        )
    ]
    assert made.coverage["linear"].refused == 1
    qmodel = qs.convert(model, rules)
    assert_same(model, qmodel, batch_for(model, (2, 5)))


class Looping(BertOutput):
    """Visits the tokens one by one: its graph has as many nodes as the example has tokens."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        residual = torch.stack([input_tensor[:, index] for index in range(input_tensor.shape[1])], dim=1)
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


def test_a_graph_that_holds_for_one_shape_only_takes_no_quantizers() -> None:
    model = build("bert", "BertModel")
    model.encoder.layer[1].output.__class__ = Looping
    made = qs.plan(model)
    refusals = [refusal for refusal in made.refusals if refusal.layer == 1]
    assert {(r.path, r.operator, r.rule) for r in refusals} == {("encoder.layer.1.output", "add", "residual-add")}
    assert all("the graph holds only for the example's shape" in refusal.reason for refusal in refusals)
    assert made.coverage["residual add"].refused == 1
    qmodel = qs.convert(model)
    assert isinstance(qmodel.encoder.layer[1].output.dense, quant_nn.QuantLinear)
    for shape in ((2, 5), (1, 9)):
        assert_same(model, qmodel, batch_for(model, shape))


def test_chunked_feed_forward() -> None:
    model = build("bert", "BertModel", chunk_size_feed_forward=1)
    assert_same(model, qs.convert(model), batch_for(model, (2, 6)))


def test_labels_train_the_model() -> None:
    qmodel = qs.convert(build("bert", "BertForSequenceClassification")).train()
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.amax = 4.0
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.05)
    batch = batch_for(qmodel, (8, 6), labels=True)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = qmodel(**batch).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]


def test_save_pretrained_writes_plain_weights(tmp_path: Path) -> None:
    """Whoever takes ``quantization_config`` out of config.json has the float model."""
    model = build("bert", "BertForSequenceClassification")
    qs.convert(model).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config.pop("quantization_config")["quant_method"] == "qdq_surgery"
    (tmp_path / "config.json").write_text(json.dumps(config))
    again: PreTrainedModel = type(model).from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert not qs.quantizers(again)
    batch = batch_for(model, (2, 5))
    assert torch.equal(again(**batch).logits, model(**batch).logits)


def test_a_model_that_cannot_be_copied_is_converted_in_place() -> None:
    model = build("bert", "BertModel")
    model.lock = threading.Lock()
    with pytest.raises(qs.ModelError, match=r"cannot be copied \(TypeError: .*lock.*; pass inplace=True"):
        qs.convert(model)
    assert len(qs.quantizers(qs.convert(model, inplace=True))) == 40


@pytest.mark.parametrize("inplace", [False, True])
def test_what_was_made_in_inference_mode_can_be_trained(inplace: bool) -> None:
    model = build("bert", "BertForSequenceClassification", num_hidden_layers=1)
    batch = batch_for(model, (2, 5), labels=True)
    with torch.inference_mode():
        qmodel = qs.convert(model, inplace=inplace)
        qs.calibrate(qmodel, [batch])
        learned = qs.learn_ranges(qmodel)
    qmodel(**batch).loss.backward()
    assert all(each.grad is not None for each in (*learned, qmodel.classifier.weight))


def test_a_forward_that_passes_on_whatever_it_is_given() -> None:
    """As subclasses have it: the example is that of the class above."""

    class Mine(BertModel):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    model = Mine(build("bert", "BertModel").config).eval()
    qmodel = qs.convert(model)
    assert type(qmodel) is Mine
    assert_same(model, qmodel, batch_for(model, (2, 5)))
    assert "token_type_ids" in sample_inputs(qmodel, None, True)
