"""Blocks that are passed through on the way to those that are recorded."""

from __future__ import annotations

from typing import Any

import torch
from architectures import build
from torch import Tensor, nn

from qdq_surgery.graph.block_graph import BlockGraph
from qdq_surgery.graph.compiled_graph import compile_graph
from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.hf.example_inputs import make_examples
from qdq_surgery.trace.pass_through import BlockCall
from qdq_surgery.trace.recorder import look_for, record
from qdq_surgery.trace.units import survey

X = torch.arange(6.0).view(2, 3)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Keeping(nn.Module):
    """Sets an attribute of its own, which no stand-in lets it do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.seen = Inner(), 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen = 1
        return self.inner(x) - 1


class Outer(nn.Module):
    """Decides by an attribute whether it adds, and by a value of its tensor what it returns."""

    def __init__(self, inner: nn.Module, added: bool) -> None:
        super().__init__()
        self.inner, self.added, self.scale = inner, added, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x + 1 if self.added else x)
        return y if bool(y.sum() > 0) else -y


def looked_at(block: nn.Module, *wanted: tuple[str, str]) -> tuple[BlockGraph, Any]:
    return look_for(wanted)(BlockCall(shadow(block), type(block).forward, (X,), {}, "", "forward"))


def test_only_what_is_wanted_is_recorded() -> None:
    block = Outer(Inner(), added=True)
    seen, output = looked_at(block, ("inner", "forward"))
    assert torch.equal(output, block(X))
    assert [(graph.path, graph.kind, graph.failure) for graph in seen.walk()] == [
        ("", "forward", None),
        ("inner", "forward", None),
    ]
    assert not seen.graph.nodes
    assert seen.reads == {("", "added"): True}
    [inner] = seen.children
    assert torch.equal(compile_graph(inner).run(inner.owner, [X]), X * 2)
    whole, _ = record(shadow(block.inner), Inner.forward, (X + 1,), {}, path="inner")
    assert str(inner.graph) == str(whole.graph)


class Doubling(nn.Module):
    """Calls a block below it."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = Outer(Inner(), added=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(x) + x


def test_a_recording_passes_through_what_lies_in_it() -> None:
    block = Doubling()
    seen, output = looked_at(block, ("", "forward"), ("outer.inner", "forward"))
    assert torch.equal(output, block(X))
    assert [(graph.path, bool(graph.graph.nodes)) for graph in seen.walk()] == [
        ("", True),
        ("outer", False),
        ("outer.inner", True),
    ]
    assert [graph.reads for graph in seen.walk()] == [{}, {("", "added"): False}, {}]
    assert torch.equal(compile_graph(seen).run(block, [X + 1]), block(X + 1))


def test_a_block_that_takes_no_stand_in_is_run_without() -> None:
    block = Outer(Keeping(), added=False)
    seen, output = looked_at(block, ("inner.inner", "forward"))
    assert torch.equal(output, block(X))
    [keeping] = seen.children
    assert keeping.failure is not None
    assert "sets its own attribute 'seen'" in keeping.failure
    assert keeping.children == []


def test_what_an_attribute_decided_tells_layers_apart() -> None:
    model = build("bert", "BertModel").eval()
    layers = model.encoder.layer
    wanted = {(f"encoder.layer.{index}.attention.self", "attention") for index in range(2)}

    def trees() -> list[BlockGraph | None]:
        found = survey(model, make_examples(model, (2, 6)), only=wanted)
        return [unit.tree for unit in found.units if unit.layer is not None]

    one, other = trees()
    assert one is not None
    assert one is other
    layers[1].attention.self.scaling *= 2  # what the block around the attention function reads, and hands over
    one, other = trees()
    assert one is not None
    assert other is not None
    assert one is not other


def test_units_without_a_block_that_is_wanted_are_not_run_again() -> None:
    model = build("bert", "BertModel").eval()
    found = survey(model, make_examples(model, (2, 6)), only={("encoder.layer.1.output", "forward")})
    assert {unit.path for unit in found.units if unit.tree is not None} == {"encoder.layer.1"}
    recorded = [path for path, graph in found.graphs() if graph.graph.nodes]
    assert recorded == ["encoder.layer.1.output"]
