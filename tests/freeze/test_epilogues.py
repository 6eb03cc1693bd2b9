"""What moves into a product's epilogue, and what does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import batch_for, build
from frozen_models import apart, calibrated, outputs
from torch import nn

import qdq_surgery as qs
from qdq_surgery.freeze.epilogues import Done, Epilogue, _activation
from qdq_surgery.freeze.frozen_state import frozen_state
from qdq_surgery.freeze.linear import IntegerLinear

INTERMEDIATE = "encoder.layer.0.intermediate"
OUTPUT = "encoder.layer.0.output.dense"


def frozen_and_wanted(qmodel: Any) -> tuple[Any, float]:
    model = qs.freeze(qmodel)
    batch = batch_for(qmodel, (3, 8))
    return model, apart(outputs(model, batch), outputs(qmodel, batch))


@pytest.mark.parametrize(
    ("act", "name"),
    [("gelu", "gelu"), ("gelu_new", "gelu_tanh"), ("gelu_fast", "gelu_tanh"), ("relu", "relu")],
)
def test_functions_are_known_by_what_they_compute(act: str, name: str) -> None:
    model, off = frozen_and_wanted(calibrated(num_hidden_layers=1, hidden_act=act))
    dense = model.get_submodule(f"{INTERMEDIATE}.dense")
    assert dense.activation == name
    assert isinstance(model.get_submodule(f"{INTERMEDIATE}.intermediate_act_fn"), Done)
    [epilogue] = frozen_state(model).epilogues
    assert epilogue == Epilogue(f"{INTERMEDIATE}.dense", f"{INTERMEDIATE}.intermediate_act_fn")
    assert off < 0.05


@pytest.mark.parametrize("act", ["silu", "quick_gelu", "mish"])
def test_other_functions_stay(act: str) -> None:
    model, off = frozen_and_wanted(calibrated(num_hidden_layers=1, hidden_act=act))
    assert frozen_state(model).epilogues == ()
    assert off < 1e-4


@pytest.mark.parametrize(
    "module",
    [
        *(nn.Linear(4, 4), nn.PReLU(), nn.Softmax(-1), nn.Bilinear(2, 2, 2), nn.Sequential()),
        # ReLU where nothing is cut off, or where what they are given is compared after they have changed it.
        *(nn.ReLU6(inplace=True), nn.Hardsigmoid(inplace=True), nn.Threshold(0.5, 0, inplace=True), nn.Hardtanh(0, 20)),
        *(nn.ReLU6(), nn.Hardtanh(0.0, 1e4), nn.LeakyReLU(1e-3)),
    ],
)
def test_what_is_no_such_function(module: nn.Module) -> None:
    assert _activation(module) is None


def test_a_function_that_hangs_in_two_places_stays() -> None:
    qmodel = calibrated(num_hidden_layers=1)
    qmodel.pooler.activation = qmodel.get_submodule(f"{INTERMEDIATE}.intermediate_act_fn")
    model, off = frozen_and_wanted(qmodel)
    assert frozen_state(model).epilogues == ()
    assert off < 1e-4


def test_chunks_stay() -> None:
    """Chunks are joined again by a cat, of which each linear's reader is one of many."""
    qmodel = calibrated(num_hidden_layers=1, chunk_size_feed_forward=3)
    model = qs.freeze(qmodel)
    batch = batch_for(qmodel, (2, 9))
    assert apart(outputs(model, batch), outputs(qmodel, batch)) < 0.05


def test_layers_that_are_shared_are_fused_once() -> None:
    model, off = frozen_and_wanted(calibrated("albert", "linear-only"))
    [epilogue] = frozen_state(model).epilogues
    assert isinstance(model.get_submodule(epilogue.linear), IntegerLinear)
    assert off < 0.05
    assert "done in the product before" in repr(model.get_submodule(epilogue.function))


@pytest.mark.parametrize("watched", [f"{INTERMEDIATE}.dense", f"{INTERMEDIATE}.intermediate_act_fn"])
def test_what_is_watched_gives_what_it_gave(watched: str) -> None:
    """A user's hook sees the linear's own result, and is called where the function is."""
    qmodel = calibrated(num_hidden_layers=1)
    seen: dict[int, list[torch.Tensor]] = {}
    qmodel.get_submodule(watched).register_forward_hook(
        lambda module, _, output: seen.setdefault(id(module), []).append(output)
    )
    model = qs.freeze(qmodel)
    assert frozen_state(model).epilogues == ()
    seen.clear()
    batch = batch_for(qmodel, (3, 8))
    outputs(model, batch), outputs(qmodel, batch)
    [ours], [theirs] = (seen[id(each.get_submodule(watched))] for each in (model, qmodel))
    assert ours.dtype == theirs.dtype == torch.float32
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-4  # the sums of the products are rounded otherwise


@pytest.mark.parametrize("watched", [INTERMEDIATE, OUTPUT])
@pytest.mark.parametrize("first", [True, False])
def test_who_looks_between_two_linears_sees_numbers(watched: str, first: bool) -> None:
    """Before the model is frozen or after it: no block is handed integers, or hands them on."""
    qmodel = calibrated(num_hidden_layers=1)
    seen: list[torch.dtype] = []
    model = qmodel if first else qs.freeze(qmodel)
    model.get_submodule(watched).register_forward_hook(
        lambda _, inputs, output: seen.extend((inputs[0].dtype, output.dtype))
    )
    model = qs.freeze(qmodel) if first else model
    seen.clear()
    outputs(model, batch_for(qmodel, (3, 8)))
    assert set(seen) == {torch.float32}


def test_a_call_that_was_not_looked_at_computes_the_same() -> None:
    """Another reader of what lies between two linears, which no example has shown."""
    qmodel = calibrated(num_hidden_layers=1)

    class Layer(type(qmodel.encoder.layer[0])):  # type: ignore[misc]
        extra: bool

        def feed_forward_chunk(self, attention_output: torch.Tensor) -> torch.Tensor:
            between = self.intermediate(attention_output)
            out: torch.Tensor = self.output(between, attention_output)
            return out + between.float().mean(-1, keepdim=True) if self.extra else out

    plain = build("bert", "BertModel", num_hidden_layers=1)
    plain.encoder.layer[0].__class__ = Layer
    plain.encoder.layer[0].extra = False
    qmodel = qs.convert(plain, "linear-only")
    batch = batch_for(qmodel, (3, 8))
    qs.calibrate(qmodel, [batch])
    model = qs.freeze(qmodel)
    model.encoder.layer[0].extra = qmodel.encoder.layer[0].extra = True
    assert apart(outputs(model, batch), outputs(qmodel, batch)) < 0.05
