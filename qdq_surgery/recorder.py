"""Run one block on example values and write down every operation as a node of a ``torch.fx`` graph.

Real tensors flow through the block's own forward, so Python control flow, C++ code and ``isinstance`` see what they
always see; a ``TorchFunctionMode`` notes each torch call as it happens. What keeps the graph general:

- *Sizes stay symbolic.* ``x.shape`` gives integers that know their node (:mod:`~qdq_surgery.symbols`) and pass that on
  in arithmetic, so ``x.view(*x.shape[:-1], -1, 64)`` holds for every batch and length.
- *Decisions are recorded.* A comparison of sizes becomes a node that checks, on each run, that it still turns out the
  same (:func:`~qdq_surgery.routine.expect`). Decisions that cannot be checked are refused with :class:`TraceError`.
- *Attributes are recorded.* Every plain attribute that the forward read (``training``, a dropout probability) is listed
  with its value: the graph holds as long as these are the same.

Children are leaves of the graph, called by path. Children that are blocks themselves are recorded on the way, each into
a routine of its own, so that one pass over an encoder layer gives the tree of its graphs with the links between them.
Nothing is patched anywhere: the block recorded is a stand-in made for the occasion.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from keyword import iskeyword
from types import FrameType
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from qdq_surgery.errors import TraceError
from qdq_surgery.facts import CHECKED, DTYPES, FACTS, refusal
from qdq_surgery.operators import callable_name, function_operator, is_leaf, module_operator
from qdq_surgery.places import grad_mode_owners, parameter_names, place
from qdq_surgery.replay import copied, example_of
from qdq_surgery.routine import PLAIN, SELF, Routine, describe_leaf, expect, flatten_call, join_path, rebuild_call
from qdq_surgery.stand_in import make_stand_in
from qdq_surgery.symbols import Real, Size, plain
from qdq_surgery.targets import apply_of, function_target, is_in_place, tensor_method
from qdq_surgery.tidy import is_parameter, tidy
from qdq_surgery.watch import unwatched, watching

__all__ = ["record", "recording_of"]

_SIZE_GETTERS = frozenset({"size", "shape"})


def record(
    block: nn.Module,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    path: str = "",
    kind: str = "forward",
    nested: bool = True,
) -> tuple[Routine, Any]:
    """Record ``function(block, *args, **kwargs)``.

    Args:
        block: A shadow, see :mod:`qdq_surgery.shadow`.
        function: The block's forward as its class has it, or the attention function.
        path: The block's path within the recorded unit.
        nested: Whether to record the blocks that are called on the way, too. If not, the block is one that is rewritten
            already and being called: a forward of its own, as accelerate's hooks set one, has let the call through.

    Returns:
        The routine and what the function returned.

    Raises:
        TraceError: The function does something that a graph cannot hold, and it is the outermost one.
    """
    if nested and kind == "forward" and "forward" in vars(block):
        raise TraceError(
            f"this {type(block).__name__} has a forward of its own (accelerate's hooks set one, for example); convert "
            "the model before it gets one"
        )
    recorder = _Recorder(block, path, kind, function, nested)
    return recorder.routine, recorder.run(function, args, kwargs)


def recording_of(module: nn.Module) -> _Recorder | None:
    """The recorder for which ``module`` stands in, or ``None`` for an ordinary module."""
    return cast("_Recorder | None", getattr(module, "_qdq_recorder", None))


class _Mode(TorchFunctionMode):
    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self.recorder.paused:
            return func(*args, **(kwargs or {}))
        with unwatched():
            return self.recorder.call_torch(func, args, kwargs or {})


class _Recorder:
    """Holds one routine while it is recorded."""

    def __init__(self, block: nn.Module, path: str, kind: str, function: Callable[..., Any], nested: bool) -> None:
        self.routine = Routine(path, kind, block, getattr(function, "__name__", "forward"))
        self.graph = self.routine.graph
        self.block, self.nested = block, nested
        self.paused = False
        self.stand_in = make_stand_in(block, "", self)
        self.alive: list[Any] = []  # ids are only identities while their objects live
        self.nodes: dict[int, Node] = {}
        self.tensor_paths = {id(t): name for name, t in (*block.named_parameters(), *block.named_buffers())}
        self.sizes: dict[tuple[Node, int], Size] = {}
        self.occurrences: dict[tuple[Any, ...], int] = {}
        self.leaf: Node | None = None  # the autograd function that is running
        self.grad_modes: dict[int, Node] = {}  # what torch.no_grad and its like found, by their ids
        self.forbidden: TraceError | None = None

    # -- running -----------------------------------------------------------------------------------------------

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values, paths = flatten_call(args, kwargs)
        before = example_of(self.block, values)
        self.routine.argument_paths = tuple(paths)
        self.routine.signature = tuple(describe_leaf(value) for value in values)
        names = parameter_names(function)
        leaves = iter([self._placeholder(value, path, names) for value, path in zip(values, paths, strict=True)])
        args, kwargs = rebuild_call(args, leaves), rebuild_call(kwargs, leaves)
        with torch.no_grad(), _Mode(self), watching(self):
            output = function(self.stand_in, *args, **kwargs)
        if self.forbidden is not None:  # the forward caught it
            raise self.forbidden
        self.routine.output = self.argument(output)
        self.graph.output(self.routine.output)
        tidy(self.graph)
        self.routine.example = before, copied(flatten_call((plain(output),), {})[0]), copied(values)
        return plain(output)

    def _placeholder(self, value: Any, path: str, names: list[str]) -> Any:
        head, _, rest = path.partition(".")
        if head.isdigit():
            head = names[int(head)] if int(head) < len(names) else f"arg_{head}"
        name = "_".join(part for part in (head, rest.replace(".", "_")) if part)
        if isinstance(value, nn.Module):
            if recording_of(value) is None and value is not self.block:
                raise TraceError(f"{self.where()} is handed a module as argument '{path}'")
            self.routine.inputs.append(self.self_node())
            return self.stand_in
        if isinstance(value, torch.Tensor):
            node = self._input(name, path, tuple(value.shape))
            # A new object for each: the same tensor may be handed over twice under two names.
            alias = value.detach()
            self._bind(alias, node)
            self.routine.inputs.append(node)
            return alias
        if isinstance(value, float):
            node = self._input(name, path, ())
            self.routine.inputs.append(node)
            return self._symbol(Real(float(value)), node)
        if isinstance(value, Size):
            value = int.__int__(value)
        if not isinstance(value, PLAIN):
            remedy = "; call with use_cache=False" if "past" in path or "cache" in path.lower() else ""
            raise TraceError(
                f"{self.where()} is handed a {type(value).__name__} as argument '{path}', and graphs take "
                f"tensors and plain values{remedy}"
            )
        self.routine.inputs.append(value)
        return value

    def _input(self, name: str, path: str, shape: tuple[int, ...]) -> Node:
        node = self.graph.placeholder(_safe(name))
        node.target = node.name  # two names that differ in what cannot stand in source are still two
        node.meta.update(op="input", shape=shape, origin=("input", path), source="")
        return node

    def where(self) -> str:
        return f"{type(self.block).__name__}.{self.routine.function}"

    # -- what the stand-ins and the mode report --------------------------------------------------------------

    def note_read(self, path: str, name: str, value: Any) -> None:
        if not self.paused:
            self.routine.reads[path, name] = value

    def call_child(self, path: str, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A child of the block is called: a leaf node, and a routine of its own if it is a block."""
        node = self._node(
            "call_module",
            path,
            args,
            kwargs,
            module_operator(child) if is_leaf(child) else "block",
            name=path.rpartition(".")[2],
        )
        node.meta["class"] = type(child)
        if is_leaf(child) or not self.nested:
            with self.pause():
                output = child(*plain(args), **plain(kwargs))
        else:
            output = self._nested(node, child, type(child).forward, args, kwargs, path=path, kind="forward")
        return self._result(node, output)

    def call_attention(
        self, target: Callable[..., Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The block calls the attention interface: ``args[0]`` is the block itself."""
        node = self._node("call_function", target, args, kwargs, "block", name="attention")
        if self.nested:
            output = self._nested(node, self.block, function, args[1:], kwargs, path="", kind="attention")
        else:
            with self.pause():
                output = function(self.block, *plain(args[1:]), **plain(kwargs))
        return self._result(node, output)

    def _nested(
        self,
        node: Node,
        block: nn.Module,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        path: str,
        kind: str,
    ) -> Any:
        whole = join_path(self.routine.path, path)
        with self.pause():
            args, kwargs = plain(args), plain(kwargs)
            try:
                routine, output = record(block, function, args, kwargs, path=whole, kind=kind)
            except TraceError as error:
                routine = Routine(whole, kind, block, getattr(function, "__name__", "forward"), failure=str(error))
                output = function(block, *args, **kwargs)
        routine.caller, routine.call = self.routine, node
        node.meta["callee"] = routine
        self.routine.children.append(routine)
        return output

    def call_torch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = callable_name(func)
        if getattr(func, "__name__", None) == "__set__":
            raise self.failure(f"sets {name} of a tensor, which a graph would lose; change its values in place")
        if name in _SIZE_GETTERS:
            return self._shape(args, kwargs)
        if name in FACTS:
            self.routine.reads_dtype |= name in DTYPES
            return func(*args, **kwargs)
        if func is torch._C._set_grad_enabled:
            return self._set_grad_mode(*args)
        if name == "__len__":
            size = self._size(args[0], 0)
            self.fix_size(size, int.__int__(size))
            return int.__int__(size)
        if name == "numel":
            node = self._node("call_method", "numel", args, kwargs, "numel")
            return self._symbol(Size(func(*args, **kwargs)), node)
        if name == "__iter__":
            return iter(self.call_torch(torch.Tensor.unbind, (args[0], 0), {}))
        if (reason := refusal(name)) is not None:
            raise self.failure(reason)
        node = self._operation(func, name, args, kwargs)
        with self.pause():
            output = func(*plain(args), **plain(kwargs))
        if name in CHECKED:
            self._expect(self._node("call_function", operator.eq, (node, output), {}, "size"), True)
            return output
        if name == "__setitem__":
            return output
        self._count(node, output)
        if is_in_place(name) and output is args[0]:
            # From here on the tensor is what this node returns.
            self._bind(output, node)
            return output
        return self._result(node, output)

    def _operation(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        op = "size" if name in CHECKED else function_operator(name, args, kwargs)
        if name == "__get__" or type(func).__name__ == "method-wrapper":
            return self._node("call_function", getattr, (args[0], name), {}, op, name=name)
        method = tensor_method(func)
        if method is None:
            return self._node("call_function", function_target(func), args, kwargs, op)
        if method == "__getitem__":
            return self._node("call_function", operator.getitem, args, kwargs, op)
        if method == "__setitem__":
            return self._node("call_function", operator.setitem, args, kwargs, op)
        return self._node("call_method", method, args, kwargs, op)

    def _count(self, node: Node, output: Any) -> None:
        """Python may loop over the parts of an output, so their number is a decision."""
        if type(output) in (tuple, list):
            count = self._node("call_function", len, (node,), {}, "size")
            self._expect(self._node("call_function", operator.eq, (count, len(output)), {}, "size"), True)

    def _set_grad_mode(self, mode: bool) -> None:
        """``torch.no_grad`` and its like: what they found is put back at their end, whatever it is on that run."""
        owners, ends = grad_mode_owners()
        wanted: bool | Node = mode
        if ends:
            known = [self.grad_modes[id(owner)] for owner in owners if id(owner) in self.grad_modes]
            if not known:
                raise self.failure("leaves a torch.no_grad() or its like that was made outside the forward")
            wanted = known[-1]
        else:
            before = self._node("call_function", torch.is_grad_enabled, (), {}, "grad_mode")
            self.alive.extend(owners)
            self.grad_modes.update({id(owner): before for owner in owners if id(owner) not in self.grad_modes})
        self._node("call_function", torch._C._set_grad_enabled, (wanted,), {}, "grad_mode")
        torch._C._set_grad_enabled(mode)

    # -- what the watch reports ------------------------------------------------------------------------------

    def enter_function(self, frame: FrameType) -> None:
        """An autograd function is one node, its own forward and backward together."""
        local = frame.f_locals
        args, kwargs = local["args"], local["kwargs"]
        self.leaf = self._node("call_function", apply_of(local["cls"]), args, kwargs, "autograd_function")
        self.paused = True

    def leave_function(self, output: Any) -> None:
        node, self.leaf, self.paused = self.leaf, None, False
        if node is None or output is None:
            return
        self._count(node, output)
        parts = output if isinstance(output, tuple) else (output,)
        for index, part in enumerate(parts):
            if isinstance(part, torch.Tensor):
                self._bind(part, self._item(node, index) if isinstance(output, tuple) else node)

    def forbid(self, what: str) -> None:
        self.forbidden = self.failure(what)
        raise self.forbidden

    def note_autocast(self) -> None:
        self.routine.reads_dtype = True

    def failure(self, what: str) -> TraceError:
        return TraceError(f"{self.where()}: {self.source()[1]} {what}")

    # -- numbers ---------------------------------------------------------------------------------------------

    def number(self, function: Callable[..., Any], operands: tuple[Any, ...], value: Any) -> Any:
        """The result of arithmetic on sizes."""
        if self.paused:
            return value
        node = self._node("call_function", function, operands, {}, "size")
        return self._symbol(Size(value) if isinstance(value, int) else Real(value), node)

    def decide(self, function: Callable[..., Any], operands: tuple[Any, ...], value: bool) -> bool:
        """A comparison of sizes: its result goes into Python, so the graph checks it from now on."""
        if not self.paused:
            self._expect(self._node("call_function", function, operands, {}, "size"), value)
        return value

    def _expect(self, node: Node, value: bool) -> None:
        self._node("call_function", expect, (node, value, f"{self.where()}, {self.source()[1]}"), {}, "expect")

    def fix_size(self, size: Size, value: int) -> None:
        """A size leaves as a plain integer: the graph checks from now on that it has this value."""
        self.decide(operator.eq, (size, value), True)

    def _shape(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        dim = args[1] if len(args) > 1 else kwargs.get("dim")
        if dim is not None:
            return self._size(tensor, int.__int__(dim) % tensor.ndim)
        return torch.Size([self._size(tensor, index) for index in range(tensor.ndim)])

    def _size(self, tensor: torch.Tensor, dim: int) -> Size:
        key = (self._tensor_node(tensor), dim)
        if key not in self.sizes:
            node = self._node("call_method", "size", (tensor, dim), {}, "size")
            with self.pause():
                self.sizes[key] = self._symbol(Size(tensor.shape[dim]), node)
        return self.sizes[key]

    def _symbol(self, value: Any, node: Node) -> Any:
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

    def _node(self, op: str, target: Any, args: Any, kwargs: Any, operator_name: str, name: str | None = None) -> Node:
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
        if isinstance(value, nn.Module) and recording_of(value) is self:
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
        self._bind(tensor, node)
        return node

    def _bind(self, tensor: torch.Tensor, node: Node) -> None:
        self.alive.append(tensor)
        self.nodes[id(tensor)] = node
        if node.meta.get("shape") is None:
            with self.pause():
                node.meta["shape"] = tuple(tensor.shape)

    def _result(self, node: Node, output: Any) -> Any:
        """Ties what a call returned to its node; elements of tuples get nodes of their own when they are used."""
        if isinstance(output, torch.Tensor):
            output = self._fresh(output)
            self._bind(output, node)
            return output
        if isinstance(output, tuple) and hasattr(output, "_fields"):
            items = [self._result(self._item(node, index), item) for index, item in enumerate(output)]
            return type(output)(*items)
        if isinstance(output, tuple) and type(output).__module__ == "torch.return_types":
            return type(output)([self._result(self._item(node, i), item) for i, item in enumerate(output)])
        if isinstance(output, (tuple, list)):
            return type(output)(self._result(self._item(node, index), item) for index, item in enumerate(output))
        if output is None or isinstance(output, (torch.dtype, torch.device)):
            return output
        raise TraceError(
            f"{self.where()}: {node.meta['source']} returns a {type(output).__name__}, which a graph cannot hold"
        )

    def _item(self, node: Node, index: int) -> Node:
        item = self.graph.call_function(operator.getitem, (node, index))
        item.meta.update(op="item", origin=(*node.meta["origin"], index), source=node.meta["source"], shape=None)
        return item

    def _fresh(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor as a new object if it is known by another node already (a dropout that lets everything pass)."""
        if id(tensor) in self.nodes or id(tensor) in self.tensor_paths:
            with self.pause():
                return tensor.detach()
        return tensor

    # -- where we are ----------------------------------------------------------------------------------------

    def source(self) -> tuple[tuple[Any, ...], str]:
        """Identity of the place in the source that is running, from the block's forward inwards; and file:line."""
        return place(_Recorder.run.__code__)

    def pause(self) -> _Pause:
        """While this holds, torch calls are not written down."""
        return _Pause(self)


class _Pause(unwatched):
    __slots__ = ("paused", "recorder")

    def __init__(self, recorder: _Recorder) -> None:
        self.recorder = recorder

    def __enter__(self) -> None:
        super().__enter__()
        self.paused = self.recorder.paused
        self.recorder.paused = True

    def __exit__(self, *_: object) -> None:
        self.recorder.paused = self.paused
        super().__exit__()


def _safe(name: str) -> str:
    """A node name that can stand in source, and does not hide the function's own ``self`` (a child of BERT's)."""
    word = re.sub(r"[^A-Za-z0-9_]", "_", name)
    if name == "self":
        return "self_attention"
    return f"_{word}" if not word or word[0].isdigit() or iskeyword(word) else word
