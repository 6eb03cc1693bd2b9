"""A quantizer leaves its name in what is traced, in one thread, and only while it is asked to."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from pytorch_quantization import tensor_quant
from torch import Tensor, nn

from qdq_surgery.quantize.export_node import FAKE_QUANT, FAKE_QUANT_DOMAIN, tag, tagged
from qdq_surgery.quantize.quantizer import TensorQuantizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.quantizer = TensorQuantizer(tensor_quant.QuantDescriptor(num_bits=8, amax=1.5))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.quantizer(x) + 1
        return made


@pytest.fixture
def model() -> Model:
    return Model().eval()


X = torch.linspace(-2, 2, 12).reshape(3, 4)


def nodes(model: Model) -> list[Any]:
    """The arguments of each node that quantizers left."""
    with tagged({model.quantizer: "some.where._input_quantizer"}), torch.no_grad():
        program = torch.export.export(model, (X,))
    return [(node.args, node.kwargs) for node in program.graph.nodes if "symbolic" in str(node.target)]


def test_outside_nothing_is_left(model: Model) -> None:
    assert tag(model.quantizer, X) is None
    assert not torch.equal(model(X), X + 1)


def test_the_node_has_the_name_and_the_shape(model: Model) -> None:
    (((inputs, operator, *_), options),) = nodes(model)
    assert len(inputs) == 1
    assert operator == FAKE_QUANT
    assert options["domain"] == FAKE_QUANT_DOMAIN
    words = str(options)
    assert "some.where._input_quantizer" in words
    assert "[3, 4]" in words


@pytest.mark.parametrize("how", ["disable", "disable_quant"])
def test_a_quantizer_that_does_nothing_leaves_nothing(model: Model, how: str) -> None:
    getattr(model.quantizer, how)()
    assert nodes(model) == []


def test_a_learned_range_leaves_one_too(model: Model) -> None:
    model.quantizer.learn_amax()
    assert len(nodes(model)) == 1


def test_no_arithmetic_is_traced(model: Model) -> None:
    with tagged({model.quantizer: "q"}), torch.no_grad():
        program = torch.export.export(model, (X,))
    assert not [node for node in program.graph.nodes if "round" in str(node.target) or "clamp" in str(node.target)]


def test_one_that_was_not_announced(model: Model) -> None:
    with tagged({}), pytest.raises(KeyError):
        model(X)


def test_it_ends_with_an_error(model: Model) -> None:
    wanted = model(X)
    with pytest.raises(RuntimeError, match="in the middle"), tagged({model.quantizer: "q"}):
        raise RuntimeError("in the middle")
    assert tag(model.quantizer, X) is None
    assert torch.equal(model(X), wanted)


def test_one_within_another(model: Model) -> None:
    with tagged({model.quantizer: "outer"}):
        with tagged({}), pytest.raises(KeyError):
            tag(model.quantizer, X)
        assert tag(model.quantizer, X) is not None
    assert tag(model.quantizer, X) is None


def test_other_threads_do_not_notice(model: Model) -> None:
    wanted, found = model(X), []
    with tagged({model.quantizer: "q"}):
        thread = threading.Thread(target=lambda: found.append(model(X)))
        thread.start()
        thread.join()
    assert torch.equal(found[0], wanted)
