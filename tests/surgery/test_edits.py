"""Edits of a recorded graph: each at its place in the source, each kind by its own function."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import BlockGraph
from qdq_surgery.graph.compiled_graph import compile_graph
from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.match.edits import Edit, InsertQuantizer, Origin
from qdq_surgery.surgery.edits import apply_edit, apply_edits
from qdq_surgery.trace.recorder import record


@dataclass(frozen=True)
class Rescale:
    """A toy kind of edit: what an operator gives is multiplied by a number, and its reader divides by it."""

    counted: ClassVar[str] = "scales"

    origin: Origin
    factor: float


@apply_edit.register
def _rescale(edit: Rescale, graph: Graph, node: Node) -> None:
    readers = list(node.users)
    with graph.inserting_after(node):
        scaled = graph.call_function(operator.mul, (node, edit.factor))
    with graph.inserting_after(scaled):
        back = graph.call_function(operator.truediv, (scaled, edit.factor))
    for added in (scaled, back):
        added.meta.update(op="mul", origin=(*edit.origin, added.name), source=node.meta["source"])
    for reader in readers:
        reader.replace_input_with(node, back)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.doubled = Double()

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x, x.transpose(0, 1))
        return y + 1.0


class Double(nn.Module):
    """In place of a quantizer: what goes through it shows."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


X = torch.arange(4.0).reshape(2, 2)


def recorded() -> tuple[BlockGraph, Node]:
    """A block's graph, and the matmul in it."""
    graph, _ = record(shadow(Block()), Block.forward, (X,), {})
    return graph, next(node for node in graph.graph.nodes if node.meta.get("op") == "matmul")


def run(graph: BlockGraph) -> Any:
    return compile_graph(graph).run(Block(), [X])


@pytest.mark.parametrize("position", [0, 1])
def test_a_quantizer_stands_before_its_operand(position: int) -> None:
    graph, matmul = recorded()
    edit = InsertQuantizer(matmul.meta["origin"], position, "doubled", "matmul")
    assert apply_edits(graph.graph, [edit]) == [edit]
    inserted = matmul.args[position]
    assert isinstance(inserted, Node)
    assert (inserted.target, inserted.meta["op"]) == ("doubled", "quantizer")
    assert inserted.meta["origin"] == (*matmul.meta["origin"], position)
    torch.testing.assert_close(run(graph), 2.0 * (X @ X.T) + 1.0, rtol=0, atol=0)


def test_an_edit_of_another_place_is_not_made() -> None:
    graph, matmul = recorded()
    here = InsertQuantizer(matmul.meta["origin"], 0, "doubled", "matmul")
    elsewhere = InsertQuantizer(("elsewhere",), 0, "doubled", "matmul")
    assert apply_edits(graph.graph, [elsewhere, here]) == [here]


@pytest.mark.parametrize(
    ("position", "name"), [pytest.param(0, "add", id="another-operator"), pytest.param(2, "matmul", id="no-operand")]
)
def test_a_plan_for_other_code_is_refused(position: int, name: str) -> None:
    graph, matmul = recorded()
    edit = InsertQuantizer(matmul.meta["origin"], position, "doubled", name)
    with pytest.raises(TraceError, match=f"doubled belongs to operand {position} of a {name}.*convert it anew"):
        apply_edits(graph.graph, [edit])


def test_another_kind_of_edit_goes_the_same_way() -> None:
    # The seat of a new kind: one class and one registered function. Both kinds, at one place, in one call.
    graph, matmul = recorded()
    insert = InsertQuantizer(matmul.meta["origin"], 0, "doubled", "matmul")
    rescale = cast("Edit", Rescale(matmul.meta["origin"], 4.0))
    before = len(graph.graph.nodes)
    assert apply_edits(graph.graph, [rescale, insert]) == [rescale, insert]
    assert len(graph.graph.nodes) == before + 3
    torch.testing.assert_close(run(graph), 2.0 * (X @ X.T) + 1.0, rtol=0, atol=0)


def test_a_kind_that_nobody_registered_is_refused() -> None:
    @dataclass(frozen=True)
    class Unknown:
        origin: Origin

    graph, matmul = recorded()
    with pytest.raises(TypeError, match="no function is registered for a Unknown"):
        apply_edits(graph.graph, [cast("Edit", Unknown(matmul.meta["origin"]))])


def test_edits_say_what_they_add() -> None:
    assert str(InsertQuantizer((), 0, "a_quantizer", "add")) == "a_quantizer"
    assert InsertQuantizer.counted == "quantizers"
