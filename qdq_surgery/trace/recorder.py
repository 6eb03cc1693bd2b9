"""Run one block on example values and write down every operation as a node of a ``torch.fx`` graph.

Real tensors flow through the block's own forward, so Python control flow, C++ code and ``isinstance`` see what they
always see; a ``TorchFunctionMode`` notes each torch call as it happens. What keeps the graph general:

- *Sizes stay symbolic.* ``x.shape`` gives integers that know their node (:mod:`~qdq_surgery.graph.symbolic_sizes`) and
  pass that on in arithmetic, so ``x.view(*x.shape[:-1], -1, 64)`` holds for every batch and length.
- *Decisions are recorded.* A comparison of sizes becomes a node that checks, on each run, that it still turns out the
  same (:func:`~qdq_surgery.graph.block_graph.expect`). Decisions that cannot be checked are refused with
  :class:`TraceError`.
- *Attributes are recorded.* Every plain attribute that the forward read (``training``, a dropout probability) is listed
  with its value: the graph holds as long as these are the same.

Children are leaves of the graph, called by path. Children that are blocks themselves are recorded on the way, each into
a routine of its own, so that one pass over an encoder layer gives the tree of its graphs with the links between them.
Nothing is patched anywhere: the block recorded is a stand-in made for the occasion.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, cast

import torch
from torch import nn
from torch.fx import Node
from torch.overrides import TorchFunctionMode

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import (
    PLAIN,
    BlockGraph,
    describe_leaf,
    flatten_call,
    join_path,
    rebuild_call,
)
from qdq_surgery.graph.call_targets import apply_of, function_target, is_in_place, tensor_method
from qdq_surgery.graph.cleanup import tidy
from qdq_surgery.graph.operators import INSIDE, PRODUCTS, callable_name, function_operator, is_leaf, module_operator
from qdq_surgery.graph.replay import agrees, copied, example_of
from qdq_surgery.graph.symbolic_sizes import Real, Size, plain
from qdq_surgery.safety.random_state import kept_random
from qdq_surgery.safety.torch_private import FakeTensor, python_function, set_grad_enabled
from qdq_surgery.trace.autograd_watch import unwatched, watching
from qdq_surgery.trace.graph_builder import GraphBuilder
from qdq_surgery.trace.hidden_calls import Applied, Copies, autograd_function, products_inside
from qdq_surgery.trace.pass_through import BlockCall, Look, check_forward, look_within, pass_through
from qdq_surgery.trace.proxy_module import make_stand_in
from qdq_surgery.trace.source_places import grad_mode_owners, parameter_names
from qdq_surgery.trace.tensor_facts import CHECKED, DTYPES, FACTS, refusal

__all__ = ["Wanted", "look_for", "record", "recording_of"]

#: (path of the block within the recorded unit, kind) of each one to record.
Wanted = Collection[tuple[str, str]]

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
    wanted: Wanted | None = None,
) -> tuple[BlockGraph, Any]:
    """Record ``function(block, *args, **kwargs)``.

    Args:
        block: A shadow, see :mod:`qdq_surgery.graph.shell_copy`.
        function: The block's forward as its class has it, or the attention function.
        path: The block's path within the recorded unit.
        nested: Whether to record the blocks that are called on the way, too. If not, the block is one that is rewritten
            already and being called: a forward of its own, as accelerate's hooks set one, has let the call through.
        wanted: Which of these to record; ``None``: all. The others are run, and what they read is noted.

    Returns:
        The routine and what the function returned.

    Raises:
        TraceError: The function does something that a graph cannot hold, and it is the outermost one.
    """
    if nested:
        check_forward(block, kind)
    recorder = _Recorder(block, path, kind, function, nested, wanted)
    try:
        return recorder.routine, recorder.run(function, args, kwargs)
    finally:
        recorder.build.finish()


def look_for(wanted: Wanted | None) -> Look:
    """:func:`record` for blocks that are wanted, and a mere run for the others."""

    def look(call: BlockCall) -> tuple[BlockGraph, Any]:
        if wanted is None or (call.path, call.kind) in wanted:
            block, function, args, kwargs, path, kind = call
            return record(block, function, args, kwargs, path=path, kind=kind, wanted=wanted)
        return pass_through(call, look)

    return look


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
        if self.recorder.build.paused:
            self.recorder.note_inside(func, args, kwargs or {})
            return func(*args, **(kwargs or {}))
        with unwatched():
            return self.recorder.call_torch(func, args, kwargs or {})


class _Recorder:
    """Holds one routine while it is recorded."""

    def __init__(
        self,
        block: nn.Module,
        path: str,
        kind: str,
        function: Callable[..., Any],
        nested: bool,
        wanted: Wanted | None,
    ) -> None:
        self.routine = BlockGraph(path, kind, block, getattr(function, "__name__", "forward"))
        self.block, self.nested, self.look = block, nested, look_for(wanted)
        self.build = GraphBuilder(self.routine, block, type(self).run.__code__)
        self.copies = Copies(self._instead)
        self.build.stand_in = self.stand_in = make_stand_in(block, "", self)
        self.leaf: Node | None = None  # the autograd function that is running
        self.grad_modes: dict[int, Node] = {}  # what torch.no_grad and its like found, by their ids
        self.forbidden: TraceError | None = None

    @property
    def paused(self) -> bool:
        """Whether what runs is not written down."""
        return self.build.paused

    @paused.setter
    def paused(self, value: bool) -> None:
        self.build.paused = value

    def pause(self) -> AbstractContextManager[None]:
        """While this holds, torch calls are not written down."""
        return self.build.pause()

    # -- running -----------------------------------------------------------------------------------------------

    def run(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        values, paths = flatten_call(args, kwargs)
        before = example_of(self.block, values)
        self.routine.argument_paths = tuple(paths)
        self.routine.signature = tuple(describe_leaf(value) for value in values)
        names = parameter_names(function)
        leaves = iter([self._placeholder(value, path, names) for value, path in zip(values, paths, strict=True)])
        args, kwargs = rebuild_call(args, leaves), rebuild_call(kwargs, leaves)
        run = self.copies.of(function)
        with torch.no_grad(), _Mode(self), watching(self):
            output = run(self.stand_in, *args, **kwargs)
        if self.forbidden is not None:  # the forward caught it
            raise self.forbidden
        self.routine.output = self.build.argument(output)
        self.build.graph.output(self.routine.output)
        tidy(self.build.graph)
        self.routine.example = before, copied(flatten_call((plain(output),), {})[0]), copied(values)
        return plain(output)

    def _placeholder(self, value: Any, path: str, names: list[str]) -> Any:
        head, _, rest = path.partition(".")
        if head.isdigit():
            head = names[int(head)] if int(head) < len(names) else f"arg_{head}"
        name = "_".join(part for part in (head, rest.replace(".", "_")) if part)
        if isinstance(value, nn.Module):
            if recording_of(value) is None and value is not self.block:
                raise TraceError(f"{self.build.where()} is handed a module as argument '{path}'")
            self.routine.inputs.append(self.build.self_node())
            return self.stand_in
        if isinstance(value, torch.Tensor):
            node = self.build.input(name, path, tuple(value.shape))
            # A new object for each: the same tensor may be handed over twice under two names.
            alias = value.detach()
            self.build.bind(alias, node)
            self.routine.inputs.append(node)
            return alias
        if isinstance(value, float):
            node = self.build.input(name, path, ())
            self.routine.inputs.append(node)
            return self.build.symbol(Real(float(value)), node)
        if isinstance(value, Size):
            value = int.__int__(value)
        if not isinstance(value, PLAIN):
            remedy = "; call with use_cache=False" if "past" in path or "cache" in path.lower() else ""
            raise TraceError(
                f"{self.build.where()} is handed a {type(value).__name__} as argument '{path}', and graphs take "
                f"tensors and plain values{remedy}"
            )
        self.routine.inputs.append(value)
        return value

    # -- what the stand-ins and the mode report --------------------------------------------------------------

    def note_read(self, path: str, name: str, value: Any) -> None:
        if not self.build.paused:
            self.routine.reads[path, name] = value

    def to_call(self, value: Any) -> Any:
        """What a forward gets for a method, or another function, that it reads."""
        if self.build.paused:
            return value
        with unwatched():
            return self.copies.of(value)

    def call_child(self, path: str, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A child of the block is called: a leaf node, and a routine of its own if it is a block."""
        with unwatched():
            return self._child(path, child, args, kwargs)

    def _child(self, path: str, child: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        node = self.build.node(
            "call_module",
            path,
            args,
            kwargs,
            module_operator(child) if is_leaf(child) else "block",
            name=path.rpartition(".")[2],
        )
        node.meta["class"] = type(child)
        if is_leaf(child) or not self.nested:
            with self.build.pause():
                output = child(*plain(args), **plain(kwargs))
        else:
            output = self._nested(node, child, type(child).forward, args, kwargs, path=path, kind="forward")
        return self.build.result(node, output)

    def call_attention(
        self, target: Callable[..., Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The block calls the attention interface: ``args[0]`` is the block itself."""
        with unwatched():
            return self._attention(target, function, args, kwargs)

    def _attention(
        self, target: Callable[..., Any], function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        node = self.build.node("call_function", target, args, kwargs, "block", name="attention")
        if self.nested:
            output = self._nested(node, self.block, function, args[1:], kwargs, path="", kind="attention")
        else:
            with self.build.pause():
                output = function(self.block, *plain(args[1:]), **plain(kwargs))
        return self.build.result(node, output)

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
        with self.build.pause():
            args, kwargs = plain(args), plain(kwargs)
            routine, output = look_within(self.look, BlockCall(block, function, args, kwargs, whole, kind))
        routine.caller, routine.call = self.routine, node
        node.meta["callee"] = routine
        self.routine.children.append(routine)
        return output

    def _instead(self, hidden: Any) -> Any:
        """What a forward calls where it called what nobody is told of."""
        # (A partial, which C calls: the place of the call is told as it is for a function of torch.)
        function = autograd_function(hidden)
        if function is None:
            return functools.partial(self.call_scripted, hidden)
        apply = functools.partial(self.call_function, function)
        return Applied(function, apply) if hidden is function else apply

    def call_function(self, function: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        """An autograd function is called: one node, its own forward and backward together."""
        apply: Callable[..., Any] = function.apply
        if self.paused:
            return apply(*plain(args), **plain(kwargs))
        self.leaf = node = self.build.node("call_function", apply_of(function), args, kwargs, "autograd_function")
        try:
            with self.build.pause():
                output = apply(*plain(args), **plain(kwargs))
        finally:
            self.leaf = None
        self._bind_parts(node, output)
        return output

    def call_scripted(self, scripted: Any, *args: Any, **kwargs: Any) -> Any:
        """A scripted function is called: the Python function that it was made from, or a leaf if there is none."""
        original = python_function(scripted)
        if self.paused:
            return scripted(*plain(args), **plain(kwargs))
        if original is None:
            return self._scripted_leaf(scripted, args, kwargs)
        wanted = self._what_it_makes(scripted, plain(args), plain(kwargs))
        output = self.copies.of(original)(*args, **kwargs)
        with self.build.pause():
            found = flatten_call((plain(output), plain(args), plain(kwargs)), {})[0]
            if wanted is not None and not (len(found) == len(wanted) and all(map(agrees, found, wanted))):
                raise self.build.failure(
                    f"calls {original.__name__}, a scripted function that computes something else than the Python "
                    "function that it was made from; call that one, or exclude the block from the rules"
                )
        return output

    def _what_it_makes(self, scripted: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
        """The output of ``scripted`` and what it leaves of its arguments; ``None`` where there are no values."""
        values = flatten_call(args, kwargs)[0]
        if any(isinstance(value, FakeTensor) for value in values):
            return None
        devices = {value.device for value in values if isinstance(value, torch.Tensor) and value.is_cuda}
        with self.build.pause(), kept_random(devices):
            leaves = iter(copied(values))
            args, kwargs = rebuild_call(args, leaves), rebuild_call(kwargs, leaves)
            return flatten_call((scripted(*args, **kwargs), args, kwargs), {})[0]

    def _scripted_leaf(self, scripted: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inside = products_inside(scripted)
        if inside:
            raise self.build.failure(
                f"calls the scripted function {scripted.name}, which holds {', '.join(inside)} and does not know the "
                "Python function that it was made from; call that one, or exclude the block from the rules"
            )
        node = self.build.node("call_function", function_target(scripted), args, kwargs, "scripted", scripted.name)
        with self.build.pause():
            output = scripted(*plain(args), **plain(kwargs))
        self._count(node, output)
        return self.build.result(node, output)

    def call_torch(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = callable_name(func)
        if getattr(func, "__name__", None) == "__set__":
            raise self.build.failure(f"sets {name} of a tensor, which a graph would lose; change its values in place")
        if name in _SIZE_GETTERS:
            return self.build.shape_of(args, kwargs)
        if name in FACTS:
            self.routine.reads_dtype |= name in DTYPES
            return func(*args, **kwargs)
        if func is set_grad_enabled:
            return self._set_grad_mode(*args)
        if name == "__len__":
            size = self.build.size_of(args[0], 0)
            self.build.fix_size(size, int.__int__(size))
            return int.__int__(size)
        if name == "numel":
            node = self.build.node("call_method", "numel", args, kwargs, "numel")
            return self.build.symbol(Size(func(*args, **kwargs)), node)
        if name == "__iter__":
            return iter(self.call_torch(torch.Tensor.unbind, (args[0], 0), {}))
        if (reason := refusal(name)) is not None:
            raise self.build.failure(reason)
        node = self._operation(func, name, args, kwargs)
        with self.build.pause():
            output = func(*plain(args), **plain(kwargs))
        if name in CHECKED:
            self.build.expect(self.build.node("call_function", operator.eq, (node, output), {}, "size"), True)
            return output
        if name == "__setitem__":
            return output
        self._count(node, output)
        if is_in_place(name) and output is args[0]:
            # From here on the tensor is what this node returns.
            self.build.bind(output, node)
            return output
        return self.build.result(node, output)

    def _operation(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        op = "size" if name in CHECKED else function_operator(name, args, kwargs)
        if name == "__get__" or type(func).__name__ == "method-wrapper":
            return self.build.node("call_function", getattr, (args[0], name), {}, op, name=name)
        method = tensor_method(func)
        if method is None:
            return self.build.node("call_function", function_target(func), args, kwargs, op)
        if method == "__getitem__":
            return self.build.node("call_function", operator.getitem, args, kwargs, op)
        if method == "__setitem__":
            return self.build.node("call_function", operator.setitem, args, kwargs, op)
        return self.build.node("call_method", method, args, kwargs, op)

    def _count(self, node: Node, output: Any) -> None:
        """Python may loop over the parts of an output, so their number is a decision."""
        if type(output) in (tuple, list):
            count = self.build.node("call_function", len, (node,), {}, "size")
            self.build.expect(self.build.node("call_function", operator.eq, (count, len(output)), {}, "size"), True)

    def _set_grad_mode(self, mode: bool) -> None:
        """``torch.no_grad`` and its like: what they found is put back at their end, whatever it is on that run."""
        owners, ends = grad_mode_owners()
        wanted: bool | Node = mode
        if ends:
            known = [self.grad_modes[id(owner)] for owner in owners if id(owner) in self.grad_modes]
            if not known:
                raise self.build.failure("leaves a torch.no_grad() or its like that was made outside the forward")
            wanted = known[-1]
        else:
            before = self.build.node("call_function", torch.is_grad_enabled, (), {}, "grad_mode")
            self.build.alive.extend(owners)
            self.grad_modes.update({id(owner): before for owner in owners if id(owner) not in self.grad_modes})
        self.build.node("call_function", set_grad_enabled, (wanted,), {}, "grad_mode")
        set_grad_enabled(mode)

    # -- what the watch reports ------------------------------------------------------------------------------

    def enter_function(self, frame: FrameType) -> None:
        """An autograd function is one node, its own forward and backward together."""
        local = frame.f_locals
        args, kwargs = local["args"], local["kwargs"]
        self.leaf = self.build.node("call_function", apply_of(local["cls"]), args, kwargs, "autograd_function")
        self.paused = True

    def note_inside(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A torch function is called where nothing is written down: in an autograd function, products are told of."""
        if self.leaf is not None and (op := function_operator(callable_name(func), args, kwargs)) in PRODUCTS:
            self.leaf.meta[INSIDE] = op

    def leave_function(self, output: Any) -> None:
        node, self.leaf, self.paused = self.leaf, None, False
        if node is not None and output is not None:
            self._bind_parts(node, output)

    def _bind_parts(self, node: Node, output: Any) -> None:
        self._count(node, output)
        parts = output if isinstance(output, tuple) else (output,)
        for index, part in enumerate(parts):
            if isinstance(part, torch.Tensor):
                self.build.bind(part, self.build.item(node, index) if isinstance(output, tuple) else node)

    def forbid(self, what: str) -> None:
        self.forbidden = self.build.failure(what)
        raise self.forbidden

    def note_autocast(self) -> None:
        self.routine.reads_dtype = True
