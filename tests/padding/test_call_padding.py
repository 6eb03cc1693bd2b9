"""Padding is not counted: whatever stands there, no range changes. By hand for BERT, by comparison for the rest."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, batch_for, build, kind_of
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.calibration.collect import Statistics, activation_quantizers
from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.range_choice import method_names
from qdq_surgery.padding.axes import Axis
from qdq_surgery.padding.axis_probe import Call, probe
from qdq_surgery.padding.call_padding import Padding, Turn
from qdq_surgery.padding.token_masks import texts_of, trimmed
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.spec import RuleSet

Batch = dict[str, Any]

#: No token of a batch from tests/architectures.py, which starts at 3; no padding id of any architecture either.
GARBAGE = 2


def coarse() -> RuleSet:
    """QDQBERT's rules with 256 bins: entropy and mse then take no time."""
    rules = qs.load_rules("qdqbert")
    spec = QuantSpec(calibrator=CalibratorSpec("histogram", num_bins=128))
    return dataclasses.replace(rules, specs={**rules.specs, "activation": spec})


def padded_batch(model: PreTrainedModel) -> Batch:
    """Four rows of 8, 6, 5 and 3 tokens; the columns 6 and 7 are padding in all but one."""
    batch: Batch = batch_for(model, (4, 8))
    batch["attention_mask"][:] = 1
    for row, length in ((0, 6), (1, 3), (3, 5)):
        batch["attention_mask"][row, ..., length:] = 0
    return batch


def with_garbage(batch: Batch, apart: int = 0) -> Batch:
    """Other ids in the padded places; ``apart`` places next to a token stay."""
    padded = batch["attention_mask"] == 0
    for _ in range(apart):
        padded = padded & functional.pad(padded[..., :-1], (1, 0), value=True)
    assert padded.any()
    return {**batch, "input_ids": torch.where(padded, GARBAGE, batch["input_ids"])}


def with_columns(batch: Batch, columns: int = 3) -> Batch:
    """More padding at the end."""
    return {name: functional.pad(value, (0, columns)) for name, value in batch.items()}


def with_padded_row(batch: Batch) -> Batch:
    """One more row, without a token."""
    more = {"input_ids": torch.full_like(batch["input_ids"][:1], GARBAGE)}
    return {name: torch.cat([value, more.get(name, torch.zeros_like(value[:1]))]) for name, value in batch.items()}


def assert_same(found: Statistics, wanted: Statistics) -> None:
    """The same histograms, to the bit: so the same ranges, whatever the method."""
    assert found.seen.keys() == wanted.seen.keys()
    assert wanted.seen
    for name, seen in wanted.seen.items():
        other = found.seen[name]
        assert seen.histogram is not None
        assert other.histogram is not None
        assert torch.equal(other.amax, seen.amax), name
        assert torch.equal(other.histogram.exponent, seen.histogram.exponent), name
        assert torch.equal(other.histogram.counts, seen.histogram.counts), name


def ranges(qmodel: nn.Module) -> dict[str, Tensor]:
    return {name: each.amax.clone() for name, each in qs.quantizers(qmodel).items() if each.amax is not None}


# Every architecture -------------------------------------------------------------------------------------------------

#: Their classes are made from RoBERTa's, or as BERT's are.
COPIES = ("xlm-roberta", "camembert", "electra")

HEADS: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (a.model_type, head, {})
        for a in ARCHITECTURES
        for head in a.heads()
        if a.model_type not in COPIES and kind_of(head) == "token"
    ),
    ("bert", "BertForMultipleChoice", {}),
    ("deberta-v2", "DebertaV2ForMultipleChoice", {}),
    ("bert", "BertForPreTraining", {}),
    ("mobilebert", "MobileBertModel", {"trigram_input": False}),
    ("albert", "AlbertModel", {"num_hidden_groups": 2, "inner_group_num": 2, "num_hidden_layers": 4}),
    ("deberta-v2", "DebertaV2Model", {"conv_kernel_size": 3, "conv_act": "gelu"}),
]


#: One layer holds every kind of quantizer; ModernBERT's second one has its local attention.
LAYERS = {"bert": 2, "modernbert": 2, "albert": 4}


@pytest.mark.parametrize(
    ("model_type", "head", "options"), HEADS, ids=[f"{head}{'-variant' if o else ''}" for _, head, o in HEADS]
)
def test_what_stands_in_padding_changes_no_statistic(model_type: str, head: str, options: dict[str, Any]) -> None:
    model = build(model_type, head, **{"num_hidden_layers": LAYERS.get(model_type, 1), **options})
    qmodel = qs.convert(model, coarse(), inplace=True)
    batch = padded_batch(model)
    # MobileBERT puts each token's neighbours into its embedding: the padding next to a token is seen there, in float.
    beside = int(model_type == "mobilebert" and model.config.trigram_input)
    if beside:
        with pytest.warns(UserWarning, match=rf"{head} lets padding into real tokens"):
            qs.collect(qmodel, [batch])
    wanted = qs.collect(qmodel, [batch])
    assert wanted.tokens == int(batch["attention_mask"].sum())
    assert_same(qs.collect(qmodel, [with_padded_row(with_columns(with_garbage(batch, apart=beside)))]), wanted)
    # What the comparisons see if padding is counted.
    whole = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    with pytest.raises(AssertionError):
        assert_same(qs.collect(qmodel, [whole]), wanted)


@functools.cache
def one_layer(model_type: str, head: str, **options: Any) -> PreTrainedModel:
    return qs.convert(build(model_type, head, num_hidden_layers=1, **options), coarse(), inplace=True)


@pytest.mark.parametrize(
    ("model_type", "head", "method"),
    [
        *(("bert", "BertModel", method) for method in method_names()),
        ("deberta-v2", "DebertaV2Model", "percentile"),
        ("bert", "BertForMultipleChoice", "percentile"),
    ],
)
def test_what_stands_in_padding_changes_no_range(model_type: str, head: str, method: str) -> None:
    qmodel = one_layer(model_type, head)
    batch = padded_batch(qmodel)
    qs.calibrate(qmodel, [batch], method)
    wanted = ranges(qmodel)
    assert wanted.keys() == qs.quantizers(qmodel).keys()
    for changed in (with_garbage(batch), with_columns(batch), with_padded_row(batch)):
        qs.calibrate(qmodel, [changed], method)
        for name, amax in ranges(qmodel).items():
            assert torch.equal(amax, wanted[name]), name


@pytest.fixture(scope="module")
def bert() -> PreTrainedModel:
    return qs.convert(build("bert", "BertModel"), coarse())


def test_a_batch_of_nothing_but_padding_changes_no_statistic(bert: PreTrainedModel) -> None:
    batch = padded_batch(bert)
    nothing = {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}
    wanted = qs.collect(bert, [batch])
    for batches in ([batch, nothing], [nothing, batch]):
        found = qs.collect(bert, batches)
        assert found.tokens == wanted.tokens
        assert_same(found, wanted)


@pytest.mark.parametrize("value", [1e9, math.inf, math.nan], ids=str)
def test_embeddings_of_padded_places_may_be_anything(bert: PreTrainedModel, value: float) -> None:
    batch: Batch = batch_for(bert, (4, 8), embeds=True)
    wanted = qs.collect(bert, [batch])
    embeds = batch["inputs_embeds"].clone()
    embeds[batch["attention_mask"] == 0] = value
    changed = {**batch, "inputs_embeds": embeds}
    if math.isfinite(value):
        assert_same(qs.collect(bert, [changed]), wanted)
    else:
        # In float, 0 times this is a NaN for the real tokens too: no range may come of it.
        with pytest.raises(CalibrationError, match=r"batch 0 gives a NaN at encoder\.layer\.0"):
            qs.collect(bert, [changed])


@pytest.mark.parametrize("model_type", ["bert", "deberta-v2", "modernbert"])
def test_padding_on_the_left(model_type: str) -> None:
    head = {"bert": "BertModel", "deberta-v2": "DebertaV2Model", "modernbert": "ModernBertModel"}[model_type]
    qmodel = one_layer(model_type, head)
    batch = padded_batch(qmodel)
    left = {name: value.flip(-1) for name, value in batch.items()}
    assert not left["attention_mask"][0, 0]
    wanted = qs.collect(qmodel, [left])
    assert wanted.tokens == int(batch["attention_mask"].sum())
    assert_same(qs.collect(qmodel, [with_garbage(left)]), wanted)
    assert_same(qs.collect(qmodel, [with_padded_row(left)]), wanted)


def test_holes_are_padding(bert: PreTrainedModel) -> None:
    batch = padded_batch(bert)
    batch["attention_mask"][2, 3] = 0
    wanted = qs.collect(bert, [batch])
    assert_same(qs.collect(bert, [with_garbage(batch)]), wanted)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.int32, torch.uint8], ids=str)
def test_a_mask_of_another_dtype_is_the_same_mask(bert: PreTrainedModel, dtype: torch.dtype) -> None:
    batch = padded_batch(bert)
    wanted = qs.collect(bert, [batch])
    found = qs.collect(bert, [{**batch, "attention_mask": batch["attention_mask"].to(dtype)}])
    assert (found.rows, found.tokens) == (wanted.rows, wanted.tokens)
    assert_same(found, wanted)


def test_a_mask_that_masks_nothing_counts_everything(bert: PreTrainedModel) -> None:
    batch = padded_batch(bert)
    ids = batch["input_ids"]
    wanted = qs.collect(bert, [{"input_ids": ids}])
    assert (wanted.rows, wanted.tokens) == (4, 32)
    for mask in (None, torch.ones_like(ids)):
        found = qs.collect(bert, [{"input_ids": ids, "attention_mask": mask}])
        assert (found.rows, found.tokens) == (4, 32)
        assert_same(found, wanted)


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(4, 8, 8),
        torch.ones(4, 1, 1, 8),
        torch.ones(4, 7),
        torch.ones(3, 8),
        torch.ones(8),
        torch.tensor(1),
        [[1] * 8] * 4,
    ],
    ids=["3-D", "4-D", "too-short", "too-few-rows", "1-D", "0-D", "list"],
)
def test_a_mask_of_another_shape_is_refused(bert: PreTrainedModel, mask: Any) -> None:
    batch = padded_batch(bert)
    with pytest.raises(CalibrationError, match=r"batch 1: .*attention_mask"):
        qs.collect(bert, [batch, {**batch, "attention_mask": mask}])


# A decoder -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def decoder() -> PreTrainedModel:
    model = build("bert", "BertLMHeadModel", is_decoder=True, add_cross_attention=True, num_hidden_layers=1)
    return qs.convert(model, coarse())


def decoder_batch(model: PreTrainedModel, memory: int = 5) -> Batch:
    batch: Batch = batch_for(model, (3, 6))
    batch["attention_mask"][:] = 1
    batch["attention_mask"][1, 2:] = 0
    batch["encoder_hidden_states"] = torch.randn(3, memory, 32, generator=torch.Generator().manual_seed(0))
    batch["encoder_attention_mask"] = torch.ones(3, memory, dtype=torch.long)
    batch["encoder_attention_mask"][2, 2:] = 0
    return batch


@pytest.mark.parametrize("masks", ["both", "tokens", "memory"])
def test_a_decoder_has_padding_on_both_sides(decoder: PreTrainedModel, masks: str) -> None:
    batch = decoder_batch(decoder)
    changed = dict(batch)
    if masks != "memory":
        changed["input_ids"] = with_garbage(batch)["input_ids"]
    if masks != "tokens":
        states = batch["encoder_hidden_states"].clone()
        states[batch["encoder_attention_mask"] == 0] = 99.0
        changed["encoder_hidden_states"] = states
    dropped = {"both": (), "tokens": ("encoder_attention_mask",), "memory": ("attention_mask",)}[masks]
    first, second = ({k: v for k, v in each.items() if k not in dropped} for each in (batch, changed))
    assert_same(qs.collect(decoder, [second]), qs.collect(decoder, [first]))


def test_the_memory_is_not_cut_where_the_tokens_are(decoder: PreTrainedModel) -> None:
    # As many memory places as token columns, of which the last is padding in every row.
    batch = decoder_batch(decoder, memory=6)
    batch["attention_mask"][:, 5:] = 0
    cut = {k: v if k.startswith("encoder_") else v[:, :5] for k, v in batch.items()}
    assert_same(qs.collect(decoder, [batch]), qs.collect(decoder, [cut]))
    assert trimmed(batch)["encoder_hidden_states"].shape == (3, 6, 32)


def test_a_memory_mask_of_another_shape_is_refused(decoder: PreTrainedModel) -> None:
    batch = {**decoder_batch(decoder), "encoder_attention_mask": torch.ones(3, 4)}
    with pytest.raises(CalibrationError, match=r"batch 0: encoder_attention_mask has the shape \(3, 4\), wanted"):
        qs.collect(decoder, [batch])


# What models ask of their lengths ------------------------------------------------------------------------------------


def test_chunks_without_padding_are_counted() -> None:
    plain, qmodel = one_layer("bert", "BertModel"), one_layer("bert", "BertModel", chunk_size_feed_forward=2)
    batch = {**padded_batch(plain), "attention_mask": torch.ones(4, 8, dtype=torch.long)}
    found, wanted = qs.collect(qmodel, [batch]), qs.collect(plain, [batch])
    for name, seen in wanted.seen.items():
        # Products of other shapes: float32 rounding.
        assert torch.allclose(found.seen[name].amax, seen.amax, rtol=1e-5, atol=0), name
        assert found.seen[name].histogram.total == seen.histogram.total, name  # type: ignore[union-attr]


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_padding_in_chunks_is_not_counted(chunk: int) -> None:
    plain, qmodel = one_layer("bert", "BertModel"), one_layer("bert", "BertModel", chunk_size_feed_forward=chunk)
    batch = padded_batch(qmodel)
    found, wanted = qs.collect(qmodel, [batch]), qs.collect(plain, [batch])
    assert_same(qs.collect(qmodel, [with_garbage(batch)]), found)
    for name, seen in wanted.seen.items():
        # Products of other shapes: float32 rounding.
        assert torch.allclose(found.seen[name].amax, seen.amax, rtol=1e-5, atol=0), name
        assert found.seen[name].histogram.total == seen.histogram.total, name  # type: ignore[union-attr]


def test_columns_are_left_out_only_where_chunks_allow_it() -> None:
    qmodel = one_layer("bert", "BertModel", chunk_size_feed_forward=4)
    batch = padded_batch(qmodel)
    batch["attention_mask"][:] = 1
    batch["attention_mask"][:, 7:] = 0  # the model takes 8 tokens, not 7
    with torch.no_grad():
        assert qmodel(**batch).last_hidden_state.shape == (4, 8, 32)
    assert qs.collect(qmodel, [batch]).tokens == 28


@pytest.mark.parametrize("positions", [6, 8])
def test_a_model_for_few_tokens(positions: int) -> None:
    qmodel = one_layer("bert", "BertModel", max_position_embeddings=positions)
    batch: Batch = batch_for(qmodel, (3, positions))
    wanted = qs.collect(qmodel, [batch])
    assert wanted.tokens == int(batch["attention_mask"].sum())
    assert_same(qs.collect(qmodel, [with_garbage(batch)]), wanted)


def test_positions_for_all_rows_at_once(bert: PreTrainedModel) -> None:
    batch = padded_batch(bert)
    wanted = qs.collect(bert, [batch])
    assert_same(qs.collect(bert, [{**batch, "position_ids": torch.arange(8)[None]}]), wanted)
    more = {**with_columns(batch), "position_ids": torch.arange(11)[None]}
    assert_same(qs.collect(bert, [more]), wanted)


# By hand, for BERT ---------------------------------------------------------------------------------------------------


def inputs_of(qmodel: PreTrainedModel, batch: Batch) -> dict[str, Tensor]:
    """What every activation quantizer is given in float, by a hook that knows nothing of calibration."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: found.update({name: inputs[0].detach().clone()})

    handles = [each.register_forward_pre_hook(hook(name)) for name, each in activation_quantizers(qmodel).items()]
    with qs.quantization_disabled(qmodel), torch.no_grad():
        qmodel(**batch)
    for handle in handles:
        handle.remove()
    return found


def valid_part(name: str, values: Tensor, mask: Tensor) -> Tensor:
    """Magnitudes of the real tokens in a BERT with 4 heads of 8, chosen row by row."""
    parts = []
    for row, length in enumerate(mask.sum(1).tolist()):
        each = values[row]
        if name.endswith(("matmul_q_input_quantizer", "matmul_v_input_quantizer")):  # (heads, tokens, 8)
            assert each.shape == (4, mask.shape[1], 8)
            each = each[:, :length, :]
        elif name.endswith("matmul_k_input_quantizer"):  # transposed: (heads, 8, tokens)
            assert each.shape == (4, 8, mask.shape[1])
            each = each[:, :, :length]
        elif name.endswith("matmul_a_input_quantizer"):  # (heads, tokens, tokens)
            assert each.shape == (4, mask.shape[1], mask.shape[1])
            each = each[:, :length, :length]
        else:
            assert each.shape in [(mask.shape[1], width) for width in (32, 48)]
            each = each[:length]
        parts.append(each.reshape(-1).abs())
    return torch.cat(parts)


def test_what_is_counted_is_what_a_loop_over_rows_finds(bert: PreTrainedModel) -> None:
    batch = padded_batch(bert)
    other: Batch = batch_for(bert, (2, 5))
    found = qs.collect(bert, [batch, other])
    seen: dict[str, list[Tensor]] = {}
    for each in (batch, other):
        for name, values in inputs_of(bert, trimmed(each)).items():
            seen.setdefault(name, []).append(valid_part(name, values, trimmed(each)["attention_mask"]))
    assert seen.keys() == found.seen.keys()
    assert len(seen) == 2 * 14
    for name, parts in seen.items():
        values = torch.cat(parts).double()
        made = found.seen[name]
        assert made.histogram is not None
        assert float(made.amax) == float(values.max()), name
        exponent = math.floor(math.log2(float(values.max()))) + 1
        assert int(made.histogram.exponent) == exponent, name
        # Float64 holds these quotients exactly: the divisor is a power of two.
        bins = (values / 2.0**exponent * 256).long()
        assert torch.equal(made.histogram.counts, torch.bincount(bins, minlength=256)), name


# Axes ----------------------------------------------------------------------------------------------------------------

HIDDEN = (Axis("batch"), Axis("tokens"), None)
HEADS_FIRST = (Axis("batch"), None, Axis("tokens"), None)
BERT_AXES = {
    "attention.self.query._input_quantizer": HIDDEN,
    "attention.self.key._input_quantizer": HIDDEN,
    "attention.self.value._input_quantizer": HIDDEN,
    "attention.self.matmul_q_input_quantizer": HEADS_FIRST,
    "attention.self.matmul_k_input_quantizer": (Axis("batch"), None, None, Axis("tokens")),
    "attention.self.matmul_v_input_quantizer": HEADS_FIRST,
    "attention.self.matmul_a_input_quantizer": (Axis("batch"), None, Axis("tokens"), Axis("tokens")),
    "attention.output.dense._input_quantizer": HIDDEN,
    "attention.output.add_local_input_quantizer": HIDDEN,
    "attention.output.add_residual_input_quantizer": HIDDEN,
    "intermediate.dense._input_quantizer": HIDDEN,
    "output.dense._input_quantizer": HIDDEN,
    "output.add_local_input_quantizer": HIDDEN,
    "output.add_residual_input_quantizer": HIDDEN,
}


def test_the_axes_of_bert(bert: PreTrainedModel) -> None:
    watched = activation_quantizers(bert)
    for each in watched.values():
        each._if_calib, each._if_quant = True, False
    calibrators = {name: each._calibrator for name, each in watched.items()}
    try:
        with torch.no_grad():
            batch = padded_batch(bert)
            found = probe(bert, watched, batch, texts_of(batch), holes=False)
    finally:
        for each in watched.values():
            each._if_calib, each._if_quant = False, True
    assert found.mixes is None
    assert found.calls == {
        f"encoder.layer.{i}.{name}": (Call(axes),) for i in range(2) for name, axes in BERT_AXES.items()
    }
    assert all(each._calibrator is calibrators[name] for name, each in watched.items())


class Fake(nn.Module):
    """A model of one quantizer, which is given what ``see`` makes of the ids, or several such things."""

    def __init__(self, see: Callable[[Tensor], Tensor | list[Tensor]]) -> None:
        super().__init__()
        self.probe_quantizer = TensorQuantizer(QuantDescriptor())
        self.probe_quantizer._if_calib, self.probe_quantizer._if_quant = True, False
        self._see = see

    def forward(self, input_ids: Tensor, **_: Any) -> None:
        seen = self._see(input_ids)
        for each in seen if isinstance(seen, list) else [seen]:
            self.probe_quantizer(each)


def fake_batch(batch: int = 3, tokens: int = 4, choices: int | None = None, masked: bool = True) -> Batch:
    shape = (batch, tokens) if choices is None else (batch, choices, tokens)
    mask = torch.ones(shape, dtype=torch.long)
    if masked:
        mask[0, ..., 2:] = 0
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}


def axes_of(see: Callable[[Tensor], Any], batch: Mapping[str, Any] | None = None) -> Any:
    model = Fake(see)
    named = {"probe_quantizer": model.probe_quantizer}
    batch = fake_batch() if batch is None else batch
    calls = probe(model, named, batch, texts_of(batch), holes=False).calls["probe_quantizer"]
    return calls if isinstance(calls, str) else [call.axes for call in calls]


BATCH, TOKENS = Axis("batch"), Axis("tokens")
TWELVE = Axis("batch", 12)


@pytest.mark.parametrize(
    ("see", "wanted"),
    [
        (lambda ids: torch.ones(*ids.shape, 32), [(BATCH, TOKENS, None)]),
        (lambda ids: torch.ones(ids.shape[1], ids.shape[0], 32), [(TOKENS, BATCH, None)]),
        (lambda ids: torch.ones(ids.shape[0] * 12, ids.shape[1], ids.shape[1]), [(TWELVE, TOKENS, TOKENS)]),
        (lambda ids: torch.ones(ids.numel(), 32), [(Axis("rows"), None)]),
        (lambda ids: torch.ones(ids.numel() * 4, 8), [(Axis("rows", 4), None)]),
        (lambda ids: torch.ones(ids.shape[0], 32), [(BATCH, None)]),
        # 7 and 2 are sizes of the batches that are compared: here they are a width, and stay.
        (lambda ids: torch.ones(*ids.shape, 7, 2), [(BATCH, TOKENS, None, None)]),
        (lambda _: torch.ones(16, 32), [(None, None)]),
        (lambda ids: torch.ones(ids.shape[1], 32), [(Axis("table", parts=((-1, 0),), side="start"), None)]),
        (lambda ids: torch.ones(2 * ids.shape[1] - 1, 32), [(Axis("table", 2, parts=((-1, -1),), side="start"), None)]),
        (lambda ids: [torch.ones(*ids.shape, 8), torch.ones(*ids.shape, 16)], [(BATCH, TOKENS, None)] * 2),
        (
            lambda ids: [torch.ones(*ids.shape, 8), torch.ones(ids.shape[0], 8, 8)],
            [(BATCH, TOKENS, None), (BATCH, None, None)],
        ),
        (lambda _: [], []),
    ],
    ids=[
        "hidden",
        "tokens-first",
        "heads-in-the-batch",
        "rows",
        "rows-times-heads",
        "pooled",
        "widths-like-sizes",
        "constant",
        "positions",
        "relative-positions",
        "two-calls",
        "two-layouts",
        "not-called",
    ],
)  # fmt: skip
def test_the_axes_of_other_layouts(see: Callable[[Tensor], Any], wanted: Any) -> None:
    assert axes_of(see) == wanted


@pytest.mark.parametrize(
    ("see", "words"),
    [
        (lambda ids: torch.ones(ids.shape[0], 2 * ids.shape[1] - 1), "follows neither the batch nor the length"),
        (lambda ids: torch.ones(ids.shape[0], 2 * ids.shape[1], 3), "follows neither the batch nor the length"),
        (lambda ids: [torch.ones(1)] * ids.shape[1] ** 2, "called 49 times for 7 tokens and 121 times for more"),
        (lambda ids: torch.ones(*ids.shape, *([1] * int(ids.shape[1] > 7))), "2 axes in one call and 3 in another"),
    ],
    ids=["relative", "twice-the-tokens", "calls", "axes"],
)
def test_what_cannot_be_told_is_an_error_only_where_there_is_padding(see: Callable[[Tensor], Any], words: str) -> None:
    model = Fake(see)
    found = axes_of(see)
    assert isinstance(found, str)
    assert words in found
    padding = Padding(model, {"probe_quantizer": model.probe_quantizer})
    batch = fake_batch(masked=False)
    padding.begin(batch)
    assert padding.place("probe_quantizer", Turn(), (3, 8)).invalid is None
    padding.begin(fake_batch())
    with pytest.raises(CalibrationError, match="probe_quantizer: padding cannot be told from text") as caught:
        padding.place("probe_quantizer", Turn(), (3, 8))
    assert words in str(caught.value)


def test_choices_are_rows() -> None:
    batch = fake_batch(choices=3)
    wanted = [(Axis("batch", 3), TOKENS, None)]
    assert axes_of(lambda ids: torch.ones(ids.shape[:2].numel(), ids.shape[2], 8), batch) == wanted


def test_masks_spell_out_what_is_padded() -> None:
    def invalid(see: Callable[[Tensor], Tensor]) -> Tensor:
        model = Fake(see)
        padding = Padding(model, {"probe_quantizer": model.probe_quantizer})
        mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
        batch = {"input_ids": torch.ones_like(mask), "attention_mask": mask}
        padding.begin(batch)
        shape = see(batch["input_ids"]).shape
        found = padding.place("probe_quantizer", Turn(), shape).invalid
        assert found is not None
        return found.expand(shape)

    padded = torch.tensor([[False, False, True], [True, True, True]])
    assert torch.equal(invalid(lambda ids: torch.ones(*ids.shape, 4)), padded[:, :, None].expand(2, 3, 4))
    assert torch.equal(invalid(lambda ids: torch.ones(ids.numel(), 4)), padded.reshape(6, 1).expand(6, 4))
    assert torch.equal(invalid(lambda ids: torch.ones(ids.shape[0], 4)), padded.all(1)[:, None].expand(2, 4))
    assert torch.equal(
        invalid(lambda ids: torch.ones(ids.shape[1], ids.shape[0], 4)), padded.T[:, :, None].expand(3, 2, 4)
    )
    # Two heads to a row; a score counts if neither its query nor its key is padding.
    scores = padded[:, :, None] | padded[:, None, :]
    assert torch.equal(
        invalid(lambda ids: torch.ones(2 * ids.shape[0], ids.shape[1], ids.shape[1])), scores.repeat_interleave(2, 0)
    )


# Columns -------------------------------------------------------------------------------------------------------------


def test_trimmed_leaves_out_columns_that_no_row_uses() -> None:
    mask = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
    batch = {
        "input_ids": torch.arange(10).reshape(2, 5),
        "attention_mask": mask,
        "inputs_embeds": torch.ones(2, 5, 7),
        "labels": torch.zeros(2),
        "use_cache": False,
    }
    found = trimmed(batch)
    assert found["input_ids"].tolist() == [[0, 1, 2], [5, 6, 7]]
    assert found["attention_mask"].tolist() == [[1, 0, 1], [0, 1, 0]]
    assert found["inputs_embeds"].shape == (2, 3, 7)
    assert found["labels"] is batch["labels"]
    assert found["use_cache"] is False
    assert batch["input_ids"].shape == (2, 5)


@pytest.mark.parametrize(
    "mask",
    [None, torch.ones(2, 5), torch.zeros(2, 5), torch.ones(0, 5), torch.ones(5), torch.eye(5)[[0, 4]]],
    ids=["none", "all", "nothing", "no-rows", "1-D", "last-column"],
)
def test_trimmed_leaves_the_rest_alone(mask: Tensor | None) -> None:
    batch = {"input_ids": torch.ones(2, 5), "attention_mask": mask}
    found = trimmed(batch)
    assert found == batch
    assert found is not batch


def test_padding_enters_no_range_of_a_channel() -> None:
    """One range for each hidden unit: those of both texts alone, whatever stands in the padding."""
    rules = qs.load_rules("linear-only")
    channels = QuantSpec(axis=2, calibrator=CalibratorSpec("max"))
    qmodel = qs.convert(
        build("bert", "BertModel"), dataclasses.replace(rules, specs={**rules.specs, "activation": channels})
    )
    short, long = torch.tensor([[5, 6, 7]]), torch.tensor([[8, 9, 10, 11, 12, 13]])

    def ranges(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: seen.amax for name, seen in qs.collect(qmodel, batches, histograms=False).seen.items()}

    mask = torch.tensor([[1, 1, 1, 0, 0, 0], [1] * 6])
    padded = [
        ranges(
            [{"input_ids": torch.cat([torch.cat([short, torch.full((1, 3), junk)], 1), long]), "attention_mask": mask}]
        )
        for junk in (20, 40)
    ]
    wanted = ranges([{"input_ids": short}, {"input_ids": long}])
    assert {amax.shape[:2] for amax in wanted.values()} == {(1, 1)}
    for name, amax in wanted.items():
        assert torch.equal(padded[0][name], padded[1][name]), name
        # Products of another number of rows are rounded otherwise.
        assert torch.allclose(padded[0][name], amax, rtol=1e-5, atol=0), name
