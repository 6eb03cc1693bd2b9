"""The embedding on integers gives what fake quantization gives, to the bit, of a quarter of the bytes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from pytorch_quantization.tensor_quant import QuantDescriptor
from torch import Tensor, nn

from qdq_surgery.errors import ModelError
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.integer_embedding import IntegerEmbedding, make_integer_embedding
from qdq_surgery.quantize.quantizer import TensorQuantizer

IDS = torch.tensor([[1, 6, 3, 1], [0, 2, 1, 6]])


def quantized(axis: int | None = 0, dtype: torch.dtype = torch.float32, **descriptor: object) -> QuantEmbedding:
    made = nn.Embedding(7, 5, padding_idx=0)
    with torch.no_grad():
        made.weight.copy_(torch.randn(7, 5, generator=torch.Generator().manual_seed(0)))
        made.weight[2] = 0  # a row without a range
    made = made.to(dtype)
    made.__class__ = QuantEmbedding
    quantizer = TensorQuantizer(QuantDescriptor(axis=None if axis is None else (axis,), **descriptor))
    made.register_module("_weight_quantizer", quantizer)
    sizes = made.weight.detach().float().abs()
    quantizer.set_range(sizes.max() if axis is None else sizes.amax(1, keepdim=True))
    assert isinstance(made, QuantEmbedding)
    return made


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids", [IDS, IDS[0], IDS[0, 0]], ids=["batch", "row", "one"])
def test_it_gives_what_fake_quantization_gives(axis: int | None, dtype: torch.dtype, ids: Tensor) -> None:
    embedding = quantized(axis, dtype)
    wanted = embedding(ids)
    frozen = make_integer_embedding(embedding)
    assert frozen is embedding
    assert type(frozen) is IntegerEmbedding
    assert torch.equal(frozen(ids), wanted)
    assert frozen.weight is None
    assert (frozen.integers.dtype, frozen.integers.shape) == (torch.int8, (7, 5))


def test_integers_of_a_file_take_the_place_of_the_weight() -> None:
    integers = make_integer_embedding(quantized()).integers
    other = quantized()
    other.weight.data.zero_()
    assert torch.equal(make_integer_embedding(other, integers)(IDS), quantized()(IDS))


def test_it_goes_to_another_device_and_to_no_other_type() -> None:
    """The device without data stands for a GPU."""
    made = make_integer_embedding(quantized()).to("meta", torch.float16)
    assert {made.integers.device.type, made.divisor.device.type, made.amax.device.type} == {"meta"}
    assert (made.integers.dtype, made.divisor.dtype, made.dtype) == (torch.int8, torch.float32, torch.float16)
    assert made(IDS.to("meta")).dtype == torch.float16
    integers = torch.ones(7, 5, dtype=torch.int8)
    placed = make_integer_embedding(quantized().to("meta"), integers)  # read from a file
    assert placed.integers.device.type == "meta"


def test_what_it_says_in_a_state_dict() -> None:
    frozen = make_integer_embedding(quantized())
    state = frozen.state_dict()
    assert set(state) == {"_weight_quantizer._integers", "_weight_quantizer._amax"}
    assert torch.equal(state["_weight_quantizer._amax"], quantized()._weight_quantizer.amax)
    with pytest.raises(ModelError, match="its tables are fixed"):
        frozen.load_state_dict(state)


def test_copies_pickles_and_casts() -> None:
    frozen = make_integer_embedding(quantized())
    wanted = frozen(IDS)
    for again in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert torch.equal(again(IDS), wanted)
    half = frozen.to(torch.bfloat16)
    assert half(IDS).dtype == torch.bfloat16
    assert torch.equal(half(IDS), wanted.to(torch.bfloat16))
    assert half.divisor.dtype == torch.float32
    assert "int8" in repr(half)
