"""From a model to a graph: the axes that stay open, the outputs, what is refused, and what else runs meanwhile."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import batch_for
from torch import nn
from transformers import PreTrainedModel

import qdq_surgery as qs

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from exported import calibrated, inputs_for, two_towers

from qdq_surgery.export.onnx_trace import trace
from qdq_surgery.export.shared_copy import twin
from qdq_surgery.hf.config_facts import without_ffn_chunking
from qdq_surgery.hf.example_inputs import sample_inputs
from qdq_surgery.quantize.export_node import FAKE_QUANT, tag


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return calibrated(num_hidden_layers=1)


def axes(model: PreTrainedModel, inputs: dict[str, Any], dynamic: bool = True) -> dict[str, list[int | str]]:
    """The shapes of a traced graph's inputs and outputs."""
    graph = trace(model, inputs, 20, dynamic).model.graph
    return {
        value.name: [size if isinstance(size, int) else str(size.value) for size in value.shape]
        for value in (*graph.inputs, *graph.outputs)
    }


# --- open axes ----------------------------------------------------------------------------------------------------


def ids_and_a_mask_of_scores(model: PreTrainedModel) -> dict[str, Any]:
    more = {"attention_mask": torch.zeros(2, 1, 9, 9), "position_ids": torch.arange(9).repeat(2, 1)}
    return {**inputs_for(model, (2, 9)), **more}


def embeddings_and_positions_that_broadcast(model: PreTrainedModel) -> dict[str, Any]:
    made = batch_for(model, (2, 9), embeds=True)
    return {**made, "attention_mask": made["attention_mask"].float(), "position_ids": torch.arange(9)[None]}


TOKENS: list[int | str] = ["batch", "sequence"]


@pytest.mark.parametrize(
    ("make", "special"),
    [
        (ids_and_a_mask_of_scores, {"attention_mask": ["batch", 1, "sequence", "sequence"]}),
        (
            embeddings_and_positions_that_broadcast,
            {"inputs_embeds": ["batch", "sequence", 32], "position_ids": [1, "sequence"]},
        ),
    ],
)
def test_batch_and_sequence_stay_open(
    make: Callable[[PreTrainedModel], dict[str, Any]], special: dict[str, Any], bert: PreTrainedModel
) -> None:
    inputs = make(bert)
    assert axes(bert, inputs) == {
        **dict.fromkeys(inputs, TOKENS),
        **special,
        "last_hidden_state": ["batch", "sequence", 32],
        "pooler_output": ["batch", 32],
    }


@pytest.mark.slow
def test_choices_stay_open() -> None:
    model = calibrated(head="BertForMultipleChoice", num_hidden_layers=1)
    found = axes(model, sample_inputs(model, None, True))
    assert found["input_ids"] == found["attention_mask"] == ["batch", "choices", "sequence"]
    assert found["logits"] == ["batch", "choices"]


@pytest.mark.slow
def test_a_decoder_that_looks_at_an_encoder() -> None:
    model = calibrated(head="BertLMHeadModel", num_hidden_layers=1, is_decoder=True, add_cross_attention=True)
    # As in tests/test_onnx_export.py.
    inputs = {**inputs_for(model, (2, 9)), "encoder_attention_mask": torch.ones(2, 6, dtype=torch.long)}
    found = axes(model, inputs)
    other = "sequence_of_encoder_hidden_states"
    assert found["encoder_hidden_states"] == ["batch", other, 32]
    assert found["encoder_attention_mask"] == ["batch", other]
    assert found["logits"] == ["batch", "sequence", 60]
    assert "use_cache" not in found


def test_closed_shapes(bert: PreTrainedModel) -> None:
    found = axes(bert, inputs_for(bert, (1, 9)), dynamic=False)
    assert found["input_ids"] == [1, 9]
    assert found["last_hidden_state"] == [1, 9, 32]


@pytest.mark.slow
def test_no_axis_has_the_tracers_name(bert: PreTrainedModel) -> None:
    graph = trace(bert, sample_inputs(bert, None, True), 20, True).model.graph
    sizes = [size for node in graph for value in node.outputs for size in value.shape or ()]
    names = Counter(size.value for size in sizes if not isinstance(size, int) and size.value is not None)
    assert names["batch"] > 10
    assert all(set(name.replace("batch", "").replace("sequence", "")) <= set("*+-/(), 0123456789") for name in names)


@pytest.mark.slow
def test_an_example_of_numbers_in_the_config() -> None:
    """None is baked in where it is also a width, a head count or a vocabulary."""
    sizes = {"num_attention_heads": 3, "hidden_size": 63, "intermediate_size": 3, "vocab_size": 63}
    model = calibrated(num_hidden_layers=1, max_position_embeddings=100, **sizes)
    assert axes(model, inputs_for(model, (3, 63)))["last_hidden_state"] == ["batch", "sequence", 63]


# --- what is in the graph -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_each_quantizer_leaves_its_name(bert: PreTrainedModel) -> None:
    traced = trace(bert, sample_inputs(bert, None, True), 20, True)
    left = [node.attributes["quantizer"].as_string() for node in traced.model.graph if node.op_type == FAKE_QUANT]
    assert sorted(left) == sorted(qs.quantizers(bert))
    assert traced.outputs == ("last_hidden_state", "pooler_output")
    assert traced.output_class == "transformers.modeling_outputs.BaseModelOutputWithPoolingAndCrossAttentions"
    weights = {name for name, _ in bert.named_parameters() if name.endswith("weight") and "Norm" not in name}
    assert weights <= set(traced.model.graph.initializers)  # under their own names


# --- refusals -----------------------------------------------------------------------------------------------------


def message(call: Callable[[], Any], kind: type[Exception] = qs.ExportError) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ({"input_ids": torch.full((2, 9), 999)}, "IndexError: index out of range in self"),
        ({"input_ids": torch.full((2, 99), 3)}, "RuntimeError: The expanded size of the tensor (99)"),
        ({}, "ValueError: You must specify exactly one of input_ids or inputs_embeds"),
    ],
)
def test_inputs_that_the_model_does_not_take(inputs: dict[str, Any], reason: str, bert: PreTrainedModel) -> None:
    said = message(lambda: trace(bert, inputs, 20, True), qs.ModelError)
    assert said.startswith(f"BertModel does not run on the example inputs ({', '.join(inputs)}): {reason}")
    assert said.endswith("; pass example_inputs= that it takes")


def test_tuples_for_outputs(bert: PreTrainedModel) -> None:
    inputs = {**inputs_for(bert, (2, 9)), "return_dict": False}
    assert "returned a tuple, no Hugging Face output; set return_dict=True" in message(
        lambda: trace(bert, inputs, 20, False)
    )


def test_a_cache_among_the_outputs() -> None:
    model = calibrated(head="BertLMHeadModel", num_hidden_layers=1, is_decoder=True)
    inputs = {**batch_for(model, (2, 9)), "use_cache": True}
    assert message(lambda: trace(model, inputs, 20, True)).endswith("DynamicCache; call it with use_cache=False")


@pytest.mark.slow
def test_of_two_towers_the_embeddings_and_scores_are_outputs() -> None:
    qmodel, inputs = two_towers()
    with torch.no_grad():
        assert qmodel(**inputs).text_model_output.last_hidden_state.shape == (2, 9, 32)
    found = trace(qmodel, inputs, 20, True)
    assert found.outputs == ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds")


class Branching(nn.Module):
    """Something that no graph can hold: a decision on values."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        made = self.inner(*args, **kwargs)
        return made * 2 if bool(made.sum() > 0) else made


def test_a_model_that_cannot_be_traced(bert: PreTrainedModel) -> None:
    model = twin(bert)
    model.embeddings = Branching(model.embeddings)
    said = message(lambda: trace(model, inputs_for(model, (2, 9)), 20, True))
    assert said.startswith("BertModel cannot be traced: ")
    assert "data-dependent" in said
    assert len(said) < 600
    assert "\n" not in said
    assert tag(next(iter(qs.quantizers(model).values())), torch.ones(1)) is None


def test_sdpa_does_not_bypass_the_quantizers(bert: PreTrainedModel) -> None:
    model = twin(bert)
    model.config._attn_implementation = "sdpa"
    try:
        with pytest.raises(qs.AttentionBypassError):
            trace(model, inputs_for(model, (2, 9)), 20, True)
    finally:
        model.config._attn_implementation = bert.config._attn_implementation


# --- the example --------------------------------------------------------------------------------------------------


def test_a_single_row_is_doubled(bert: PreTrainedModel) -> None:
    made = sample_inputs(bert, batch_for(bert, (1, 9)), True)
    assert {tuple(value.shape) for value in made.values()} == {(2, 9)}
    assert torch.equal(made["input_ids"][0], made["input_ids"][1])
    assert {tuple(value.shape) for value in sample_inputs(bert, batch_for(bert, (1, 9)), False).values()} == {(1, 9)}
    mixed = sample_inputs(bert, embeddings_and_positions_that_broadcast(bert), True)
    assert mixed["position_ids"].shape == (1, 9)


def test_a_single_token(bert: PreTrainedModel) -> None:
    said = message(lambda: sample_inputs(bert, batch_for(bert, (2, 1)), True))
    assert said.startswith("example_inputs['input_ids'] has the shape (2, 1)")
    assert said.endswith("give an example of two tokens or more, or dynamic=False")
    assert sample_inputs(bert, batch_for(bert, (2, 1)), False)["input_ids"].shape == (2, 1)


def test_the_example_from_the_config(bert: PreTrainedModel) -> None:
    made = sample_inputs(bert, None, True)
    assert set(made) == {"input_ids", "attention_mask", "token_type_ids"}
    assert set(made["token_type_ids"].flatten().tolist()) == {0, 1}
    assert made["attention_mask"].min() == 0
    distilbert = calibrated("distilbert")
    assert set(sample_inputs(distilbert, None, True)) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("scores", [(2, 1, 9, 9), (2, 4, 9, 9)])
def test_a_mask_of_scores_is_not_short(scores: tuple[int, ...], bert: PreTrainedModel) -> None:
    inputs = {"input_ids": batch_for(bert, (2, 9))["input_ids"], "attention_mask": torch.zeros(scores)}
    assert sample_inputs(bert, inputs, True)["attention_mask"].shape == scores


# --- chunks and twins ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_chunks_are_one() -> None:
    model = calibrated(num_hidden_layers=1, chunk_size_feed_forward=3)  # as in tests/test_onnx_export.py
    layer = model.encoder.layer[0]
    with without_ffn_chunking(model):
        assert layer.chunk_size_feed_forward == 0
    assert layer.chunk_size_feed_forward == 3
    assert axes(model, sample_inputs(model, None, True))["last_hidden_state"] == ["batch", "sequence", 32]
    assert layer.chunk_size_feed_forward == 3
    with pytest.raises(RuntimeError, match="in the middle"), without_ffn_chunking(model):
        raise RuntimeError("in the middle")
    assert layer.chunk_size_feed_forward == 3


def test_a_twin_shares_all_tensors_and_no_module(bert: PreTrainedModel) -> None:
    other = twin(bert)
    for mine, its in zip(bert.parameters(), other.parameters(), strict=True):
        assert mine is its
    for mine, its in zip(bert.buffers(), other.buffers(), strict=True):
        assert mine is its
    assert not set(bert.modules()) & set(other.modules())
    assert set(qs.quantizers(other)) == set(qs.quantizers(bert))
    with torch.no_grad():
        batch = batch_for(bert, (2, 9))
        assert torch.equal(other(**batch).last_hidden_state, bert(**batch).last_hidden_state)


def test_a_twin_on_another_device() -> None:
    model = calibrated(head="BertForMaskedLM", num_hidden_layers=1)
    qs.learn_ranges(model)
    model.cls.predictions.decoder.weight.requires_grad_(False)
    other = twin(model, "meta")
    assert {tensor.device.type for tensor in (*other.parameters(), *other.buffers())} == {"meta"}
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"cpu"}
    assert {name: each.requires_grad for name, each in model.named_parameters()} == {
        name: each.requires_grad for name, each in other.named_parameters()
    }
    assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight


def test_a_tied_weight_stays_tied() -> None:
    model = calibrated(head="BertForMaskedLM", num_hidden_layers=1)
    other = twin(model)
    assert other.cls.predictions.decoder.weight is other.bert.embeddings.word_embeddings.weight


# --- threads ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.traces
def test_models_run_meanwhile(bert: PreTrainedModel) -> None:
    """torch says to the whole process that it is exporting; quantizers outside of the thread that traces go on."""
    batch, made, outputs = batch_for(bert, (2, 9)), list[Any](), list[torch.Tensor]()
    with torch.no_grad():
        wanted = bert(**batch).last_hidden_state
        for _ in range(10):  # on a busy machine this thread has not run often by the end of the first
            traced = threading.Thread(
                target=lambda: made.append(trace(twin(bert), inputs_for(bert, (2, 9)), 20, False))
            )
            traced.start()
            while traced.is_alive():
                outputs.append(bert(**batch).last_hidden_state)
            traced.join()
            if len(outputs) > 5:
                break
    assert len(outputs) > 5
    assert all(torch.equal(output, wanted) for output in outputs)
    assert sum(node.op_type == FAKE_QUANT for node in made[0].model.graph) == 20
