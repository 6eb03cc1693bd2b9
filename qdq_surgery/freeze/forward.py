"""What a block of a frozen model runs where its linears share what they read, or one rounds for the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from qdq_surgery.errors import TraceError
from qdq_surgery.freeze.handovers import Step, hand_over
from qdq_surgery.freeze.shared_inputs import share_inputs
from qdq_surgery.graph.block_graph import BlockGraph, describe_leaf, flatten_call
from qdq_surgery.match.edits import Edit, Origin
from qdq_surgery.surgery.quantized_forward import CompiledGraphs, QuantizedForward

__all__ = ["FrozenForward"]

#: Kinds of calls that are remembered for each block because they cannot be recorded.
_MOST_REFUSED = 15


class FrozenForward(QuantizedForward):
    """A rewritten forward whose graphs quantize once for several linears, and let one round for the next.

    A block without quantizers of its own, of which no call needs a rewritten graph, runs its original forward where
    there is none: for a call that cannot be recorded, or that comes first while the model is compiled. Each linear then
    quantizes its own input, and what is computed is the same.

    Attributes:
        steps: Where a linear rounds for the next one.
    """

    #: Kinds of calls that cannot be recorded.
    refused: tuple[Any, ...] = ()
    steps: tuple[Step, ...] = ()

    @classmethod
    def of(
        cls,
        original: Callable[..., Any],
        edits: tuple[Edit, ...],
        known: frozenset[Origin],
        variants: CompiledGraphs,
        steps: tuple[Step, ...],
    ) -> FrozenForward:
        """That of a block's forward."""
        made = cls("forward", original, edits, known, variants)
        made.steps = steps
        return made

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """As there.

        Raises:
            TraceError: As there, for a block with quantizers of its own.
        """
        if self.edits:
            return super().__call__(module, args, kwargs)
        if not self.holds(module, args, kwargs) and (
            torch.compiler.is_compiling() or not self._record(module, args, kwargs)
        ):
            return self.original(module, *args, **kwargs)
        return super().__call__(module, args, kwargs)

    def _record(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Record such a call; ``False`` if it cannot be, now or before."""
        values, paths = flatten_call(args, kwargs)
        call = (tuple(describe_leaf(value) for value in values), tuple(paths))
        if call in self.refused:
            return False
        try:
            self._compile_for(module, args, kwargs)
        except TraceError:
            self.refused = (*self.refused[-_MOST_REFUSED:], call)
            return False
        return True

    def edit(self, routine: BlockGraph) -> None:
        """Put the quantizers in, if there are any, quantize once what is read by several, and hand on integers."""
        if self.edits:
            super().edit(routine)
        share_inputs(routine.graph, routine.owner)
        hand_over(routine.graph, routine.owner, self.steps)

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenForward:
        made = super().__deepcopy__(memo)
        assert isinstance(made, FrozenForward)
        made.steps = self.steps
        return made
