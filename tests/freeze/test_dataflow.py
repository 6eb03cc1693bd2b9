"""Readers are found through blocks, and what leaves the recorded graphs is unknown."""

from __future__ import annotations

from typing import Any

import torch
from architectures import batch_for, build
from torch import nn

from qdq_surgery.freeze.dataflow import readers
from qdq_surgery.graph.block_graph import BlockGraph
from qdq_surgery.match.subgraph import Value
from qdq_surgery.trace.recorder import record
from qdq_surgery.trace.units import survey


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(4, 4), nn.Dropout(0.5)

    def forward(self, values: Any) -> Any:
        return self.drop(self.linear(values))


class Second(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, values: Any, more: Any = None) -> Any:
        return self.one(values) + self.other(values), more


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = First(), Second()

    def forward(self, values: Any) -> Any:
        made = self.first(values)
        result, _ = self.second(made, more=values)
        return result


def tree() -> BlockGraph:
    return record(Layer().eval(), Layer.forward, (torch.randn(2, 4),), {})[0]


def value(root: BlockGraph, block: str, target: str) -> Value:
    [found] = [
        Value(graph, node)
        for graph in root.walk()
        for node in graph.graph.nodes
        if graph.path == block and str(node.target) == target
    ]
    return found


def names(found: list[Value] | None) -> list[str] | None:
    return None if found is None else [f"{each.graph.path}:{each.node.target}" for each in found]


def test_out_of_one_block_and_into_the_next_past_a_dropout() -> None:
    assert names(readers(value(tree(), "first", "linear"))) == ["second:one", "second:other"]


def test_inside_a_block() -> None:
    [add] = readers(value(tree(), "second", "one")) or []
    assert add.op == "add"


def test_what_is_one_of_several_results_or_leaves_the_layer_is_unknown() -> None:
    root = tree()
    [add] = readers(value(root, "second", "one")) or []
    assert readers(add) is None


def test_what_nothing_reads_has_no_readers() -> None:
    root = tree()
    [layer] = [node for node in root.graph.nodes if node.op == "placeholder"]
    # Read by the first block's linear, and returned by the second as it is.
    assert readers(Value(root, layer)) is None


def test_of_a_real_layer() -> None:
    model = build("bert", "BertModel", num_hidden_layers=1)
    [root] = [unit.tree for unit in survey(model, batch_for(model, (2, 5))).units if unit.layer == 0]
    assert root is not None
    assert names(readers(value(root, "intermediate", "dense"))) == ["intermediate:intermediate_act_fn"]
    assert names(readers(value(root, "intermediate", "intermediate_act_fn"))) == ["output:dense"]
