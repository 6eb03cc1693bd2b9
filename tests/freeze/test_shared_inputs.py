"""Linears that read one tensor with one grid quantize it once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import batch_for
from frozen_models import apart, calibrated, frozen, outputs
from torch import nn
from torch.fx import Graph

import qdq_surgery as qs
from qdq_surgery.freeze.forward import FrozenForward
from qdq_surgery.freeze.frozen_state import frozen_state
from qdq_surgery.freeze.shared_inputs import groups, makes, share_inputs

ATTENTION = "encoder.layer.0.attention.self"


class Block(nn.Module):
    """Three integer linears, the last with another grid."""

    def __init__(self) -> None:
        super().__init__()
        model = frozen(num_hidden_layers=1)
        attention = model.get_submodule(ATTENTION)
        self.q, self.k, self.v = attention.query, attention.key, attention.value
        self.v.input_grid.factor.mul_(1.5)


def graph_of(*lines: str) -> Graph:
    """A graph from lines such as ``q = q(x)``, or ``x.add_(1)`` for what is changed in place."""
    graph = Graph()
    values = {"x": graph.placeholder("x")}
    for line in lines:
        name, _, call = line.partition(" = ")
        target, _, argument = call.partition("(")
        operand = values[argument.rstrip(")")]
        made = graph.call_method("add_", (operand, 1)) if target == "add_" else graph.call_module(target, (operand,))
        made.meta.update(origin=(line,), source="here")
        values[name] = made
    graph.output(tuple(values.values()))
    return graph


def lines_of(graph: Graph) -> list[str]:
    return [f"{node.target}({node.args[0]})" for node in graph.nodes if node.op == "call_module"]


def test_nothing_to_share() -> None:
    graph = graph_of("q = q(x)", "v = v(x)")
    assert share_inputs(graph, Block()) == 0
    assert lines_of(graph) == ["q(x)", "v(x)"]


def test_before_and_after() -> None:
    graph = graph_of("q = q(x)", "k = k(x)", "v = v(x)")
    assert share_inputs(graph, Block()) == 1
    assert lines_of(graph) == ["q.input_grid(x)", "q(q_input_grid)", "k(q_input_grid)", "v(x)"]


def test_different_tensors_are_not_shared() -> None:
    graph = graph_of("q = q(x)", "k = k(q)")
    assert share_inputs(graph, Block()) == 0


def test_what_is_written_to_between_is_not_shared() -> None:
    graph = graph_of("q = q(x)", "y = add_(x)", "k = k(x)")
    assert groups(graph, Block()) == []


@pytest.mark.parametrize("between", [nn.ReLU(inplace=True), nn.Sequential(nn.ReLU(inplace=True))])
def test_a_module_between_may_write(between: nn.Module) -> None:
    block = Block()
    block.act = between
    assert groups(graph_of("q = q(x)", "y = act(x)", "k = k(x)"), block) == []


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_a_linear_that_is_watched_reads_what_it_read(register: str) -> None:
    qmodel = calibrated(num_hidden_layers=1)
    seen: list[torch.dtype] = []
    for name in ("query", "key"):
        linear = qmodel.get_submodule(f"{ATTENTION}.{name}")
        getattr(linear, register)(lambda _, args, *__: seen.append(args[0].dtype))
    key = qmodel.get_submodule(f"{ATTENTION}.key")
    key.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    model = qs.freeze(qmodel)
    seen.clear()
    batch = batch_for(qmodel, (3, 8))
    assert apart(outputs(model, batch), outputs(qmodel, batch)) < 1e-3
    assert set(seen) == {torch.float32}


def test_what_decides_is_the_same_for_blocks_that_are_alike() -> None:
    block, other = Block(), Block()
    assert makes(block) == makes(other) == (("q", 0), ("k", 0), ("v", 1))
    other.k.input_grid.factor.mul_(2.0)
    assert makes(block) != makes(other)


def test_queries_keys_and_values_of_a_model() -> None:
    model = frozen()
    [first, second] = frozen_state(model).shared.items()
    assert first == (ATTENTION, ((f"{ATTENTION}.query", f"{ATTENTION}.key", f"{ATTENTION}.value"),))
    assert second[0] == ATTENTION.replace("0", "1")
    count: list[int] = []
    for name in ("query", "key", "value"):
        grid = model.get_submodule(f"{ATTENTION}.{name}.input_grid")
        grid.register_forward_hook(lambda _, args, __: count.append(int(args[0].dtype != torch.uint8)))
    with torch.no_grad():
        model(**batch_for(model, (2, 5)))
    assert sum(count) == 1


def test_layers_with_other_ranges_have_graphs_of_their_own() -> None:
    qmodel = calibrated()
    key = qmodel.get_submodule(f"{ATTENTION.replace('0', '1')}.key._input_quantizer")
    key._amax.mul_(2.0)  # type: ignore[operator, union-attr]
    model = qs.freeze(qmodel)
    groups_of = frozen_state(model).shared
    assert [len(group) for [group] in groups_of.values()] == [3, 2]
    batch = batch_for(qmodel, (3, 8))
    assert apart(outputs(model, batch), outputs(qmodel, batch)) < 0.05
    own: list[Any] = [vars(model.get_submodule(path))["_qdq_forward"] for path in groups_of]
    assert all(isinstance(each, FrozenForward) for each in own)
    assert own[0].variants is not own[1].variants
    same = [vars(frozen().get_submodule(path))["_qdq_forward"] for path in groups_of]
    assert same[0].original is own[0].original
