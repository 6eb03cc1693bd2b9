"""Scripted functions in a forward: they are recorded as the Python functions that they were made from."""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertOutput

import qdq_surgery as qs
from qdq_surgery.errors import MatchError, TraceError
from qdq_surgery.graph.block_graph import BlockGraph, flatten_call
from qdq_surgery.graph.compiled_graph import compile_graph
from qdq_surgery.graph.replay import check_replay
from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.safety.torch_private import python_function
from qdq_surgery.trace.recorder import record


def scaled_size(x: Tensor, factor: int) -> Tensor:
    return torch.sqrt(torch.tensor(x.size(-1), dtype=torch.float) * factor)


def scaled_product(x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y.transpose(-1, -2)) / scripted_size(x, 2)


scripted_size = torch.jit.script(scaled_size)
scripted_product = torch.jit.script(scaled_product)


helpers = types.ModuleType("helpers_of_a_library")
vars(helpers).update(size=scripted_size, unused=len)


def through_python(x: Tensor) -> Tensor:
    return x / scripted_size(x, 3)


def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)


class ByGlobal(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * scripted_size(x, factor=x.size(1)))


class BelowOne(Block):
    """A scripted function that calls another."""

    def forward(self, x: Tensor) -> Tensor:
        return scripted_product(self.first(x), x)


class ByFunction(Block):
    def forward(self, x: Tensor) -> Tensor:
        return through_python(self.first(x))


class ByModule(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * helpers.size(x, 5)


class ByMethod(Block):
    def scale(self, x: Tensor) -> Tensor:
        return scripted_size(x, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.scale(x)


class ByAttribute(Block):
    def __init__(self) -> None:
        super().__init__()
        self.size = scripted_size

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * self.size(x, 4)


class ByCell(Block):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * scripted_size(x, 4)


class InComprehension(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(x) * scripted_size(x, factor) for factor in (1, 2)])


class OnOwnInput(Block):
    """A function that gives back what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + same(x)


@torch.jit.script
def same(x: Tensor) -> Tensor:
    return x


def recorded(block: nn.Module, *args: Any) -> BlockGraph:
    return record(shadow(block), type(block).forward, args, {})[0]


def operators(graph: BlockGraph) -> list[str]:
    return [node.meta["op"] for node in graph.graph.nodes if node.op.startswith("call")]


KINDS = [ByGlobal, BelowOne, ByFunction, ByModule, ByMethod, ByAttribute, ByCell, InComprehension, OnOwnInput]


@pytest.mark.parametrize("kind", KINDS, ids=[kind.__name__ for kind in KINDS])
@pytest.mark.parametrize("shape", [(2, 5, 8), (3, 7, 8)], ids=str)
def test_a_scripted_function_is_recorded_as_its_python_function(kind: type[Block], shape: tuple[int, int, int]) -> None:
    block = kind()
    graph = recorded(block, torch.randn(2, 5, 8))
    assert "scripted" not in operators(graph)
    check_replay(graph)
    x = torch.randn(*shape)
    with torch.no_grad():
        assert torch.equal(compile_graph(graph).run(block, flatten_call((x,), {})[0]), block(x))
    assert sys.getprofile() is None


def test_the_operators_in_it_are_those_that_rules_know() -> None:
    assert {"matmul", "transpose", "div"} <= set(operators(recorded(BelowOne(), torch.randn(2, 5, 8))))


def test_nothing_is_changed_in_the_module_that_calls() -> None:
    recorded(ByModule(), torch.randn(2, 5, 8))
    recorded(ByGlobal(), torch.randn(2, 5, 8))
    assert isinstance(scripted_size, torch.jit.ScriptFunction)
    assert vars(helpers)["size"] is scripted_size
    assert ByGlobal.forward.__globals__ is globals()


#: As a library may hold them in binary form: nobody knows what Python they were.
of_a_file = torch.jit.CompilationUnit(
    """
def scaled_size(x: Tensor, factor: int):
    return torch.sqrt(torch.tensor(x.size(-1)) * float(factor))

def added(x: Tensor, y: Tensor):
    return x + y
"""
)
size_of_a_file, sum_of_a_file = of_a_file.scaled_size, of_a_file.added


class Leaf(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) * size_of_a_file(x, 4)


class HidesASum(Block):
    def forward(self, x: Tensor) -> Tensor:
        return sum_of_a_file(self.first(x), x)


def test_one_without_its_python_function_is_one_operator() -> None:
    assert python_function(size_of_a_file) is None
    block = Leaf()
    graph = recorded(block, torch.randn(2, 5, 8))
    assert operators(graph).count("scripted") == 1
    check_replay(graph)
    x = torch.randn(3, 7, 8)
    with torch.no_grad():
        assert torch.equal(compile_graph(graph).run(block, [x]), block(x))


def test_one_that_may_hide_sites_is_refused() -> None:
    message = r"HidesASum\.forward: test_hidden_calls\.py:\d+ calls the scripted function added, which holds aten::add"
    with pytest.raises(TraceError, match=message):
        recorded(HidesASum(), torch.randn(2, 5, 8))


def doubled_beyond_five(x: Tensor) -> Tensor:
    return x * 2 if x.size(1) > 5 else x


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of torch: that tracing goes away, and that it cannot hold a decision
    traced_at_five = torch.jit.trace(doubled_beyond_five, torch.randn(2, 5, 8), check_trace=False)


class Traced(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(traced_at_five(x))


def test_one_that_computes_something_else_is_refused() -> None:
    block = Traced()
    recorded(block, torch.randn(2, 5, 8))
    with pytest.raises(TraceError, match="calls doubled_beyond_five, a scripted function that computes something else"):
        recorded(block, torch.randn(2, 6, 8))


@torch.jit.script
def dropped_and_added(x: Tensor, y: Tensor, probability: float, training: bool) -> Tensor:
    return torch.nn.functional.dropout(x, p=probability, training=training) + y


class FusedOutput(BertOutput):
    """Megatron's idiom: dropout and the residual add in one scripted function."""

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        summed = dropped_and_added(self.dense(hidden_states), input_tensor, self.dropout.p, self.training)
        return self.LayerNorm(summed)


class HidingOutput(BertOutput):
    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(sum_of_a_file(self.dense(hidden_states), input_tensor))


def bert_with(output: type[BertOutput]) -> BertModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    model = BertModel._from_config(config, attn_implementation="eager").eval()
    for layer in model.encoder.layer:
        layer.output.__class__ = output
    return model


def test_a_model_with_scripted_residual_adds_is_converted_exactly() -> None:
    model = bert_with(FusedOutput)
    converted = qs.convert(model)
    assert len(qs.quantizers(converted)) == len(qs.quantizers(qs.convert(bert_with(BertOutput))))
    ids = torch.randint(0, 60, (2, 9))
    with torch.no_grad(), qs.quantization_disabled(converted):
        assert torch.equal(converted(ids).last_hidden_state, model(ids).last_hidden_state)
    for each in (model, converted):
        each.train()
    with qs.quantization_disabled(converted):
        found = []
        for each in (model, converted):
            torch.manual_seed(1)
            found.append(each(ids).last_hidden_state)
    assert torch.equal(*found)


def test_an_error_about_a_count_names_the_block_that_has_no_graph() -> None:
    with pytest.raises(
        MatchError, match=r"^encoder\.layer\.0\.output of BertModel has no graph: HidingOutput\.forward"
    ):
        qs.convert(bert_with(HidingOutput))
