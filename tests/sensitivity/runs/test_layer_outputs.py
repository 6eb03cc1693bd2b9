"""Layers that are not run: which may be, and that they are as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdq_surgery.sensitivity.runs.layer_outputs import kept_outputs, same_tensors, without_running


class Layer(nn.Module):
    def __init__(self, returned: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.returned = returned
        self.calls = 0

    def forward(self, values: Tensor) -> Any:
        self.calls += 1
        return self.returned(values)


def pair(first: Callable[[Tensor], Any], second: Callable[[Tensor], Any] | None = None) -> dict[str, Layer]:
    return {"0": Layer(first), "1": Layer(second or first)}


def run(layers: dict[str, Layer], start: float = 1.0) -> Any:
    values: Any = torch.full((2,), start)
    for layer in layers.values():
        values = layer(values[0] if isinstance(values, tuple) else values)
    return values


@pytest.mark.parametrize("returned", [lambda x: x + 1, lambda x: (x + 1, None)], ids=["tensor", "tuple"])
def test_a_layer_gives_what_it_gave(returned: Callable[[Tensor], Any]) -> None:
    layers = pair(returned)
    with kept_outputs(layers) as kept:
        wanted = run(layers)
    assert kept.usable
    assert kept.before(frozenset({"1"})) == ("0",)
    assert kept.before(frozenset({"0", "1"})) == ()
    assert kept.before(None) == ()
    assert kept.before(frozenset({"2"})) == ()
    with without_running(layers, kept, ("0",)):
        assert same_tensors(run(layers, 5.0), wanted)
    assert [layer.calls for layer in layers.values()] == [1, 2]
    assert all("forward" not in vars(layer) for layer in layers.values())
    assert not same_tensors(run(layers, 5.0), wanted)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda x: x + 1, lambda x: x.add_(1)),  # writes into what the first gave
        (lambda x: [{"states": x}], lambda x: x),
    ],
    ids=["written to", "unusual"],
)
def test_what_cannot_be_given_again(first: Callable[[Tensor], Any], second: Callable[[Tensor], Any]) -> None:
    layers = pair(first, second)
    with kept_outputs(layers) as kept:
        run(layers)
    assert not kept.usable
    assert kept.before(frozenset({"1"})) == ()


def test_a_layer_that_runs_twice() -> None:
    layer = Layer(lambda x: x + 1)
    with kept_outputs({"0": layer}) as kept:
        layer(layer(torch.ones(2)))
    assert not kept.usable


def test_a_forward_of_its_own_is_put_back() -> None:
    layers = pair(lambda x: x + 1)
    own = layers["0"].forward
    vars(layers["0"])["forward"] = own
    with pytest.raises(KeyboardInterrupt), kept_outputs(layers):
        raise KeyboardInterrupt
    assert vars(layers["0"])["forward"] is own
    assert "forward" not in vars(layers["1"])
