"""A graph is run once on the example it was recorded on, and must do what the forward did.

What the recorder did not see (a scripted function that changes a tensor, a library that computes behind torch's back)
would be missing from the graph in silence. Here it shows, before the model is touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import BlockGraph, flatten_call
from qdq_surgery.graph.compiled_graph import compile_graph
from qdq_surgery.safety.random_state import kept_random
from qdq_surgery.safety.torch_private import DisableTorchFunction, FakeTensor

__all__ = ["Example", "agrees", "check_replay", "copied", "example_of"]


@dataclass(frozen=True)
class Example:
    """What a forward was given, in which state.

    Attributes:
        values: Argument leaves.
        buffers: The block's buffers, each with its value.
        random: States of the random number generators, of the CPU and by CUDA device.
    """

    values: list[Any]
    buffers: list[tuple[Tensor, Tensor]]
    random: tuple[Tensor, dict[int, Tensor]]

    def put_back(self) -> None:
        """Bring the block and the generators into the state that they were in."""
        for buffer, value in self.buffers:
            buffer.copy_(value)
        torch.set_rng_state(self.random[0])
        for index, state in self.random[1].items():
            torch.cuda.set_rng_state(state, index)


def example_of(block: nn.Module, values: list[Any]) -> Example:
    """The state that ``block`` is about to be called in, and what with."""
    devices = {value.device.index for value in values if isinstance(value, Tensor) and value.device.type == "cuda"}
    buffers = list(block.buffers())
    return Example(
        copied(values),
        list(zip(buffers, copied(buffers), strict=True)),
        (torch.get_rng_state(), {index: torch.cuda.get_rng_state(index) for index in devices}),
    )


def copied(values: list[Any]) -> list[Any]:
    """Leaves of a call, with copies of the tensors."""
    with DisableTorchFunction():  # nobody who records is told of these, which takes most of the time
        return [value.detach().clone() if isinstance(value, Tensor) else value for value in values]


def check_replay(routine: BlockGraph) -> None:
    """Run the graph of ``routine`` on its example. The example is dropped: layers that are alike are checked once.

    Raises:
        TraceError: It fails, or gives something else than the forward did.
    """
    example, routine.example = routine.example, None
    if example is None:
        return
    before, wanted, left = example
    if any(isinstance(value, FakeTensor) for value in (*before.values, *wanted)):
        return  # torch.export: there are no values to compare
    values = copied(before.values)
    with kept_random([torch.device("cuda", index) for index in before.random[1]]), torch.no_grad():
        before.put_back()
        try:
            found = compile_graph(routine).run(routine.owner, values)
        except Exception as error:
            raise _failure(
                routine, f"fails on the example it was recorded on ({type(error).__name__}: {error})"
            ) from error
        finally:
            before.put_back()
    outputs = flatten_call((found,), {})[0]
    if len(outputs) != len(wanted) or not all(map(agrees, outputs, wanted)):
        raise _failure(routine, "gives another output than the forward on the example it was recorded on")
    if not all(map(agrees, values, left)):
        raise _failure(routine, "leaves its arguments otherwise than the forward does")


def _failure(routine: BlockGraph, what: str) -> TraceError:
    return TraceError(
        f"{type(routine.owner).__name__}.{routine.function}: its recorded graph {what}: it does something that a graph "
        "of torch calls cannot hold; exclude the block from the rules"
    )


def agrees(found: Any, wanted: Any) -> bool:
    """Whether a leaf of an output is what it must be."""
    if not isinstance(wanted, Tensor):
        return isinstance(wanted, nn.Module) or (type(found) is type(wanted) and bool(found == wanted))
    if not isinstance(found, Tensor) or found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if found.device.type == "meta":
        return True
    found, wanted = _plainly(found), _plainly(wanted)
    if torch.equal(found, wanted):
        return True
    # Some kernels round differently from call to call; NaN is not equal to itself.
    return torch.allclose(found, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def _plainly(tensor: Tensor) -> Tensor:
    """In a form that can be compared."""
    dense = tensor if tensor.layout is torch.strided else tensor.to_dense()
    return dense.to(torch.complex64) if dense.dtype is torch.complex32 else dense
