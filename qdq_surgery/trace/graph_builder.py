"""The fx graph of a recording: a node for each operation, and which node each tensor and each size came from."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from keyword import iskeyword
from types import CodeType
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import PLAIN, SELF, BlockGraph, expect
from qdq_surgery.graph.cleanup import is_parameter
from qdq_surgery.graph.operators import callable_name
from qdq_surgery.graph.symbolic_sizes import Real, Size, plain
from qdq_surgery.trace.autograd_watch import unwatched
from qdq_surgery.trace.source_places import place

__all__ = ["GraphBuilder"]


class GraphBuilder:
    """Writes the graph of one routine.

    Attributes:
        stand_in: What the forward takes for the block: where it is handed on, the graph hands on the block.
        stop: The code that called the forward: where the place of an operation ends, seen from inside.
        paused: Whether what runs is not written down.
    """

    def __init__(self, routine: BlockGraph, block: nn.Module, stop: CodeType) -> None:
        self.routine, self.graph, self.block, self.stop = routine, routine.graph, block, stop
        self.stand_in: nn.Module | None = None
        self.paused = False
        self.alive: list[Any] = []  # ids are only identities while their objects live
        self.nodes: dict[int, Node] = {}
        self.tensor_paths = {id(t): name for name, t in (*block.named_parameters(), *block.named_buffers())}
        self.sizes: dict[tuple[Node, int], Size] = {}
        self.occurrences: dict[tuple[Any, ...], int] = {}

    def input(self, name: str, path: str, shape: tuple[int, ...]) -> Node:
        node = self.graph.placeholder(_safe(name))
        node.target = node.name  # two names that differ in what cannot stand in source are still two
        node.meta.update(op="input", shape=shape, origin=("input", path), source="")
        return node

    def finish(self) -> None:
        """The graph is written: let go of the example's tensors, which the circle with the stand-in would keep."""
        for held in (self.alive, self.nodes, self.sizes):
            held.clear()

    def where(self) -> str:
        return f"{type(self.block).__name__}.{self.routine.function}"

    def source(self) -> tuple[tuple[Any, ...], str]:
        """Identity of the place in the source that is running, from the block's forward inwards; and file:line."""
        return place(self.stop)

    def pause(self) -> _Pause:
        """While this holds, torch calls are not written down."""
        return _Pause(self)

    def failure(self, what: str) -> TraceError:
        return TraceError(f"{self.where()}: {self.source()[1]} {what}")

    # -- numbers ---------------------------------------------------------------------------------------------

    def number(self, function: Callable[..., Any], operands: tuple[Any, ...], value: Any) -> Any:
        """The result of arithmetic on sizes."""
        if self.paused:
            return value
        with unwatched():
            node = self.node("call_function", function, operands, {}, "size")
            return self.symbol(Size(value) if isinstance(value, int) else Real(value), node)

    def decide(self, function: Callable[..., Any], operands: tuple[Any, ...], value: bool) -> bool:
        """A comparison of sizes: its result goes into Python, so the graph checks it from now on."""
        if not self.paused:
            with unwatched():
                self.expect(self.node("call_function", function, operands, {}, "size"), value)
        return value

    def expect(self, node: Node, value: bool) -> None:
        self.node("call_function", expect, (node, value, f"{self.where()}, {self.source()[1]}"), {}, "expect")

    def fix_size(self, size: Size, value: int) -> None:
        """A size leaves as a plain integer: the graph checks from now on that it has this value."""
        self.decide(operator.eq, (size, value), True)

    def shape_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if dim is not None:
            return self.size_of(tensor, int.__int__(dim) % tensor.ndim)
        return torch.Size([self.size_of(tensor, index) for index in range(tensor.ndim)])

    def size_of(self, tensor: torch.Tensor, dim: int) -> Size:
        key = (self._tensor_node(tensor), dim)
        if key not in self.sizes:
            node = self.node("call_method", "size", (tensor, dim), {}, "size")
            with self.pause():
                self.sizes[key] = self.symbol(Size(tensor.shape[dim]), node)
        return self.sizes[key]

    def symbol(self, value: Any, node: Node) -> Any:
        value.node, value.recorder = node, self
        return value

    # -- nodes -----------------------------------------------------------------------------------------------

    def self_node(self) -> Node:
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.target == SELF:
                return cast(Node, node)
        first = next(iter(self.graph.nodes), None)
        with self.graph.inserting_before(first):
            node = self.graph.placeholder(SELF)
        node.meta.update(op="input", shape=None, origin=("input", SELF), source="")
        return node

    def node(self, op: str, target: Any, args: Any, kwargs: Any, operator_name: str, name: str | None = None) -> Node:
        args, kwargs = self.argument(tuple(args)), self.argument(dict(kwargs))
        kwargs.pop("_stacklevel", None)
        if operator_name == "add" and any(is_parameter(argument) for argument in args):
            operator_name = "bias_add"
        node = self.graph.create_node(op, target, args, kwargs, name=_safe(name) if name else None)
        frames, source = self.source()
        key = (frames, op, target if isinstance(target, str) else callable_name(target))
        occurrence = self.occurrences[key] = self.occurrences.get(key, 0) + 1
        node.meta.update(op=operator_name, origin=(*key, occurrence), source=source, shape=None)
        return node

    def argument(self, value: Any) -> Any:
        """A value as fx holds it: tensors and sizes become the nodes they came from."""
        if isinstance(value, Node):
            return value
        if isinstance(value, torch.Tensor):
            return self._tensor_node(value)
        if isinstance(value, (Size, Real)):
            if value.recorder is self:
                return value.node
            return plain(value)
        if type(value) is dict:
            return {key: self.argument(item) for key, item in value.items()}
        if isinstance(value, (tuple, list)):
            items = [self.argument(item) for item in value]
            return items if isinstance(value, list) else tuple(items)
        if isinstance(value, slice):
            return slice(self.argument(value.start), self.argument(value.stop), self.argument(value.step))
        if isinstance(value, (*PLAIN, torch.memory_format, torch.layout, type(...))):
            return value
        if value is self.stand_in:
            return self.self_node()
        raise self.failure(f"uses a {type(value).__name__}, which a graph cannot hold")

    def _tensor_node(self, tensor: torch.Tensor) -> Node:
        node = self.nodes.get(id(tensor))
        if node is not None:
            return node
        path = self.tensor_paths.get(id(tensor))
        if path is None:
            raise self.failure(
                "uses a tensor from outside the block, or one that a scripted function made; hand it over, or "
                "make it a buffer"
            )
        first = next((n for n in self.graph.nodes if n.op not in ("placeholder", "get_attr")), None)
        with self.graph.inserting_before(first):
            node = self.graph.create_node("get_attr", path, (), {}, name=_safe(path.replace(".", "_")))
        node.meta.update(op="parameter", shape=tuple(tensor.shape), origin=("get_attr", path), source="")
        self.bind(tensor, node)
        return node

    def bind(self, tensor: torch.Tensor, node: Node) -> None:
        self.alive.append(tensor)
        self.nodes[id(tensor)] = node
        if node.meta.get("shape") is None:
            with self.pause():
                node.meta["shape"] = tuple(tensor.shape)

    def result(self, node: Node, output: Any) -> Any:
        """Ties what a call returned to its node; elements of tuples get nodes of their own when they are used."""
        if isinstance(output, torch.Tensor):
            output = self._fresh(output)
            self.bind(output, node)
            return output
        if isinstance(output, tuple) and hasattr(output, "_fields"):
            items = [self.result(self.item(node, index), item) for index, item in enumerate(output)]
            return type(output)(*items)
        if isinstance(output, tuple) and type(output).__module__ == "torch.return_types":
            return type(output)([self.result(self.item(node, i), item) for i, item in enumerate(output)])
        if isinstance(output, (tuple, list)):
            return type(output)(self.result(self.item(node, index), item) for index, item in enumerate(output))
        if type(output) is dict and all(type(key) is str for key in output):
            return {key: self.result(self.item(node, key), item) for key, item in output.items()}
        if output is None or isinstance(output, (torch.dtype, torch.device)):
            return output
        raise TraceError(
            f"{self.where()}: {node.meta['source']} returns a {type(output).__name__}, which a graph cannot hold"
        )

    def item(self, node: Node, index: int | str) -> Node:
        item = self.graph.call_function(operator.getitem, (node, index))
        item.meta.update(op="item", origin=(*node.meta["origin"], index), source=node.meta["source"], shape=None)
        return item

    def _fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as a new object if it is known by another node already (a dropout that lets everything pass)."""
        if id(tensor) in self.nodes or id(tensor) in self.tensor_paths:
            with self.pause():
                return tensor.detach()
        return tensor


class _Pause(unwatched):
    __slots__ = ("builder", "paused")

    def __init__(self, builder: GraphBuilder) -> None:
        self.builder = builder

    def __enter__(self) -> None:
        super().__enter__()
        self.paused = self.builder.paused
        self.builder.paused = True

    def __exit__(self, *_: object) -> None:
        self.builder.paused = self.paused
        super().__exit__()


def _safe(name: str) -> str:
    """A node name that can stand in source, and does not hide the function's own ``self`` (a child of BERT's)."""
    word = re.sub(r"[^A-Za-z0-9_]", "_", name)
    if name == "self":
        return "self_attention"
    return f"_{word}" if not word or word[0].isdigit() or iskeyword(word) else word
