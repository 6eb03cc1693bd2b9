"""What a rewritten block runs: graphs compiled to functions, one variant for each kind of call.

A graph holds for the calls it was recorded for: the same arguments given, of the same rank, dtype and device type, and
the same plain attributes (``training`` above all). A :class:`QuantizedForward` keeps one :class:`CompiledGraph` for
each kind of call and picks the one that holds. A kind that was not seen yet is recorded from the block's original
forward when it first occurs, on a shadow, and gets its quantizers by the places in the source where they belong.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from pytorch_quantization import nn as quant_nn
from torch import nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import BlockGraph, DecisionChangedError, describe_leaf, flatten_call
from qdq_surgery.graph.compiled_graph import CompiledGraph, compile_graph
from qdq_surgery.graph.operators import PRODUCTS
from qdq_surgery.graph.replay import check_replay
from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.match.edits import Edit, Origin
from qdq_surgery.safety.random_state import alone, kept_random
from qdq_surgery.surgery.edits import apply_edits
from qdq_surgery.trace.recorder import record, recording_of

__all__ = ["CompiledGraphs", "QuantizedForward"]

#: Kinds of calls that are remembered for each block; the one recorded longest ago is forgotten first.
_MAX_GRAPHS = 64


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


_NOT_YET = (
    "qdq_surgery records the graphs of a block when a kind of call first comes, which cannot be in the middle of one "
    "graph: before torch.compile(fullgraph=True) or torch.export.export(strict=True), call the model once, in the same "
    "mode and with padding in the batch (without any, transformers leaves the mask out, but not while it is compiled)"
)


class CompiledGraphs:
    """The variants of all blocks that are alike: what one of them recorded, the others need not record again.

    Compiled variants hold no state of a block: copies may share them. A pickle leaves them behind, and they are
    recorded again when they are needed.
    """

    def __init__(self, found: list[CompiledGraph] | None = None) -> None:
        self.found = [] if found is None else found
        self.blocks = 0

    def add(self, variant: CompiledGraph) -> None:
        """Remember a variant, the first to be tried from now on; the oldest is forgotten when there are too many."""
        # A new list: another thread may be looking through the old one.
        self.found = [variant, *self.found][: _MAX_GRAPHS * max(self.blocks, 1)]

    def __deepcopy__(self, _: dict[int, Any]) -> CompiledGraphs:
        return CompiledGraphs(list(self.found))  # the blocks that are copied along count themselves

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "found": []}


class QuantizedForward:
    """The rewritten forward, or attention function, of one block.

    Attributes:
        original: The function that the graphs were recorded from, called with the block first.
        edits: What the plan does to the graphs.
        known: Origins of all matmul-like calls that the plan has seen, quantized or not.
        variants: Shared with the blocks that are alike.
    """

    def __init__(
        self,
        kind: str,
        original: Callable[..., Any],
        edits: tuple[Edit, ...],
        known: frozenset[Origin],
        variants: CompiledGraphs,
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
            if variant.guards_hold(module, signature, tuple(paths)):
                if not variant.decides:
                    return variant.run(module, values)
                undo = _Undo(module)
                try:
                    return variant.run(module, values)
                except DecisionChangedError:
                    undo.take_back()
        made: CompiledGraph = self._compile_for(module, args, kwargs)
        return made.run(module, values)

    def as_function(self) -> Callable[..., Any]:
        """The rewritten function, called like the original: the block first."""

        @functools.wraps(self.original)
        def function(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            return self(module, args, kwargs)

        return function

    @torch.compiler.disable(reason=_NOT_YET)  # type: ignore[untyped-decorator, no-untyped-call]
    def _compile_for(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> CompiledGraph:
        recorder = recording_of(module)
        if recorder is not None:
            # The block is being looked at by a recorder: that one has to look away meanwhile.
            with recorder.pause():
                inside: CompiledGraph = self._compile_for(recorder.block, args, kwargs)
                return inside
        devices = sorted(
            {value.device for value in flatten_call(args, kwargs)[0] if isinstance(value, torch.Tensor)}, key=str
        )
        # Inside torch.export the recording must not become part of what is exported.
        with (
            alone(),
            kept_random([device for device in devices if device.type == "cuda"]),
            disable_proxy_modes_tracing(),
        ):
            ghost, args, kwargs = shadow(module), _copies(args), _copies(kwargs)
            routine, _ = record(ghost, self.original, args, kwargs, kind=self.kind, nested=False)
            check_replay(routine)
        variant = self.compile_recorded(routine)
        self.variants.add(variant)
        return variant

    def holds(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether there is a variant for such a call."""
        values, paths = flatten_call(args, kwargs)
        signature = tuple(describe_leaf(value) for value in values)
        return any(variant.guards_hold(module, signature, tuple(paths)) for variant in self.variants.found)

    def compile_recorded(self, routine: BlockGraph) -> CompiledGraph:
        """The variant for a freshly recorded routine of this block, which is edited.

        Raises:
            TraceError: It has a matmul or linear that the plan knows nothing of.
        """
        self.edit(routine)
        return compile_graph(routine)

    def edit(self, routine: BlockGraph) -> None:
        """Make the edits in the graph of ``routine``.

        Raises:
            TraceError: As :meth:`compile_recorded`.
        """
        for node in routine.graph.nodes:
            if node.op != "call_module" and node.meta.get("op") in PRODUCTS and node.meta["origin"] not in self.known:
                raise TraceError(
                    f"{type(routine.owner).__name__}.{routine.function}: this call takes a path with a "
                    f"{node.meta['op']} at {node.meta['source']} that the plan has not seen; convert with "
                    "example_inputs= that take it"
                )
        missing = set(self.edits) - set(apply_edits(routine.graph, self.edits))
        if missing:
            raise TraceError(
                f"{type(routine.owner).__name__}.{routine.function}: this call goes past the place of "
                f"{', '.join(sorted(map(str, missing)))}, which would stay unused; convert with "
                "example_inputs= like those of this call"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedForward:
        return type(self)(self.kind, self.original, self.edits, self.known, copy.deepcopy(self.variants, memo))


def _copies(value: Any) -> Any:
    """Arguments for a trial run: what it changes in place must not be the caller's tensor."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if type(value) in (tuple, list):
        return type(value)(_copies(item) for item in value)
    if type(value) is dict:
        return {key: _copies(item) for key, item in value.items()}
    return value
