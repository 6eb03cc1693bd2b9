"""The embedding: rows that are looked up and then rounded are those of a table that is rounded as a whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn
from torch.nn import functional

from qdq_surgery.errors import CalibrationError
from qdq_surgery.graph.operators import is_plain_embedding
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.quantizer import TensorQuantizer

ROWS, COLUMNS = 7, 5
IDS = torch.tensor([[1, 6, 3, 1], [0, 2, 1, 6]])


class Narrow(nn.Embedding):
    pass


def table(seed: int = 0, **options: Any) -> nn.Embedding:
    made = nn.Embedding(ROWS, COLUMNS, **options)
    with torch.no_grad():
        made.weight.copy_(torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)))
    return made


def swapped(embedding: nn.Embedding, axis: int | None = 0, amax: Any = "own", **descriptor: Any) -> QuantEmbedding:
    """What the conversion does, and the calibration."""
    embedding.__class__ = QuantEmbedding
    quantizer = TensorQuantizer(QuantDescriptor(axis=None if axis is None else (axis,), **descriptor))
    embedding.register_module("_weight_quantizer", quantizer)
    if isinstance(amax, str):
        sizes = embedding.weight.detach().abs()
        amax = sizes.max() if axis is None else sizes.amax(1 - axis, keepdim=True)
    if amax is not None:
        quantizer.set_range(torch.as_tensor(amax))
    assert isinstance(embedding, QuantEmbedding)
    return embedding


def whole(embedding: QuantEmbedding) -> Tensor:
    """The rows of a table that is rounded as a whole."""
    return functional.embedding(IDS, embedding._weight_quantizer(embedding.weight), embedding.padding_idx)


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("amax", ["own", None], ids=["fixed", "none"])
@pytest.mark.parametrize("options", [{}, {"num_bits": 4}, {"narrow_range": True}], ids=str)
def test_rows_are_those_of_a_rounded_table(axis: int | None, amax: Any, options: dict[str, Any]) -> None:
    embedding = swapped(table(), axis, amax, **options)
    assert torch.equal(embedding(IDS), whole(embedding))
    assert not torch.equal(embedding(IDS), functional.embedding(IDS, embedding.weight))


@pytest.mark.parametrize("amax", ["own", None], ids=["fixed", "none"])
def test_the_whole_table_is_not_rounded_for_a_few_rows(amax: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    embedding, sizes = swapped(table(), amax=amax), []
    rounded = TensorQuantizer._rounded

    def counted(self: TensorQuantizer, inputs: Tensor, amax: Tensor | None = None) -> Tensor:
        sizes.append(tuple(inputs.shape))
        return rounded(self, inputs, amax)

    monkeypatch.setattr(TensorQuantizer, "_rounded", counted)
    if amax is None:
        monkeypatch.setattr(TensorQuantizer, "_get_amax", None)
    embedding(IDS)
    assert sizes == [(*IDS.shape, COLUMNS)]


@pytest.mark.parametrize("off", ["disable", "disable_quant", "hold_off"])
def test_without_its_quantizer_it_is_the_embedding(off: str) -> None:
    embedding = swapped(table())
    getattr(embedding._weight_quantizer, off)(*([1] if off == "hold_off" else []))
    assert torch.equal(embedding(IDS), table()(IDS))


@pytest.mark.parametrize("learn", [False, True])
def test_gradients_are_those_of_a_rounded_table(learn: bool) -> None:
    # Half of each row lies beyond its range, and gets no gradient.
    ranges = table().weight.detach().abs().median(1, keepdim=True).values
    embeddings = [swapped(table(padding_idx=1), 0, ranges) for _ in range(2)]
    weight = torch.randn(*IDS.shape, COLUMNS, generator=torch.Generator().manual_seed(3))
    for embedding, look_up in zip(embeddings, (lambda each: each(IDS), whole), strict=True):
        embedding._weight_quantizer.learn_amax(learn)
        (look_up(embedding) * weight).sum().backward()
    one, other = embeddings
    assert torch.equal(one.weight.grad, other.weight.grad)  # type: ignore[arg-type]
    assert not one.weight.grad[1].any()  # type: ignore[index]  # the padding's row
    assert one.weight.grad[6].any()  # type: ignore[index]
    if learn:
        # Sums of a few numbers of size 1, in another order. (The padding's row stands out of it: it is not trained.)
        kept = [0, 2, 3, 4, 5, 6]
        grads = [each._weight_quantizer.amax.grad[kept] for each in embeddings]  # type: ignore[union-attr,index]
        assert torch.allclose(*grads, rtol=0, atol=1e-5)
        assert grads[0].any()


def test_a_learned_range_stays_above_zero() -> None:
    embedding = swapped(table())
    embedding._weight_quantizer.learn_amax()
    amax = embedding._weight_quantizer.amax
    assert amax is not None
    amax.data[3] = -1.0
    embedding(IDS)
    assert bool((amax.detach() > 0).all())


def test_sparse_gradients_stay_sparse() -> None:
    embedding = swapped(table(sparse=True))
    embedding(IDS).sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.is_sparse


def test_what_watches_the_quantizer_sees_the_table() -> None:
    embedding, seen = swapped(table()), []
    embedding._weight_quantizer.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    wanted = table().weight.detach().abs().amax(1, keepdim=True)
    embedding(IDS)
    assert seen == [(ROWS, COLUMNS)]
    fresh = swapped(table(), amax=None)
    fresh._weight_quantizer.enable_calib()
    fresh._weight_quantizer.disable_quant()
    fresh(IDS[:1, :1])
    fresh._weight_quantizer.load_calib_amax()
    assert torch.equal(fresh._weight_quantizer.amax, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    embedding = swapped(table()).to(dtype)
    assert embedding(IDS).dtype == dtype
    assert torch.equal(embedding(IDS), whole(embedding))


def test_it_compiles_and_is_copied() -> None:
    embedding = swapped(table())
    twin = copy.deepcopy(embedding)
    assert twin._weight_quantizer is not embedding._weight_quantizer
    assert torch.equal(twin(IDS), embedding(IDS))
    with torch.no_grad():
        assert torch.equal(torch.compile(embedding, backend="aot_eager", fullgraph=True)(IDS), embedding(IDS))
    exported = torch.export.export(embedding, (IDS,)).module()
    assert torch.equal(exported(IDS), embedding(IDS))


def test_a_table_that_was_made_longer_says_what_to_do() -> None:
    embedding = swapped(table())
    embedding.weight = nn.Parameter(torch.cat([embedding.weight.detach()] * 2))
    with pytest.raises(CalibrationError, match=r"has other rows .*\(7, 1\), wanted \(14, 1\).*recalibrate_weights"):
        embedding(IDS)
    embedding._weight_quantizer.disable()
    embedding(IDS)


def test_states_that_do_not_fit_are_refused() -> None:
    embedding = swapped(table())
    state = embedding.state_dict()
    assert set(state) == {"weight", "_weight_quantizer._amax"}
    other = swapped(table(seed=1))
    other.load_state_dict(state)
    assert torch.equal(other(IDS), embedding(IDS))
    with pytest.raises(RuntimeError, match=r"wanted \(7, 1\)"):
        other.load_state_dict({**state, "_weight_quantizer._amax": torch.ones(3, 1)})
    rounding = {"_weight_quantizer._rounding": torch.zeros(ROWS, COLUMNS, dtype=torch.int8)}
    with pytest.raises(RuntimeError, match="an adapted rounding is for the weight of a linear"):
        other.load_state_dict({**state, **rounding})


def test_which_embeddings_are_plain() -> None:
    own = table()
    own.forward = own.forward  # type: ignore[method-assign]
    assert is_plain_embedding(table())
    for odd in (own, Narrow(2, 2), table(max_norm=1.0), nn.Linear(2, 2), swapped(table())):
        assert not is_plain_embedding(odd)
