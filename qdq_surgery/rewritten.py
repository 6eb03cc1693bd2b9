"""What a rewritten block runs: graphs compiled to functions, one variant for each kind of call.

A graph holds for the calls it was recorded for: the same arguments given, of the same rank, dtype and device type, and
the same plain attributes (``training`` above all). A :class:`Rewritten` keeps one :class:`Variant` for each kind of
call and picks the one that holds. A kind that was not seen yet is recorded from the block's original forward when it
first occurs, on a shadow, and gets its quantizers by the places in the source where they belong.
"""

from __future__ import annotations

import copy
import functools
import itertools
import linecache
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

import torch
from pytorch_quantization import nn as quant_nn
from torch import nn
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from qdq_surgery.errors import TraceError
from qdq_surgery.randomness import kept_random
from qdq_surgery.recorder import record, recording_of
from qdq_surgery.replay import check_replay
from qdq_surgery.routine import SELF, DecisionChangedError, Leaf, Routine, describe_leaf, flatten_call
from qdq_surgery.shadow import shadow
from qdq_surgery.untrusted import quoted

__all__ = ["Edit", "Rewritten", "Variant", "Variants", "compile_variant", "insert_quantizers"]

Origin = tuple[Any, ...]

#: What may stand in generated source: an identifier, or the number of a module in a list.
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+", re.ASCII)

_LABELS = itertools.count()

#: Kinds of calls that are remembered for each block; the one recorded longest ago is forgotten first.
_MAX_VARIANTS = 64

#: Operators that must not turn up in a variant at a place that the plan has not seen.
GUARDED = frozenset({"linear", "matmul", "baddbmm", "einsum", "sdpa", "conv1d"})


@dataclass(frozen=True)
class Edit:
    """A quantizer between an operand and its operator.

    Attributes:
        origin: Identity of the operator's call within the source.
        position: Index into the node's args, or a keyword.
        quantizer: Attribute name of the quantizer on the owning block.
        operator: What the node is.
    """

    origin: Origin
    position: int | str
    quantizer: str
    operator: str


@dataclass(frozen=True, eq=False)
class Variant:
    """One compiled graph and what it holds for.

    Attributes:
        signature, paths: Description and path of each argument leaf.
        reads: Plain attributes that decided something: path of the module below the block, name, value.
        autocast: Whether autocast was on, and to what, if a dtype was asked for.
        wanted: Which argument leaves the function takes.
        decides: Whether the graph checks decisions, so that a run may end before its end.
        switches: Whether the graph switches gradients on or off, which a run that ends early must not leave so.
        source: The generated Python, for whoever debugs it.
    """

    signature: tuple[Leaf, ...]
    paths: tuple[str, ...]
    reads: tuple[tuple[str, str, Any], ...]
    autocast: tuple[bool, torch.dtype] | None
    wanted: tuple[int, ...]
    takes_self: bool
    decides: bool
    switches: bool
    function: Callable[..., Any]
    source: str

    def holds(self, module: nn.Module, signature: tuple[Leaf, ...], paths: tuple[str, ...]) -> bool:
        if signature != self.signature or paths != self.paths:
            return False
        for path, name, value in self.reads:
            owner = module if not path else module.get_submodule(path)
            if getattr(owner, name) != value:
                return False
        return self.autocast is None or self.autocast == _autocast(self.signature)

    def run(self, module: nn.Module, values: list[Any]) -> Any:
        inputs = [values[index] for index in self.wanted]
        if self.takes_self:
            inputs = [module, *inputs]
        if not self.switches:
            return self.function(module, *inputs)
        before = torch.is_grad_enabled()
        try:
            return self.function(module, *inputs)
        except BaseException:
            torch._C._set_grad_enabled(before)
            raise


class _Undo:
    """What a run that ends at a changed decision has changed by then: random numbers drawn, statistics collected."""

    def __init__(self, module: nn.Module) -> None:
        self.calibrators: list[tuple[quant_nn.TensorQuantizer, Any]] = []
        self.random: tuple[torch.Tensor, dict[int, torch.Tensor]] | None = None
        if torch.compiler.is_compiling():
            return
        for child in module.modules():
            if isinstance(child, quant_nn.TensorQuantizer) and child._if_calib and not child._disabled:
                self.calibrators.append((child, copy.deepcopy(child._calibrator)))
        if module.training:
            devices = {p.device.index for p in module.parameters() if p.device.type == "cuda"}
            states = {index: torch.cuda.get_rng_state(index) for index in devices if index is not None}
            self.random = torch.get_rng_state(), states

    def take_back(self) -> None:
        for quantizer, calibrator in self.calibrators:
            quantizer._calibrator = calibrator
        if self.random is not None:
            torch.set_rng_state(self.random[0])
            for index, state in self.random[1].items():
                torch.cuda.set_rng_state(state, index)


def _autocast(signature: tuple[Leaf, ...]) -> tuple[bool, torch.dtype]:
    device = next((leaf[3].type for leaf in signature if leaf[0] == "tensor"), "cpu")
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)


def insert_quantizers(graph: Graph, edits: tuple[Edit, ...]) -> list[Edit]:
    """Put quantizer calls into ``graph`` at their places; returns the edits that found their place.

    Args:
        graph: A recorded graph; it is edited.
    """
    places: dict[Origin, Node] = {node.meta["origin"]: node for node in graph.nodes if "origin" in node.meta}
    done = []
    for edit in edits:
        node = places.get(edit.origin)
        if node is None:
            continue
        operand = _operand(node, edit)
        with graph.inserting_before(node):
            quantizer = graph.call_module(edit.quantizer, (operand,))
        quantizer.meta.update(op="quantizer", origin=(*edit.origin, edit.position), source=node.meta["source"])
        if isinstance(edit.position, str):
            node.kwargs = {**node.kwargs, edit.position: quantizer}
        else:
            node.args = (*node.args[: edit.position], quantizer, *node.args[edit.position + 1 :])
        done.append(edit)
    graph.lint()
    return done


def _operand(node: Node, edit: Edit) -> Node:
    """What the quantizer of ``edit`` is to stand behind.

    Raises:
        TraceError: There is no such operand, or it is another operator's: the plan was not made for this code.
    """
    if isinstance(edit.position, str):
        operand = node.kwargs.get(edit.position)
    else:
        operand = node.args[edit.position] if edit.position < len(node.args) else None
    if not isinstance(operand, Node) or node.meta.get("op") != edit.operator:
        raise TraceError(
            f"{edit.quantizer} belongs to operand {edit.position} of a {edit.operator}, which the "
            f"{node.meta.get('op')} at {node.meta['source']} has not; its plan was made for other code: convert it anew"
        )
    return operand


def compile_variant(routine: Routine) -> Variant:
    """Compile the graph of ``routine``, with the quantizers that were put into it.

    Raises:
        TraceError: It has a name that cannot stand in source.
    """
    graph = routine.graph
    _check_names(graph, type(routine.owner).__name__)
    code = graph.python_code("self")
    label = f"<qdq_surgery {type(routine.owner).__name__}.{routine.function} {next(_LABELS)}>"
    scope = dict(code.globals)
    exec(compile(code.src, label, "exec"), scope)
    # So that a traceback through the generated code shows its lines.
    linecache.cache[label] = (len(code.src), None, code.src.splitlines(keepends=True), label)
    positions = {
        node.name: index for index, node in enumerate(routine.inputs) if isinstance(node, Node) and node.target != SELF
    }
    names = [node.name for node in graph.nodes if node.op == "placeholder" and node.target != SELF]
    wanted = [positions[name] for name in names]
    variant = Variant(
        signature=routine.signature,
        paths=routine.argument_paths,
        reads=tuple((path, name, value) for (path, name), value in routine.reads.items()),
        autocast=_autocast(routine.signature) if routine.reads_dtype else None,
        wanted=tuple(wanted),
        decides=any(node.meta.get("op") == "expect" for node in graph.nodes),
        switches=any(node.meta.get("op") == "grad_mode" for node in graph.nodes),
        takes_self=any(node.op == "placeholder" and node.target == SELF for node in graph.nodes),
        function=scope["forward"],
        source=code.src,
    )
    weakref.finalize(variant, linecache.cache.pop, label, None)
    return variant


def _check_names(graph: Graph, owner: str) -> None:
    """The names of modules and arguments go into the source as they are: fx does not escape them."""
    for node in graph.nodes:
        path = "" if node.op == "call_function" else str(node.target)
        names = [*(path.split(".") if path else ()), *node.kwargs]
        for name in names:
            if not _WORD.fullmatch(name) or iskeyword(name):
                raise TraceError(f"{owner}: {quoted(name)} is a name that cannot stand in a graph; rename it")


_NOT_YET = (
    "qdq_surgery records the graphs of a block when a kind of call first comes, which cannot be in the middle of one "
    "graph: before torch.compile(fullgraph=True) or torch.export.export(strict=True), call the model once, in the same "
    "mode and with padding in the batch (without any, transformers leaves the mask out, but not while it is compiled)"
)


class Variants:
    """The variants of all blocks that are alike: what one of them recorded, the others need not record again.

    Compiled variants hold no state of a block: copies may share them. A pickle leaves them behind, and they are
    recorded again when they are needed.
    """

    def __init__(self, found: list[Variant] | None = None) -> None:
        self.found = [] if found is None else found
        self.blocks = 0

    def add(self, variant: Variant) -> None:
        # A new list: another thread may be looking through the old one.
        self.found = [variant, *self.found][: _MAX_VARIANTS * max(self.blocks, 1)]

    def __deepcopy__(self, _: dict[int, Any]) -> Variants:
        return Variants(list(self.found))  # the blocks that are copied along count themselves

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "found": []}


class Rewritten:
    """The rewritten forward, or attention function, of one block.

    Attributes:
        original: The function that the graphs were recorded from, called with the block first.
        edits: Where quantizers belong.
        known: Origins of all matmul-like calls that the plan has seen, quantized or not.
        variants: Shared with the blocks that are alike.
    """

    def __init__(
        self,
        kind: str,
        original: Callable[..., Any],
        edits: tuple[Edit, ...],
        known: frozenset[Origin],
        variants: Variants,
    ) -> None:
        self.kind, self.original = kind, original
        self.edits, self.known = edits, known
        self.variants = variants
        variants.blocks += 1

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the variant that holds for this call.

        Raises:
            TraceError: The call is of a kind that no graph was made for, and none can be made.
        """
        values, paths = flatten_call(args, kwargs)
        signature = tuple(describe_leaf(value) for value in values)
        for variant in self.variants.found:
            if variant.holds(module, signature, tuple(paths)):
                if not variant.decides:
                    return variant.run(module, values)
                undo = _Undo(module)
                try:
                    return variant.run(module, values)
                except DecisionChangedError:
                    undo.take_back()
        made: Variant = self._specialise(module, args, kwargs)
        return made.run(module, values)

    def as_function(self) -> Callable[..., Any]:
        """The rewritten function, called like the original: the block first."""

        @functools.wraps(self.original)
        def function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self(module, args, kwargs)

        return function

    @torch.compiler.disable(reason=_NOT_YET)  # type: ignore[untyped-decorator, no-untyped-call]
    def _specialise(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
        recorder = recording_of(module)
        if recorder is not None:
            # The block is being looked at by a recorder: that one has to look away meanwhile.
            with recorder.pause():
                inside: Variant = self._specialise(recorder.block, args, kwargs)
                return inside
        devices = sorted(
            {value.device for value in flatten_call(args, kwargs)[0] if isinstance(value, torch.Tensor)}, key=str
        )
        # Inside torch.export the recording must not become part of what is exported.
        with (
            kept_random([device for device in devices if device.type == "cuda"]),
            disable_proxy_modes_tracing(),
        ):
            ghost, args, kwargs = shadow(module), _copies(args), _copies(kwargs)
            routine, _ = record(ghost, self.original, args, kwargs, kind=self.kind, nested=False)
            check_replay(routine, lambda each: compile_variant(each).run)
        variant = self.specialised(routine)
        self.variants.add(variant)
        return variant

    def specialised(self, routine: Routine) -> Variant:
        """The variant for a freshly recorded routine of this block.

        Raises:
            TraceError: It has a matmul or linear that the plan knows nothing of.
        """
        for node in routine.graph.nodes:
            if node.op != "call_module" and node.meta.get("op") in GUARDED and node.meta["origin"] not in self.known:
                raise TraceError(
                    f"{type(routine.owner).__name__}.{routine.function}: this call takes a path with a "
                    f"{node.meta['op']} at {node.meta['source']} that the plan has not seen; convert with "
                    "example_inputs= that take it"
                )
        missing = set(self.edits) - set(insert_quantizers(routine.graph, self.edits))
        if missing:
            raise TraceError(
                f"{type(routine.owner).__name__}.{routine.function}: this call goes past the place of "
                f"{', '.join(sorted(edit.quantizer for edit in missing))}, which would stay unused; convert with "
                "example_inputs= like those of this call"
            )
        return compile_variant(routine)

    def __deepcopy__(self, memo: dict[int, Any]) -> Rewritten:
        return Rewritten(self.kind, self.original, self.edits, self.known, copy.deepcopy(self.variants, memo))


def _copies(value: Any) -> Any:
    """Arguments for a trial run: what it changes in place must not be the caller's tensor."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copies(item) for item in value)
    if type(value) is dict:
        return {key: _copies(item) for key, item in value.items()}
    return value
