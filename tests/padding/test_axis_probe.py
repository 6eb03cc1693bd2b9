"""Ranges of padded batches are those of the same texts one by one, without padding: brute force, of many models.

Two truths. Each text alone, without padding, says what is to be counted, but for the rounding of matrix products with
another number of rows. And the values of the padded run itself, picked row by row by the true lengths, say it to the
bit.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from padded_models import (
    CASES,
    GARBAGE,
    LENGTHS,
    MORE,
    ROWS,
    TINY,
    TOKENS,
    Averaging,
    Batch,
    Case,
    bert,
    coarse,
    ids,
    one_text,
    spread,
)
from torch import Tensor, nn
from transformers import BertConfig, BertModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.calibration.collect import Statistics, activation_quantizers
from qdq_surgery.errors import CalibrationError
from qdq_surgery.numerics.histogram import Histogram
from qdq_surgery.padding.axis_probe import probe
from qdq_surgery.padding.token_masks import texts_of


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
    batch = case.batch(1)
    found = qs.collect(qmodel, [batch])
    assert_close(found, qs.collect(qmodel, [case.alone(batch, row) for row in range(ROWS)]))
    # All methods but entropy and mse, which can jump from one bin to the next, follow: here the largest value.
    maxima = qs.collect(qmodel, [batch], histograms=False)
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
