"""Site by site: each linear's sums are those of fake quantization, and it refuses what it cannot."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from architectures import batch_for
from frozen_models import calibrated, frozen
from torch import Tensor, nn

import qdq_surgery as qs
from qdq_surgery.freeze.linear import IntegerLinear, make_integer, to_integers
from qdq_surgery.quantize.linear import QuantLinear

#: Sums of up to 48 products in float32 against sums of integers, over the largest of them.
SUMS = 2e-6


def linears(qmodel: nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in qmodel.named_modules() if isinstance(module, QuantLinear)}


@torch.no_grad()
@pytest.mark.parametrize("rules", ["qdqbert", "qdqbert-scaled", "onnxruntime"])
def test_sums_are_those_of_fake_quantization_site_by_site(rules: str) -> None:
    qmodel = calibrated("bert", rules)
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            seen[name] = args[0].clone(), output.clone()

        return hook

    for name, linear in linears(qmodel).items():
        linear.register_forward_hook(note(name))
    qmodel(**batch_for(qmodel, (3, 8)))
    assert len(seen) == 12
    for name, (inputs, wanted) in seen.items():
        integer = make_integer(copy.deepcopy(linears(qmodel)[name]))
        integer._forward_hooks.clear()
        assert float((integer(inputs) - wanted).abs().max()) <= SUMS * float(wanted.abs().max()), name
        # The sums themselves are integers: those of the stored inputs with the stored weights.
        stored = integer.input_grid(inputs)
        sums = (stored.long() - integer.input_grid.zero_point) @ integer.product.integers().long().t()
        back = sums.double() * integer.scale.double() * integer.input_grid.step.double() + integer.bias.double()
        torch.testing.assert_close(integer(inputs).double(), back, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("rules", ["qdqbert", "qdqbert-scaled"])
def test_integers_are_those_of_the_rounded_weight(rules: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pytorch_quantization.nn.TensorQuantizer.use_fb_fake_quant", native)
    qmodel = calibrated("bert", rules)
    qs.round_weights(qmodel, [batch_for(qmodel, (3, 8))])
    assert any(each.rounding is not None for each in qs.quantizers(qmodel).values())
    for linear in linears(qmodel).values():
        integers, scale = to_integers(linear)
        m = linear.channel_scale
        wanted = linear.quantized_weight() if m is None else linear.quantized_weight() * m
        assert integers.dtype == torch.int8
        torch.testing.assert_close(integers.float() * scale.unsqueeze(1), wanted, rtol=2e-6, atol=1e-7)


def test_one_range_for_all_rows_of_a_weight() -> None:
    qmodel = calibrated()
    linear = next(iter(linears(qmodel).values()))
    assert linear._weight_quantizer is not None
    linear._weight_quantizer.reset_amax()
    linear._weight_quantizer.set_range(torch.tensor(0.7))
    inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = linear(inputs)
        torch.testing.assert_close(make_integer(linear)(inputs), wanted, rtol=1e-5, atol=1e-6)


def an_integer_linear(**options: Any) -> IntegerLinear:
    model = frozen(**options)
    found = next(module for module in model.modules() if isinstance(module, IntegerLinear))
    assert not found.training
    return found


def test_it_is_a_linear_without_a_weight() -> None:
    linear = an_integer_linear()
    assert isinstance(linear, nn.Linear)
    assert linear.weight is None
    assert (linear.in_features, linear.out_features) == (32, 32)
    assert [name for name, _ in linear.named_parameters()] == ["bias"]
    assert linear.quantized_weight().shape == (32, 32)
    assert "int8" in repr(linear)


def test_what_is_quantized_already_is_taken() -> None:
    linear = an_integer_linear()
    inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(linear(linear.input_grid(inputs)), linear(inputs))


def test_hooks_stay() -> None:
    qmodel = calibrated()
    called: list[int] = []
    linear = next(iter(linears(qmodel).values()))
    linear.register_forward_hook(lambda *_: called.append(1))
    make_integer(linear)(torch.randn(4, 32))
    assert called == [1]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))])
def test_copies(make: Any) -> None:
    linear = an_integer_linear()
    inputs = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    wanted = linear(inputs)
    again = make(linear)
    del linear
    assert torch.equal(again(inputs), wanted)


def test_training_and_gradients_are_refused() -> None:
    linear = an_integer_linear()
    inputs = torch.randn(4, 32, requires_grad=True)
    with pytest.raises(qs.ModelError, match=r"frozen, for inference only, and its input wants gradients; call"):
        linear(inputs)
    with torch.no_grad():
        linear(inputs)
    with pytest.raises(qs.ModelError, match=r"it is in training mode; call model.eval\(\)"):
        linear.train()(inputs.detach())


def test_other_places_and_types_are_refused() -> None:
    linear = an_integer_linear()
    with pytest.raises(
        qs.ModelError,
        match=r"is to be torch\.float32 on meta: integer products run on a CPU or an NVIDIA GPU, not on meta",
    ):
        linear.to("meta")
    with pytest.raises(qs.ModelError, match=r"is to be torch\.float16"):
        linear.to(torch.float16)
    assert linear.to(torch.bfloat16)(torch.randn(2, 32)).dtype == torch.bfloat16
    assert linear.scale.dtype == torch.float32


def test_states_are_read_and_not_loaded() -> None:
    linear = an_integer_linear()
    state = linear.state_dict()
    assert torch.equal(state["_weight_quantizer._integers"], linear.product.integers())
    assert {name for name in state if name.endswith("_amax")} == {
        "_input_quantizer._amax",
        "_weight_quantizer._amax",
    }
    with pytest.raises(qs.ModelError, match="load into the quantized model"):
        linear.load_state_dict({})


def test_a_move_that_fails_leaves_it_as_it_was() -> None:
    linear = an_integer_linear()
    values = torch.randn(3, linear.in_features)
    wanted = linear(values)

    def full(tensor: Tensor) -> Tensor:
        if tensor.numel():  # all but what is asked with
            raise torch.OutOfMemoryError("no memory")
        return tensor

    with pytest.raises(torch.OutOfMemoryError):
        linear._apply(full)
    assert torch.equal(linear(values), wanted)
