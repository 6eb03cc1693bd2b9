"""Linears that are not run again: only where they are given the same, and round in the same way."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
from exported import calibrated, inputs_for
from torch import Tensor, nn

import qdq_surgery as qs
from qdq_surgery.sensitivity.runs.borrowed import borrowed
from qdq_surgery.sensitivity.runs.kept_products import KeptProducts, Shortcut, shortcut

ON = (True, True)


def kept(given: Tensor, output: Tensor) -> tuple[KeptProducts, nn.Module]:
    products, linear = KeptProducts(), nn.Linear(2, 2)
    products.keep(linear, ON, given, output)
    return products, linear


def test_equal_values_are_the_same() -> None:
    given, output = torch.ones(3, 2), torch.zeros(3, 2)
    products, linear = kept(given, output)
    assert products.find(linear, ON, given) is output
    assert products.find(linear, ON, given.clone()) is output


@pytest.mark.parametrize(
    "other",
    [torch.tensor([[1.0, 1.0 + 2**-23]]), torch.ones(2, 2), torch.ones(1, 2, dtype=torch.float64), torch.ones(2)],
    ids=["last bit", "rows", "dtype", "axes"],
)
def test_another_input_is_another(other: Tensor) -> None:
    products, linear = kept(torch.ones(1, 2), torch.zeros(1, 2))
    assert products.find(linear, ON, other) is None


def test_nan_is_equal_to_nothing() -> None:
    products, linear = kept(torch.full((1, 2), torch.nan), torch.zeros(1, 2))
    assert products.find(linear, ON, torch.full((1, 2), torch.nan)) is None


def test_another_rounding_or_linear_is_another() -> None:
    given = torch.ones(1, 2)
    products, linear = kept(given, torch.zeros(1, 2))
    assert products.find(linear, (True, False), given) is None
    assert products.find(nn.Linear(2, 2), ON, given) is None


@pytest.mark.parametrize("which", ["given", "output"])
def test_what_was_written_to_is_not_given(which: str) -> None:
    tensors = {"given": torch.ones(1, 2), "output": torch.zeros(1, 2)}
    products, linear = kept(**tensors)
    tensors[which].add_(0.0)
    assert products.find(linear, ON, tensors["given"]) is None


def test_there_is_room_for_so_much() -> None:
    products, first, second = KeptProducts(room=40), nn.Linear(2, 2), nn.Linear(2, 2)
    given, output = torch.ones(2, 2), torch.zeros(2, 2)
    products.keep(first, ON, given, output)
    products.keep(second, ON, given, output)
    assert products.room == 40 - 32
    assert products.find(first, ON, given) is output
    assert products.find(second, ON, given) is None


def test_forwards_are_put_back() -> None:
    qmodel = calibrated(num_hidden_layers=1)
    linear = qmodel.get_submodule("encoder.layer.0.output.dense")
    own = lambda values: values  # noqa: E731
    linear.__dict__["forward"] = own
    with suppress(KeyboardInterrupt), shortcut(qmodel, Shortcut(keeps=KeptProducts())):
        assert linear.__dict__["forward"] is not own
        raise KeyboardInterrupt
    assert linear.__dict__["forward"] is own
    assert not any("forward" in vars(each) for each in qmodel.modules() if each is not linear)


@pytest.mark.parametrize("model_type", ["bert", "albert", "deberta-v2"])
def test_the_figures_stay(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit; and products are found, in the layer of a site. ALBERT's linears run once for each layer."""
    qmodel = calibrated(model_type, num_hidden_layers=2 if model_type == "albert" else 1)
    data = [dict(inputs_for(qmodel, (4, 10)))]
    found: list[bool] = []
    real = KeptProducts.find

    def counted(self: KeptProducts, *given: object) -> Tensor | None:
        output = real(self, *given)  # type: ignore[arg-type]
        found.append(output is not None)
        return output

    monkeypatch.setattr(KeptProducts, "find", counted)
    with_them = qs.sensitivity(qmodel, data).to_json()
    assert any(found)
    monkeypatch.setattr(KeptProducts, "find", lambda *_: None)
    assert qs.sensitivity(qmodel, data).to_json() == with_them


def test_what_a_run_keeps_is_its_own() -> None:
    """A run in INT8 after one in float: each is compared with what is kept of its kind."""
    qmodel = calibrated(num_hidden_layers=1)
    inputs = inputs_for(qmodel, (4, 10))
    every = dict(qs.quantizers(qmodel))
    with borrowed(qmodel, every, {}) as trial:
        wanted = trial.run(inputs, every).last_hidden_state
        _, plain = trial.run_kept(inputs, ())
        _, rounded = trial.run_kept(inputs, every)
        for kept_of in (plain, rounded):
            outputs = trial.run_after(inputs, every, kept_of, ())
            assert torch.equal(outputs.last_hidden_state, wanted)


def test_tensors_of_inference_mode_are_not_kept() -> None:
    """Nobody counts what is written to them."""
    with torch.inference_mode():
        given = torch.ones(1, 2)
    products, linear = kept(given, torch.zeros(1, 2))
    assert products.find(linear, ON, given) is None
