"""A frozen model computes what fake quantization does, but for ties; the original stays; all or nothing."""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import itertools
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BASE, batch_for, build, layers
from frozen_models import apart, calibrated, frozen, outputs
from gpu_kernels import KERNELS, take_kernel
from torch import Tensor, nn
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.freeze.linear import IntegerLinear
from qdq_surgery.integers.input_grid import InputGrid
from qdq_surgery.quantize.linear import QuantLinear

#: Largest difference to fake quantization, over the largest value, where no value was a tie. Sums of integers are
#: exact; float sums of products are not, by some 1e-6 in a few layers.
NEAR = 1e-5

#: And where values were: each is off by one step of its grid, so by less than rounding itself costs.
WITH_TIES = 0.05


#: Values at ties, and those that a tie before them moves over one, of all that are rounded.
FEW = 0.005


def flips(qmodel: nn.Module, model: nn.Module, batch: dict[str, Tensor]) -> tuple[int, int]:
    """How many values became another integer in the frozen model than in the quantized one, and of how many."""
    found: list[list[tuple[Tensor, float]]] = [[], []]
    names = [name for name, module in model.named_modules() if isinstance(module, IntegerLinear)]
    with torch.no_grad():
        for each, notes in zip((qmodel, model), found, strict=True):
            hooks: list[Any] = []
            for name in names:
                grid = model.get_submodule(name).input_grid
                note = functools.partial(_note_input, notes, grid)
                hooks.append(each.get_submodule(name).register_forward_pre_hook(note))
            for name, left in qs.quantizers(model).items():
                note = functools.partial(_note_output, notes, float(left.step_size.min()))
                hooks.append(each.get_submodule(name).register_forward_hook(note))
            each(**batch)
            for hook in hooks:
                hook.remove()
    assert len(found[0]) == len(found[1]) > 0
    pairs = list(zip(*found, strict=True))
    count = sum(int(((one.float() - other.float()).abs() > step / 2).sum()) for (one, step), (other, _) in pairs)
    return count, sum(one.numel() for (one, _), _ in pairs)


def computes_the_same(qmodel: PreTrainedModel, model: PreTrainedModel, batch: dict[str, Tensor]) -> bool:
    """But for ties, which are few."""
    off, (count, total) = apart(outputs(model, batch), outputs(qmodel, batch)), flips(qmodel, model, batch)
    return off < (WITH_TIES if count else NEAR) and count <= FEW * total


def _note_input(notes: list[tuple[Tensor, float]], grid: InputGrid, _: nn.Module, args: tuple[Tensor, ...]) -> None:
    notes.append((grid(args[0]), 1.0))


def _note_output(notes: list[tuple[Tensor, float]], step: float, _: nn.Module, __: Any, output: Tensor) -> None:
    notes.append((output, step))


#: Every architecture whose code is its own, and BERT with every rule set; another rule set where code differs.
MODELS = [
    *((rules, "bert") for rules in ("qdqbert", "openvino", "qdqbert-scaled", "linear-only", "onnxruntime")),
    *(("qdqbert", each) for each in ("roberta", "electra", "mobilebert", "mpnet", "roberta-prelayernorm")),
    *(("linear-only", each) for each in ("distilbert", "albert")),
    ("openvino", "modernbert"),
    ("qdqbert-scaled", "deberta-v2"),
]

#: BERT on every kernel, and each kernel under every other architecture: the product does not know which one it is in.
CASES = [
    (rules, model_type, kernel)
    for turn, (rules, model_type) in enumerate(MODELS)
    for at, kernel in enumerate(KERNELS)
    if model_type == "bert" or at == turn % len(KERNELS)
]


@pytest.mark.parametrize(("rules", "model_type", "kernel"), CASES)
def test_it_computes_what_fake_quantization_does(
    rules: str, model_type: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_kernel(kernel, monkeypatch)
    # The second layer of ALBERT is the first once more, that of ModernBERT a local one.
    qmodel = calibrated(model_type, rules, **layers(model_type, 2 if model_type in ("albert", "modernbert") else 1))
    model = qs.freeze(qmodel)
    batch = batch_for(qmodel, (3, 8))
    linears = [name for name, module in qmodel.named_modules() if isinstance(module, QuantLinear)]
    assert linears
    found = [model.get_submodule(name) for name in linears]
    assert all(isinstance(each, IntegerLinear) and kernel in each.product.kernel for each in found)
    assert computes_the_same(qmodel, model, batch)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("attention.self.query", lambda linear: linear.scale.mul_(1.1)),
        ("attention.self.value", lambda linear: linear.scale.mul_(1.02)),
        ("attention.output.dense", lambda linear: linear.input_grid.step.mul_(1.02)),
        ("intermediate.dense", lambda linear: setattr(linear, "activation", "relu")),
        ("intermediate.dense", lambda linear: linear.input_grid.factor.mul_(1.02)),
    ],
)
def test_the_comparison_can_fail(name: str, change: Callable[[Any], object]) -> None:
    qmodel = calibrated(num_hidden_layers=1)
    model = qs.freeze(qmodel)
    batch = batch_for(qmodel, (3, 8))
    assert computes_the_same(qmodel, model, batch)
    change(model.get_submodule(f"encoder.layer.0.{name}"))
    assert not computes_the_same(qmodel, model, batch)


def test_what_is_tied_to_a_linear_that_stays_is_not_shared() -> None:
    """The copy that loses its float weights has those that it keeps for itself."""
    qmodel = calibrated(num_hidden_layers=1)
    attention = qmodel.encoder.layer[0].attention.self
    attention.key.weight = attention.query.weight
    attention.key._input_quantizer.disable()
    model = qs.freeze(qmodel)
    assert attention.query.weight.requires_grad
    assert model.encoder.layer[0].attention.self.key.weight is not attention.key.weight


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForQuestionAnswering"])
def test_heads_labels_and_class_stay(head: str) -> None:
    qmodel = calibrated("bert", "qdqbert", head, num_hidden_layers=1)
    model = qs.freeze(qmodel)
    assert type(model) is type(qmodel)
    assert inspect.signature(model.forward) == inspect.signature(qmodel.forward)
    batch = batch_for(qmodel, (2, 6), labels=True)
    assert apart(outputs(model, batch), outputs(qmodel, batch)) < WITH_TIES
    assert "loss" in outputs(model, batch)


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_shapes_and_masks(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    take_kernel(kernel, monkeypatch)
    qmodel = calibrated()
    model = qs.freeze(qmodel)
    for shape, mask in itertools.product([(1, 1), (2, 5), (5, 30)], [True, False]):
        batch = batch_for(qmodel, shape, mask=mask)
        assert apart(outputs(model, batch), outputs(qmodel, batch)) < WITH_TIES, (shape, mask)


def test_attentions_and_hidden_states_come_out() -> None:
    qmodel = calibrated("bert", "qdqbert")
    model = qs.freeze(qmodel)
    batch: dict[str, Any] = {
        **batch_for(qmodel, (2, 6)),
        "output_attentions": True,
        "output_hidden_states": True,
    }
    found = outputs(model, batch)
    assert {"attentions.1", "hidden_states.2"} <= found.keys()
    assert apart(found, outputs(qmodel, batch)) < WITH_TIES


def test_the_original_stays_as_it_is() -> None:
    qmodel = calibrated("bert", "qdqbert")
    batch = batch_for(qmodel, (2, 6))
    before = {name: value.clone() for name, value in qmodel.state_dict().items()}
    classes = [type(module) for module in qmodel.modules()]
    wanted = outputs(qmodel, batch)
    model = qs.freeze(qmodel)
    now = qmodel.state_dict()
    assert before.keys() == now.keys()
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert classes == [type(module) for module in qmodel.modules()]
    assert all(torch.equal(wanted[name], value) for name, value in outputs(qmodel, batch).items())
    assert all(parameter.requires_grad for parameter in qmodel.parameters())
    # They share nothing: the original is trained on, and the frozen model is as it was.
    shared = {tensor.data_ptr() for tensor in (*qmodel.parameters(), *qmodel.buffers()) if tensor.numel()}
    assert not shared & {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers()) if tensor.numel()}


def test_inplace() -> None:
    qmodel = calibrated()
    batch = batch_for(qmodel, (2, 6))
    wanted = outputs(qmodel, batch)
    assert qs.freeze(qmodel, inplace=True) is qmodel
    assert apart(outputs(qmodel, batch), wanted) < WITH_TIES


@pytest.mark.parametrize("inplace", [True, False])
def test_all_or_nothing(monkeypatch: pytest.MonkeyPatch, inplace: bool) -> None:
    qmodel = calibrated("bert", "qdqbert")
    batch = batch_for(qmodel, (2, 6))
    wanted, names = outputs(qmodel, batch), list(qmodel.state_dict())

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[qs.freeze.__module__], "_run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qs.freeze(qmodel, inplace=inplace)
    assert list(qmodel.state_dict()) == names
    assert all(torch.equal(wanted[name], value) for name, value in outputs(qmodel, batch).items())
    assert len(qs.quantizers(qmodel)) == 40


def test_no_float_copy_of_the_weights_stays() -> None:
    qmodel = calibrated()
    wide = {tuple(module.weight.shape) for module in qmodel.modules() if isinstance(module, QuantLinear)}
    model = qs.freeze(qmodel)
    inside = [*model.encoder.parameters(), *model.encoder.buffers()]  # type: ignore[union-attr]
    assert not [tensor for tensor in inside if tuple(tensor.shape) in wide]


def test_float_weights_are_let_go() -> None:
    qmodel = calibrated()
    held = [weakref.ref(module.weight) for module in qmodel.modules() if isinstance(module, QuantLinear)]
    assert all(each() is not None for each in held)
    model = qs.freeze(qmodel, inplace=True)
    gc.collect()
    assert len(held) == 12
    assert all(each() is None for each in held)
    assert model is qmodel


@pytest.mark.parametrize("kernel", KERNELS)
@torch.no_grad()
def test_under_autocast(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What autocast casts to bfloat16 goes in and out; the integers are as they were."""
    take_kernel(kernel, monkeypatch)
    qmodel = calibrated("bert", "qdqbert")
    model = qs.freeze(qmodel)
    batch = batch_for(qmodel, (2, 6))
    wanted = outputs(qmodel, batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = {name: value.float() for name, value in outputs(model, batch).items()}
    assert apart(found, wanted) < 0.05


def test_the_rest_in_bfloat16() -> None:
    """In bfloat16 all but the integer products is rounded to 8 bits: the two agree as far as that goes."""
    qmodel = calibrated().to(torch.bfloat16)
    model = qs.freeze(qmodel)
    batch = batch_for(qmodel, (3, 8))
    found, wanted = outputs(model, batch), outputs(qmodel, batch)
    assert found["last_hidden_state"].dtype == torch.bfloat16
    assert apart({k: v.float() for k, v in found.items()}, {k: v.float() for k, v in wanted.items()}) < 0.05


def test_it_can_be_cast_to_bfloat16_later() -> None:
    model = frozen()
    batch = batch_for(model, (3, 8))
    wanted = outputs(model, batch)
    found = {name: value.float() for name, value in outputs(copy.deepcopy(model).to(torch.bfloat16), batch).items()}
    assert apart(found, wanted) < 0.05


def test_a_linear_with_a_disabled_quantizer_stays() -> None:
    qmodel = calibrated()
    qmodel.encoder.layer[0].output.dense._input_quantizer.disable()  # type: ignore[index, union-attr]
    model = qs.freeze(qmodel)
    batch = batch_for(qmodel, (3, 8))
    assert type(model.encoder.layer[0].output.dense) is QuantLinear  # type: ignore[index, union-attr]
    assert apart(outputs(model, batch), outputs(qmodel, batch)) < WITH_TIES


def test_examples_of_one_s_own() -> None:
    qmodel = calibrated()
    model = qs.freeze(qmodel, example_inputs=batch_for(qmodel, (2, 5)))
    batch = batch_for(qmodel, (3, 8))
    assert apart(outputs(model, batch), outputs(qmodel, batch)) < WITH_TIES
    with pytest.raises(qs.ModelError, match="does not run on the example inputs"):
        qs.freeze(qmodel, example_inputs={"input_ids": torch.tensor([[10**6]])})


def test_a_decoder_with_a_cache_runs() -> None:
    """A call that no graph can hold, with keys and values of before, runs the original code."""
    qmodel = calibrated("bert", "linear-only", "BertLMHeadModel", is_decoder=True)
    model = qs.freeze(qmodel)
    ids = torch.tensor([[1, 7, 9, 11]])
    found = model.generate(ids, max_new_tokens=3, do_sample=False, min_new_tokens=3)
    assert torch.equal(found, qmodel.generate(ids, max_new_tokens=3, do_sample=False, min_new_tokens=3))


def test_the_number_of_layers_that_are_built_is_one() -> None:
    assert BASE.keys() == {each.model_type for each in ARCHITECTURES}
    assert build("bert", "BertModel", num_hidden_layers=1).config.num_hidden_layers == 1
