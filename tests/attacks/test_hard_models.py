"""Models, calls and options that once broke a conversion: each must be exact, or be refused in words."""

from __future__ import annotations

import copy
import functools
import pickle
import types
from typing import Any

import pytest
import torch
from architectures import batch_for, build, tensors_of
from comparing import assert_same
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, BertConfig, BertModel, EncoderDecoderConfig, EncoderDecoderModel
from transformers.models.bert.modeling_bert import BertOutput

import qdq_surgery as qs
from qdq_surgery.surgery import quantized_forward

TINY = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 60}


def test_a_block_that_is_called_more_than_once_is_quantized_once() -> None:
    model = build("bert", "BertModel", chunk_size_feed_forward=1)
    qmodel = qs.convert(model)
    assert len(qs.quantizers(qmodel)) == 40
    assert qs.plan(model).coverage["residual add"].quantized == 4
    assert_same(model, qmodel, batch_for(model, (2, 6)))


@pytest.mark.parametrize("chunk", [2, 4])
def test_chunks_of_a_fixed_size(chunk: int) -> None:
    model = build("bert", "BertModel", chunk_size_feed_forward=chunk)
    qmodel = qs.convert(model)
    assert len(qs.quantizers(qmodel)) == 40
    for length in (chunk, 3 * chunk):
        assert_same(model, qmodel, batch_for(model, (2, length)))
    # The user's own example, of a length that one less does not divide.
    assert len(qs.quantizers(qs.convert(model, example_inputs=batch_for(model, (2, 2 * chunk))))) == 40


def test_a_changed_number_of_chunks_is_noticed() -> None:
    model = build("albert", "AlbertModel")
    qmodel = qs.convert(model)
    for each in (model, qmodel):
        each.encoder.albert_layer_groups[0].albert_layers[0].chunk_size_feed_forward = 3
    for length in (9, 3, 6, 9):
        assert_same(model, qmodel, batch_for(model, (2, length)))


def test_states_as_wide_as_they_are_long() -> None:
    model = build("bert", "BertModel")
    qmodel = qs.convert(model, example_inputs={"inputs_embeds": torch.randn(2, 32, 32)})
    assert_same(model, qmodel, batch_for(model, (2, 5), embeds=True))
    assert len(qs.quantizers(qs.convert(model, example_inputs={"input_ids": torch.ones(1, 1, dtype=torch.long)}))) == 40


def test_a_layer_that_stands_twice_is_one_layer() -> None:
    model = build("bert", "BertModel")
    model.encoder.layer[1] = model.encoder.layer[0]
    qmodel = qs.convert(model)
    assert len(qs.quantizers(qmodel)) == 20
    assert qmodel.encoder.layer[1] is qmodel.encoder.layer[0]
    assert_same(model, qmodel, batch_for(model, (2, 5)))


@pytest.mark.parametrize("rules", ["qdqbert", "linear-only"])
def test_a_linear_that_stands_twice_is_one_linear(rules: str) -> None:
    model = build("bert", "BertModel")
    model.encoder.layer[1].output.dense = model.encoder.layer[0].output.dense
    model.encoder.layer[1].attention.self.query = model.encoder.layer[0].attention.self.query
    qmodel = qs.convert(model, rules)
    assert len(qs.quantizers(qmodel)) == {"qdqbert": 36, "linear-only": 20}[rules]
    assert_same(model, qmodel, batch_for(model, (2, 5)))


def test_linears_in_a_list_are_no_encoder_layers() -> None:
    class Tagger(BertModel):
        def __init__(self, config: BertConfig) -> None:
            super().__init__(config)
            self.heads = nn.ModuleList([nn.Linear(config.hidden_size, 2) for _ in range(3)])
            self.dropouts = nn.ModuleList([nn.Dropout(0.1) for _ in range(5)])

        def forward(self, **inputs: Any) -> Any:
            states = super().forward(**inputs).last_hidden_state
            return torch.cat([head(drop(states)) for head, drop in zip(self.heads, self.dropouts, strict=False)], -1)

    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=60)
    model = Tagger._from_config(config, attn_implementation="eager").eval()
    qmodel = qs.convert(model, example_inputs=batch_for(model, (2, 5)))
    assert len(qs.quantizers(qmodel)) == 40
    listed = {refusal.path for refusal in qs.plan(model, example_inputs=batch_for(model, (2, 5))).refusals}
    assert {"heads.0", "heads.1", "heads.2"} <= listed


def test_an_encoder_decoder_is_quantized_in_both_halves() -> None:
    options = {**TINY, "num_hidden_layers": 2}
    config = EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**options), BertConfig(**options))
    model = EncoderDecoderModel._from_config(config, attn_implementation="eager").eval()
    ids = torch.randint(3, 60, (2, 6))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": ids[:, :4]}
    qmodel = qs.convert(model, example_inputs=batch)
    assert len(qs.quantizers(qmodel)) == 2 * 20 + 2 * 34
    with qs.quantization_disabled(qmodel):
        assert torch.equal(qmodel(**batch).logits, model(**batch).logits)


def test_a_forward_of_its_own_is_refused() -> None:
    model = build("bert", "BertModel")
    block = model.encoder.layer[0].output
    block.forward = functools.partial(type(block).forward, block)
    with pytest.raises(qs.MatchError, match=r"layer.0.output of BertModel has no graph: .* finds 5 matches of 6 or 10"):
        qs.convert(model)
    layer = build("bert", "BertModel")
    layer.encoder.layer[0].forward = functools.partial(type(layer.encoder.layer[0]).forward, layer.encoder.layer[0])
    with pytest.raises(
        qs.MatchError, match=r"encoder.layer.0 of BertModel has no graph: this BertLayer has a forward of its own"
    ):
        qs.convert(layer)


@pytest.mark.parametrize("place", ["", "encoder"])
def test_a_function_around_the_originals_layers_is_refused(place: str) -> None:
    model = build("bert", "BertModel")
    module = model.get_submodule(place)
    original = module.forward
    module.forward = functools.wraps(original)(lambda *args, **kwargs: original(*args, **kwargs))
    for call in (qs.plan, qs.convert):
        with pytest.raises(qs.ModelError, match="has a forward of its own, set on the instance"):
            call(model)
    module.forward = types.MethodType(type(module).forward, module)  # as accelerate's: a copy can have it, too
    assert len(qs.quantizers(qs.convert(model))) == len(qs.quantizers(qs.convert(build("bert", "BertModel"))))


def test_a_compiled_module_is_looked_at_not_run() -> None:
    model = build("bert", "BertModel")
    model.encoder.layer[0].compile(backend="eager")
    fired: list[int] = []
    handle = model.encoder.layer[0].register_forward_hook(lambda *_: fired.append(1))
    qs.plan(model)
    assert fired == []
    handle.remove()
    qmodel = qs.convert(model)
    assert len(qs.quantizers(qmodel)) == 40
    qmodel.encoder.layer[0].output.compile(backend="eager")
    again = pickle.loads(pickle.dumps(copy.deepcopy(qmodel)))
    assert len(qs.quantizers(again)) == 40


def test_a_bias_is_no_residual() -> None:
    """DeBERTa (v1) adds biases to its queries and values after the linear: nothing of the residual stream."""
    options = {**TINY, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = AutoModel.from_config(AutoConfig.for_model("deberta", **options)).eval()
    made = qs.plan(model)
    assert made.coverage["residual add"].found == made.coverage["residual add"].quantized == 4
    assert {site.owner.rpartition(".")[2] for site in made.sites if site.rule == "residual-add"} == {"output"}


def test_a_model_that_changes_itself_is_refused() -> None:
    """BigBird exchanges its attention when the input is short."""
    options = {**TINY, "num_hidden_layers": 1}
    model = AutoModel.from_config(AutoConfig.for_model("big_bird", **options, pad_token_id=0)).eval()
    with pytest.raises(qs.ModelError, match=r"BigBirdModel changes its own modules while it runs: 'encoder.layer.0"):
        qs.convert(model)
    assert not qs.quantizers(model)


# --- blocks whose graphs depend on more than tensors


class Custom(BertOutput):
    """A residual add behind something that a recorder could miss; ``twist`` says what."""

    twist: Any = None

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        hidden_states = self.dropout(self.dense(hidden_states))
        return self.LayerNorm(hidden_states + self.twist_of(input_tensor))

    def twist_of(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ByList(Custom):
    def twist_of(self, x: Tensor) -> Tensor:
        return x * self.twist[0]


class ByFunction(Custom):
    def twist_of(self, x: Tensor) -> Tensor:
        return self.twist(x)


class InTraining(Custom):
    def twist_of(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return torch.cat([x[:, k : k + 1] * (1 + k) for k in range(x.shape[1])], dim=1)


class Rounded(Custom):
    def twist_of(self, x: Tensor) -> Tensor:
        return x * round(x.shape[1] / 3) + int(x.shape[1] / 2)


def twisted(cls: type[Custom], *twists: Any) -> Any:
    model = build("bert", "BertModel")
    for layer, twist in zip(model.encoder.layer, twists, strict=True):
        layer.output.__class__ = cls
        layer.output.twist = twist
    return model


@pytest.mark.parametrize(
    ("cls", "twists"),
    [
        (ByList, ([1.0, 2.0], [3.0, 2.0])),
        (ByFunction, (torch.tanh, torch.relu)),
        (ByFunction, (torch.nn.functional.gelu, torch.abs)),
    ],
)
def test_layers_that_read_other_things_are_not_alike(cls: type[Custom], twists: tuple[Any, Any]) -> None:
    model = twisted(cls, *twists)
    qmodel = qs.convert(model)
    assert_same(model, qmodel, batch_for(model, (2, 5)))
    for each in (model, qmodel):
        each.encoder.layer[0].output.twist = twists[1]
    assert_same(model, qmodel, batch_for(model, (2, 5)))


def test_a_shape_that_is_baked_in_training_only_is_refused() -> None:
    with pytest.raises(qs.TraceError, match=r"encoder.layer.0.output, in training mode: the graph holds only for"):
        qs.convert(twisted(InTraining, None, None))


def test_rounded_sizes_are_decisions() -> None:
    model = twisted(Rounded, None, None)
    made = qs.plan(model)
    assert {r.path for r in made.refusals if "holds only for" in r.reason} == {
        f"encoder.layer.{i}.output" for i in range(2)
    }
    qmodel = qs.convert(model)
    for shape in ((2, 5), (2, 9), (3, 4)):
        assert_same(model, qmodel, batch_for(model, shape))


def test_a_decision_that_changes_half_way_costs_nothing() -> None:
    """DeBERTa (v1) compares the length with its largest distance, behind its first linear."""
    options = {**TINY, "num_hidden_layers": 1}
    config = AutoConfig.for_model(
        "deberta",
        **options,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
        max_relative_positions=8,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    model = AutoModel.from_config(config).eval()
    qmodel = qs.convert(model)
    for training in (True, False):
        model.train(training)
        qmodel.train(training)
        for length in (5, 20, 5, 20):
            assert_same(model, qmodel, batch_for(model, (2, length)))
    # Training with gradients goes back and forth between lengths, too.
    for length in (5, 20, 6, 21):
        qmodel(**batch_for(model, (2, length))).last_hidden_state.sum().backward()
    # A batch is counted once, whatever its length.
    calls: list[int] = []
    qmodel.eval()
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.enable_calib()
        quantizer.disable_quant()
        quantizer._calibrator = Counter(calls)
    with torch.no_grad():
        for length in (5, 20, 5):
            before = sum(q._calibrator.count for q in qs.quantizers(qmodel).values())
            qmodel(**batch_for(model, (2, length)))
            after = sum(q._calibrator.count for q in qs.quantizers(qmodel).values())
            calls.append(after - before)
    assert len(set(calls)) == 1


class Counter:
    """A calibrator that counts."""

    def __init__(self, _: list[int]) -> None:
        self.count = 0

    def collect(self, _: Tensor) -> None:
        self.count += 1


def test_any_number_of_calls_is_remembered_in_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantized_forward, "_MAX_GRAPHS", 8)
    model = build("mpnet", "MPNetModel")
    qmodel = qs.convert(model)
    block = qmodel.encoder.layer[0].attention.attn
    states = torch.randn(1, 3, 32)
    with torch.no_grad():
        for number in range(20):
            block(states, unused=number)
    # Two layers that are alike share what they remember: 8 kinds of calls for each.
    assert len(block._qdq_forward.variants.found) == 16
    assert tensors_of(qmodel(**batch_for(model, (2, 4))))
