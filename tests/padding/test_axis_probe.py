"""Ranges of padded batches are those of the same texts one by one, without padding: brute force, of many models.

Two truths. Each text alone, without padding, says what is to be counted, but for the rounding of matrix products with
another number of rows. And the values of the padded run itself, picked row by row by the true lengths, say it to the
bit.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.calibration.collect import Statistics, activation_quantizers
from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.histogram import Histogram
from qdq_surgery.padding.axis_probe import probe
from qdq_surgery.padding.token_masks import texts_of
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.spec import RuleSet

Batch = dict[str, Tensor]

#: No token of a batch, which start at 5.
GARBAGE = 2

TINY: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}

#: Rows, and lengths of texts: no other axis of these models has them, so that a length alone tells the axis.
ROWS, TOKENS, OTHER = 4, 12, 17
LENGTHS = {"attention_mask": (12, 5, 9, 2), "other": (3, 17, 6, 11)}


def coarse(name: str) -> RuleSet:
    """256 bins."""
    rules = qs.load_rules(name)
    spec = QuantSpec(calibrator=CalibratorSpec("histogram", num_bins=128))
    return dataclasses.replace(rules, specs={**rules.specs, "activation": spec})


def spread(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embedding" not in name:
                parameter.mul_(4.0)
    return model.eval()


def ids(lengths: tuple[int, ...], seed: int, high: int = 55) -> tuple[Tensor, Tensor]:
    size = (len(lengths), max(lengths))
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    made = torch.randint(5, high, size, generator=torch.Generator().manual_seed(seed))
    return made * mask, mask


@dataclass
class Case:
    """A model, and what goes with each mask.

    Attributes:
        beside: Places in the same axis after the tokens of the first text, that are no text's or the second one's.
    """

    make: Callable[[], PreTrainedModel]
    batch: Callable[[int], Batch]
    texts: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"attention_mask": ("input_ids",)})
    beside: int = 0
    rules: str = "qdqbert"

    def alone(self, batch: Batch, row: int) -> Batch:
        """One row without its padding and without masks."""
        made = {name: value[row : row + 1] for name, value in batch.items()}
        for mask, names in self.texts.items():
            length = int(batch[mask][row].sum())
            made.update({name: made[name][:, :length] for name in names})
        return {name: value for name, value in made.items() if name not in self.texts}


def one_text(seed: int) -> Batch:
    return dict(zip(("input_ids", "attention_mask"), ids(LENGTHS["attention_mask"], seed), strict=True))


def two_texts(seed: int, second: str, mask: str, lengths: tuple[int, ...] = LENGTHS["other"]) -> Batch:
    other, masked = ids(lengths, seed + 50)
    return {**one_text(seed), second: other, mask: masked}


# Models --------------------------------------------------------------------------------------------------------------


class Shared(BertPreTrainedModel):  # type: ignore[misc]
    """A bi-encoder: one tower, called twice."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.query = BertModel(config, add_pooling_layer=False)
        self.passage = self.other()
        self.post_init()

    def other(self) -> nn.Module:
        return self.query

    def forward(
        self, input_ids: Tensor, passage_ids: Tensor, attention_mask: Any = None, passage_mask: Any = None
    ) -> Tensor:
        left = self.query(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        right = self.passage(input_ids=passage_ids, attention_mask=passage_mask).last_hidden_state[:, 0]
        return (left * right).sum(-1)


class Towers(Shared):
    """A bi-encoder: two towers."""

    def other(self) -> nn.Module:
        return BertModel(self.config, add_pooling_layer=False)


class Averaging(BertPreTrainedModel):  # type: ignore[misc]
    """A mean over all places goes into every token, padding included."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Any:
        embeds = self.bert.embeddings.word_embeddings(input_ids)
        return self.bert(inputs_embeds=embeds + embeds.mean(1, keepdim=True), attention_mask=attention_mask)


def bert(**options: Any) -> PreTrainedModel:
    return BertModel(BertConfig(**TINY, **options))


def deberta_v3() -> PreTrainedModel:
    """What the released files have: one projection for tokens and for the table of positions."""
    options = {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "type_vocab_size": 0,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    }
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**TINY, **options))


def deberta() -> PreTrainedModel:
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    return transformers.DebertaModel(transformers.DebertaConfig(**TINY, **options))


def bert2bert() -> PreTrainedModel:
    tiny = {name: value for name, value in TINY.items() if name != "attn_implementation"}
    decoder = BertConfig(**tiny, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**tiny), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


def bart() -> PreTrainedModel:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
    return transformers.BartModel(
        transformers.BartConfig(
            vocab_size=60,
            d_model=32,
            max_position_embeddings=64,
            pad_token_id=0,
            attn_implementation="eager",
            **sizes,
        )
    )


_BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}


def layoutlmv3() -> PreTrainedModel:
    sizes = {
        "input_size": 32,
        "patch_size": 16,
        "coordinate_size": 4,
        "shape_size": 8,
        "max_2d_position_embeddings": 64,
    }
    bins = {"rel_pos_bins": 4, "max_rel_pos": 16, "rel_2d_pos_bins": 4, "max_rel_2d_pos": 16}
    return transformers.LayoutLMv3Model(transformers.LayoutLMv3Config(**TINY, **sizes, **bins))


def page(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randint(0, 20, (ROWS, TOKENS, 4), generator=generator)
    boxes[..., 2:] += boxes[..., :2]
    return {**one_text(seed), "bbox": boxes, "pixel_values": torch.randn(ROWS, 3, 32, 32, generator=generator)}


def luke(aware: bool) -> PreTrainedModel:
    options = {"entity_vocab_size": 40, "entity_emb_size": 16, "use_entity_aware_attention": aware}
    return transformers.LukeModel(transformers.LukeConfig(**TINY, **options))


def words_and_entities(seed: int) -> Batch:
    entities, mask = ids((1, 5, 3, 4), seed + 7, high=39)
    spans = torch.full((ROWS, 5, 3), -1)
    spans[..., :2] = torch.arange(5)[:, None] + torch.arange(2)
    spans = torch.where(mask[..., None] == 1, spans, -1)
    names = ("entity_ids", "entity_attention_mask", "entity_position_ids", "entity_token_type_ids")
    values = (entities, mask, spans, torch.zeros_like(entities))
    return {**one_text(seed), **dict(zip(names, values, strict=True))}


def visual_bert() -> PreTrainedModel:
    return transformers.VisualBertModel(transformers.VisualBertConfig(**TINY, visual_embedding_dim=16))


def words_and_regions(seed: int) -> Batch:
    _, mask = ids((1, 5, 3, 4), seed)
    regions = torch.randn(ROWS, 5, 16, generator=torch.Generator().manual_seed(seed))
    return {
        **one_text(seed),
        "visual_embeds": regions,
        "visual_attention_mask": mask,
        "visual_token_type_ids": torch.ones_like(mask),
    }


PASSAGES = {"attention_mask": ("input_ids",), "passage_mask": ("passage_ids",)}
DECODED = {"attention_mask": ("input_ids",), "decoder_attention_mask": ("decoder_input_ids",)}
ENTITIES = {
    "attention_mask": ("input_ids",),
    "entity_attention_mask": ("entity_ids", "entity_position_ids", "entity_token_type_ids"),
}
REGIONS = {
    "attention_mask": ("input_ids",),
    "visual_attention_mask": ("visual_embeds", "visual_token_type_ids"),
}

pairs = functools.partial(two_texts, second="passage_ids", mask="passage_mask")
decoded = functools.partial(two_texts, second="decoder_input_ids", mask="decoder_attention_mask")

CASES = {
    "bert": Case(bert, one_text),
    "deberta-v3": Case(deberta_v3, one_text),
    "two-towers": Case(lambda: Towers(BertConfig(**TINY)), pairs, PASSAGES),
    "one-tower-twice": Case(lambda: Shared(BertConfig(**TINY)), pairs, PASSAGES),
    "bert2bert": Case(bert2bert, decoded, DECODED),
    "bart": Case(bart, decoded, DECODED, rules="linear-only"),
    "layoutlmv3": Case(layoutlmv3, page, {"attention_mask": ("input_ids", "bbox")}, beside=5),
    "luke": Case(functools.partial(luke, True), words_and_entities, ENTITIES, beside=5),
    "luke-plain": Case(functools.partial(luke, False), words_and_entities, ENTITIES, beside=5),
    "visual-bert": Case(visual_bert, words_and_regions, REGIONS, beside=5),
}

#: Calls whose axes a length does not tell: pieces, two texts of one length, a table that grows.
MORE = {
    "bert-chunks": Case(functools.partial(bert, chunk_size_feed_forward=2), lambda seed: _cut(seed)),
    "albert-chunks": Case(
        lambda: transformers.AlbertModel(
            transformers.AlbertConfig(**{**TINY, "num_hidden_layers": 3}, embedding_size=16, chunk_size_feed_forward=4)
        ),
        lambda seed: _cut(seed, 4),
    ),
    "deberta": Case(deberta, one_text),
    "one-tower-twice": Case(
        lambda: Shared(BertConfig(**TINY)), functools.partial(pairs, lengths=(3, 12, 6, 11)), PASSAGES
    ),
    "bert2bert": Case(bert2bert, functools.partial(decoded, lengths=(3, 12, 6, 11)), DECODED),
}


def _cut(seed: int, by: int = 2) -> Batch:
    lengths = tuple(max(by, each // by * by) for each in LENGTHS["attention_mask"])
    return dict(zip(("input_ids", "attention_mask"), ids(lengths, seed), strict=True))


@functools.cache
def converted(name: str, more: bool = False) -> tuple[Case, PreTrainedModel]:
    case = (MORE if more else CASES)[name]
    torch.manual_seed(0)
    model = spread(case.make())
    return case, qs.convert(model, coarse(case.rules), example_inputs=case.batch(0), inplace=True)


# Brute force ---------------------------------------------------------------------------------------------------------


def assert_same(found: Statistics, wanted: Statistics) -> None:
    """The same histograms, to the bit."""
    assert found.seen.keys() == wanted.seen.keys()
    for name, seen in wanted.seen.items():
        left, right = found.seen[name].histogram, seen.histogram
        assert left is not None
        assert right is not None
        assert torch.equal(left.amax, right.amax), name
        assert torch.equal(left.exponent, right.exponent), name
        assert torch.equal(left.counts, right.counts), name


def assert_close(found: Statistics, wanted: Statistics) -> None:
    """As many values, and no more of them in a neighbouring bin than float32 rounding puts there.

    Products of another number of rows are rounded otherwise: by some 1e-6 of the largest, where a bin is 1/128 of it,
    so about one value in 10,000 comes to stand on the other side of an edge.
    """
    assert found.seen.keys() == wanted.seen.keys()
    for name, seen in wanted.seen.items():
        left, right = found.seen[name].histogram, seen.histogram
        assert left is not None
        assert right is not None
        assert torch.allclose(left.amax, right.amax, rtol=1e-5, atol=0), name
        assert left.total == right.total, name
        moved = int((left.counts.cumsum(0) - right.counts.cumsum(0)).abs().max())
        assert torch.equal(left.exponent, right.exponent), name
        assert moved <= 1 + right.total // 2000, name


@pytest.mark.parametrize(("name", "more"), [*((n, False) for n in CASES), *((n, True) for n in MORE)])
def test_ranges_of_padded_batches_are_those_of_each_text_alone(name: str, more: bool) -> None:
    case, qmodel = converted(name, more)
    batches = [case.batch(seed) for seed in (1, 2)]
    found = qs.collect(qmodel, batches)
    assert_close(found, qs.collect(qmodel, [case.alone(each, row) for each in batches for row in range(ROWS)]))
    # All methods but entropy and mse, which can jump from one bin to the next, follow: here the largest value.
    maxima = qs.collect(qmodel, batches, histograms=False)
    assert all(torch.equal(maxima.seen[n].amax, seen.amax) for n, seen in found.seen.items())


@pytest.mark.parametrize(("name", "more"), [*((n, False) for n in CASES), *((n, True) for n in MORE)])
def test_what_stands_in_the_padding_of_any_text_changes_no_range(name: str, more: bool) -> None:
    case, qmodel = converted(name, more)
    batch = case.batch(3)
    wanted = qs.collect(qmodel, [batch])
    for mask, (content, *_) in case.texts.items():
        value = batch[content]
        padded = (batch[mask] == 0).reshape(*batch[mask].shape, *[1] * (value.ndim - 2))
        changed = {**batch, content: torch.where(padded, torch.full_like(value, GARBAGE), value)}
        assert not torch.equal(changed[content], value)
        assert_same(qs.collect(qmodel, [changed]), wanted)


@pytest.mark.parametrize(("name", "more"), [*((n, False) for n in CASES), *((n, True) for n in MORE)])
def test_more_padding_changes_no_range(name: str, more: bool) -> None:
    case, qmodel = converted(name, more)
    batch = case.batch(3)
    wanted = qs.collect(qmodel, [batch])
    for mask, names in case.texts.items():
        wider = dict(batch)
        for each in (mask, *names):
            value = batch[each]
            wider[each] = torch.cat([value, torch.zeros_like(value[:, :4])], 1)
        assert_close(qs.collect(qmodel, [wider]), wanted)


@pytest.mark.parametrize("name", ["deberta-v3", "deberta"])
def test_padding_on_the_left_counts_as_the_texts_alone(name: str) -> None:
    # Positions are relative in these: a text is the same wherever it stands.
    case, qmodel = converted(name, more=name not in CASES)
    batch = case.batch(1)
    left = {key: torch.zeros_like(value) for key, value in batch.items()}
    for row, length in enumerate(LENGTHS["attention_mask"]):
        for key, value in batch.items():
            left[key][row, TOKENS - length :] = value[row, :length]
    wider = {key: torch.nn.functional.pad(value, (3, 0)) for key, value in left.items()}
    alone = qs.collect(qmodel, [case.alone(batch, row) for row in range(ROWS)])
    for each in (left, wider):
        assert_close(qs.collect(qmodel, [each]), alone)


def picked(case: Case, values: Tensor, batch: Batch, row: int) -> Tensor:
    """The part of an activation that belongs to one row of the batch, chosen by the length of each axis."""
    keep: dict[int, list[int]] = {}
    for mask in case.texts:
        keep[batch[mask].shape[1]] = list(range(int(batch[mask][row].sum())))
    first = keep[TOKENS]
    if case.beside:
        after = keep.get(case.beside, list(range(case.beside)))
        keep[TOKENS + case.beside] = [*first, *(TOKENS + place for place in after)]
    if values.shape[0] % ROWS == 0:  # heads of a row are side by side
        each = values.shape[0] // ROWS
        values = values[row * each : (row + 1) * each]
    for axis in range(1, values.ndim):
        if values.shape[axis] in keep:
            values = values.index_select(axis, torch.tensor(keep[values.shape[axis]], dtype=torch.long))
    return values.reshape(-1)


@pytest.mark.parametrize("name", CASES)
def test_what_is_counted_is_picked_by_the_true_lengths(name: str) -> None:
    case, qmodel = converted(name)
    batch = case.batch(4)
    parts: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            parts.setdefault(name, []).extend(picked(case, inputs[0].detach(), batch, row) for row in range(ROWS))

        return see

    handles = [each.register_forward_pre_hook(hook(n)) for n, each in activation_quantizers(qmodel).items()]
    with qs.quantization_disabled(qmodel), torch.no_grad():
        qmodel(**batch)
    for handle in handles:
        handle.remove()
    found = qs.collect(qmodel, [batch])
    assert found.seen.keys() == parts.keys()
    for each, seen in found.seen.items():
        made = Histogram.of(torch.cat(parts[each]), bins=256)
        assert seen.histogram is not None
        assert torch.equal(seen.amax, made.amax), each
        assert torch.equal(seen.histogram.exponent, made.exponent), each
        assert torch.equal(seen.histogram.counts, made.counts), each


def test_a_table_of_positions_counts_once_for_each_row_with_or_without_padding() -> None:
    # DeBERTa-v3's key projection sees tokens, then the table: their shares must not depend on how rows are grouped.
    _, qmodel = converted("deberta-v3")
    rows, _ = ids((TOKENS,) * ROWS, 5)
    name = "encoder.layer.0.attention.self.key_proj._input_quantizer"
    together = qs.collect(qmodel, [{"input_ids": rows}]).seen[name].histogram
    alone = qs.collect(qmodel, [{"input_ids": row[None]} for row in rows]).seen[name].histogram
    assert together is not None
    assert alone is not None
    assert together.total == alone.total == ROWS * (TOKENS + 16) * 32
    # To the bit: tokens and table come out of LayerNorm, which works row by row.
    assert torch.equal(together.counts, alone.counts)


# What cannot be told -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:CanineModel lets padding into real tokens")
def test_local_attention_over_characters_is_refused_by_name() -> None:
    config = transformers.CanineConfig(**{**TINY, "bos_token_id": 1, "eos_token_id": 2})
    qmodel = qs.convert(transformers.CanineModel(config).eval(), inplace=True)
    batch = dict(zip(("input_ids", "attention_mask"), ids((16, 8, 12), 0), strict=True))
    with pytest.raises(CalibrationError, match=r"batch 0: encoder\.layer\.0\.attention\S+: padding cannot be told"):
        qs.collect(qmodel, [batch])


def test_a_decoder_that_reads_what_the_encoder_reads_has_its_padding() -> None:
    # BART makes the decoder's tokens from the encoder's, moved by one place.
    _, qmodel = converted("bart")
    batch = one_text(0)
    alone = [{"input_ids": batch["input_ids"][row : row + 1, :n]} for row, n in enumerate(LENGTHS["attention_mask"])]
    assert_close(qs.collect(qmodel, [batch]), qs.collect(qmodel, alone))


def test_a_model_that_does_not_run_in_another_size_is_refused() -> None:
    class Fixed(BertModel):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Any:
            if input_ids.shape[1] != TOKENS:
                raise ValueError("twelve tokens, please")
            return super().forward(input_ids, attention_mask)

    batch = one_text(0)
    qmodel = bert().eval()
    qmodel.__class__ = Fixed
    with pytest.raises(CalibrationError, match=r"Fixed cannot be run on .* another size \(twelve tokens, please\)"):
        probe(qmodel, {}, batch, texts_of(batch), holes=False)


def mixing(name: str) -> PreTrainedModel:
    if name == "Averaging":
        return Averaging(BertConfig(**TINY))
    if name == "ConvBertModel":
        return transformers.ConvBertModel(transformers.ConvBertConfig(**TINY, embedding_size=32))
    sizes = {"intra_bottleneck_size": 16, "embedding_size": 16, "true_hidden_size": 16}
    return transformers.MobileBertModel(transformers.MobileBertConfig(**TINY, **sizes))


@pytest.mark.parametrize("name", ["Averaging", "ConvBertModel", "MobileBertModel"])
def test_a_model_that_lets_padding_into_real_tokens_is_named(name: str) -> None:
    torch.manual_seed(0)
    qmodel = qs.convert(spread(mixing(name)), coarse("linear-only"), inplace=True)
    with pytest.warns(UserWarning, match=rf"{name} lets padding into real tokens, .*\(seen first at \S+_quantizer\)"):
        qs.collect(qmodel, [one_text(0), one_text(1)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qs.collect(qmodel, [{"input_ids": one_text(0)["input_ids"]}])  # nothing is padded here


@pytest.mark.parametrize("name", ["bert", "deberta-v3", "two-towers", "bert2bert", "luke"])
@pytest.mark.parametrize("holes", [False, True], ids=["ends", "holes"])
def test_models_that_mask_padding_are_not_blamed(name: str, holes: bool) -> None:
    case, qmodel = converted(name)
    batch = case.batch(0)
    if holes:
        batch["attention_mask"][0, 3] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        qs.collect(qmodel, [batch])
