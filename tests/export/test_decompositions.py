"""What torch makes of a program that it does not trace again is what it makes of one that it does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from architectures import batch_for, build
from torch import Tensor, nn
from torch.export import ExportedProgram

import qdq_surgery as qs
from qdq_surgery.export import onnx_trace
from qdq_surgery.export.decompositions import decomposed_in_place

# What torch says of itself while it exports.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

#: Called, it is the second trace.
_real = ExportedProgram.run_decompositions


@pytest.fixture
def retraced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each program that torch traced again."""
    found: list[str] = []

    def run(self: ExportedProgram, *given: Any) -> ExportedProgram:
        found.append("again")
        return _real(self, *given)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", run)
    return found


def text_of(graph: ir.Graph) -> list[Any]:
    """Every node with its attributes and where its inputs come from; constants by their values."""
    names: dict[ir.Value, str] = {}

    def name(value: ir.Value | None) -> Any:
        if value is None or value in names:
            return value and names[value]
        if value.const_value is None:
            return value.name
        array = value.const_value.numpy()
        return array.shape, array.dtype.str, array.tobytes()

    text: list[Any] = [[(each.name, str(each.shape)) for each in graph.inputs]]
    for node in graph:
        # A 0 among sizes is one, or means that of the input, which is 0 there as well.
        own = sorted((key, str(value)) for key, value in node.attributes.items() if key != "allowzero")
        text.append((node.op_type, [name(each) for each in node.inputs], own))
        names.update({value: f"{len(text)}.{at}" for at, value in enumerate(node.outputs)})
    return [*text, [(each.name, str(each.shape), name(each)) for each in graph.outputs]]


@pytest.mark.traces
def test_an_encoder_is_not_traced_again_and_is_the_same(retraced: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """With all that DeBERTa computes of positions, and with an axis more for choices."""
    model = build("deberta-v2", "DebertaV2ForMultipleChoice", num_hidden_layers=1)
    inputs = {name: value for name, value in batch_for(model, (2, 9)).items() if name != "labels"}
    qmodel = qs.convert(model)
    qs.calibrate(qmodel, [inputs], "max")
    found = onnx_trace.trace(qmodel, inputs, 21, False)
    assert retraced == []
    monkeypatch.setattr(onnx_trace, "decomposed_in_place", lambda program: program)
    wanted = onnx_trace.trace(qmodel, inputs, 21, False)
    assert retraced == ["again"]
    assert text_of(found.model.graph) == text_of(wanted.model.graph)
    named = ({name for name in each.model.graph.initializers if "." in name} for each in (found, wanted))
    assert next(named) == next(named)  # parameters keep their names


class Function(nn.Module):
    """A module of a function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor, others: Tensor) -> Any:
        return self.function(values, others)


def _in_place(values: Tensor, others: Tensor) -> Tensor:
    made = values * 2
    made += others.to(values.dtype)
    made *= values
    return made.sub_(1)


def _what_others_see(values: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    made = values * 2
    before = made.view(-1)
    made += others.to(values.dtype)
    return before, made


def _a_view_in_place(values: Tensor, others: Tensor) -> Tensor:
    made = values * 2
    made[0] += others[0].to(values.dtype)
    return made


def _what_a_cast_was_given(values: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    made = values * 2
    cast = made.type_as(values)
    cast += others.to(values.dtype)
    return made, cast


def _narrow_in_place(values: Tensor, others: Tensor) -> Tensor:
    return (values * 2).add_(others.to(torch.float64))


VALUES = torch.arange(-6, 6, dtype=torch.float32).reshape(3, 4) / 3
OTHERS = torch.tensor([[0, 1, 0, 2], [3, 0, -1, 0], [1, 1, 0, 0]])


def exported(function: Callable[..., Any], training: bool = False) -> tuple[ir.Model, list[Tensor]]:
    """Its file, and what it returns."""
    module = Function(function).train(training)
    program = decomposed_in_place(torch.export.export(module, (VALUES, OTHERS)))
    made = torch.onnx.export(program, (), opset_version=21, verbose=False)
    assert made is not None
    returned = module(VALUES, OTHERS)
    return made.model, list(returned) if isinstance(returned, tuple) else [returned]


def assert_right(model: ir.Model, wanted: list[Tensor]) -> None:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    given: Mapping[str, np.ndarray[Any, Any]] = {"values": VALUES.numpy(), "others": OTHERS.numpy()}
    found = session.run(None, {each.name: given[each.name] for each in session.get_inputs()})
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.numpy().dtype
        np.testing.assert_allclose(one, other.numpy(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda values, others: (values > 0) & (others > 0),
        lambda values, others: (values > 0) | (others > 0),
        lambda values, others: (torch.min(values, others.float()), torch.max(values, others.float())),
        lambda values, others: others.to(torch.float32) * values.to(torch.float64),
        lambda values, others: values.to("cpu") + others.to(values),
        lambda values, others: (values.to(torch.float32), others.to("cpu") * 2),
        lambda values, others: nn.functional.dropout(values, 0.5, False) + others,
        lambda values, others: nn.functional.dropout(values * others, 0.5, False).contiguous().reshape(2, -1),
        lambda values, others: values.transpose(0, 1).reshape(-1)[others.size(1) :],
        _in_place,
        lambda values, others: nn.functional.scaled_dot_product_attention(*[values[None, None]] * 3) * others,
        lambda values, others: values.masked_fill(others == 0, -1.0).softmax(-1).where(others > 0, 0.5),
        lambda values, others: values.sum(-1).clamp(-1, 1).sqrt() + others.amax(-1).repeat(1),
        lambda values, others: values.transpose(0, 1).contiguous().view(2, 6).chunk(2, -1)[1].type_as(others),
    ],
    ids=[
        "and",
        "or",
        "min, max",
        "casts",
        "places",
        "casts of outputs",
        "dropout",
        "views",
        "sizes",
        "in place",
        "attention",
        "masks",
        "reductions",
        "chunks",
    ],
)
def test_what_is_replaced_where_it_stands(function: Callable[..., Any], retraced: list[str]) -> None:
    model, wanted = exported(function)
    assert retraced == []
    assert_right(model, wanted)


@pytest.mark.parametrize(
    "function",
    [
        _what_others_see,
        _a_view_in_place,
        _what_a_cast_was_given,
        _narrow_in_place,
        lambda values, others: torch.addmm(values, others.float()[:, :3], values),
        lambda values, others: torch.rsub(values, 1) + others,
    ],
    ids=[
        "seen by others",
        "a view in place",
        "behind a cast",
        "narrow in place",
        "no operator of encoders",
        "arguments in another order",
    ],
)
def test_what_is_left_to_torch(function: Callable[..., Any], retraced: list[str]) -> None:
    model, wanted = exported(function)
    assert retraced == ["again"]
    assert_right(model, wanted)


def test_a_dropout_that_drops_is_left_to_torch(retraced: list[str]) -> None:
    program = torch.export.export(Function(_drop).train(), (VALUES, OTHERS))
    decomposed_in_place(program).run_decompositions({})
    assert retraced == ["again"]


def test_in_place_behind_a_dropout_is_left_to_torch(retraced: list[str]) -> None:
    """It gives its argument itself where nothing is trained. (Others see it, too, which torch leaves out.)"""
    program = torch.export.export(
        Function(lambda values, others: nn.functional.dropout(values * 2, 0.5, False).add_(others)), (VALUES, OTHERS)
    )
    decomposed_in_place(program).run_decompositions({})
    assert retraced == ["again"]


def _drop(values: Tensor, others: Tensor) -> Tensor:
    return nn.functional.dropout(values, 0.5, True) + others


def test_what_another_release_takes_apart_is_left_to_it(retraced: list[str]) -> None:
    program = torch.export.export(Function(lambda values, others: values * others), (VALUES, OTHERS))
    assert decomposed_in_place(program) is program
    program.run_decompositions({torch.ops.aten.add.Tensor: None})
    assert retraced == []
    program.run_decompositions({torch.ops.aten.mul.Tensor: lambda one, other: one / other.reciprocal()})
    assert retraced == ["again"]


def test_all_or_nothing(retraced: list[str]) -> None:
    """Where something is left to torch, all is: it finds the program as it was exported."""
    program = torch.export.export(
        Function(lambda values, others: torch.logaddexp((values > 0).to(torch.float64), others)), (VALUES, OTHERS)
    )
    before = Counter(str(node.target) for node in program.graph.nodes)
    decomposed_in_place(program).run_decompositions({})
    assert retraced == ["again"]
    assert Counter(str(node.target) for node in program.graph.nodes) == before
