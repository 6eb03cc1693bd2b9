"""Sees, while a block is recorded, what a ``TorchFunctionMode`` does not: autograd functions, and changes of state.

``Function.apply``, ``torch.autocast``, ``torch.manual_seed`` and their like reach no mode. They are Python functions
all the same, so a profile function of Python's own (``sys.setprofile``, for this thread and while a recording lasts)
sees each of them begin and end. Nothing is replaced in torch. (From torch 2.15 on ``Function.apply`` is a function of
C, of which it sees no arguments: see :mod:`~qdq_surgery.trace.hidden_calls`.)
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, Protocol, cast

import torch
import torch.utils.checkpoint as checkpointing

from qdq_surgery.safety.torch_private import function_transforms, functional_calls, vmap_calls
from qdq_surgery.safety.transaction import put_back_after
from qdq_surgery.trace.source_places import OUR_HOME, TORCH_HOME

__all__ = ["APPLY", "Watched", "applied_function", "sees_functions", "unwatched", "watching"]

#: The code of ``torch.autograd.Function.apply``; ``None`` where it is a function of C.
APPLY: CodeType | None = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)

_OUT = "move that out of the block, or exclude the block from the rules"


class Watched(Protocol):
    """Who is told what begins and ends."""

    paused: bool

    def enter_function(self, frame: FrameType) -> None:
        """``Function.apply`` begins, in ``frame``."""

    def leave_function(self, output: Any) -> None:
        """The ``apply`` that was entered ends; ``output`` is ``None`` if it raised."""

    def forbid(self, what: str) -> None:
        """The forward does something that a graph would lose: raises."""

    def note_autocast(self) -> None:
        """The forward asks whether autocast is on."""


def sees_functions() -> bool:
    """Whether the watch is told when an autograd function begins, and with what."""
    return APPLY is not None


def applied_function(value: Any) -> type[torch.autograd.Function] | None:
    """The autograd function that ``value`` is the ``apply`` of."""
    owner = getattr(value, "__self__", None)
    named = getattr(value, "__name__", None) == "apply"
    return owner if named and isinstance(owner, type) and issubclass(owner, torch.autograd.Function) else None


def _code(function: Any) -> CodeType | None:
    return getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None


def _forbidden() -> dict[CodeType, str]:
    transformed = "differentiates or maps a function (torch.func, torch.vmap), whose insides take no quantizers"
    seeds = "sets the state of a random number generator, which a graph would not repeat"
    backward = "runs a backward pass, which a graph of the forward cannot hold"
    contexts = "enters {}, which a graph would lose"
    found: list[tuple[Any, str]] = [
        (torch.inference_mode.__enter__, contexts.format("torch.inference_mode")),
        (torch.autocast.__enter__, contexts.format("torch.autocast")),
        (torch.autograd.graph.saved_tensors_hooks.__enter__, contexts.format("saved_tensors_hooks")),
        (torch.nn.attention.sdpa_kernel, contexts.format("sdpa_kernel")),
        (checkpointing.checkpoint, "calls torch.utils.checkpoint, which a graph would lose"),
        *((getattr(torch.random, name), seeds) for name in ("manual_seed", "seed", "set_rng_state", "fork_rng")),
        *((getattr(torch.cuda, name), seeds) for name in ("manual_seed", "manual_seed_all", "set_rng_state")),
        (torch.autograd.grad, backward),
        (torch.autograd.backward, backward),
        (getattr(vmap_calls, "vmap_impl", None), transformed),
        (getattr(functional_calls, "functional_call", None), "calls a module with other weights (functional_call)"),
        *(
            (getattr(function_transforms, name, None), transformed)
            for name in ("grad_impl", "grad_and_value_impl", "_vjp_with_argnums", "_jvp_with_argnums", "linearize")
        ),
    ]
    return {code: what for function, what in found if (code := _code(function)) is not None}


_FORBIDDEN = _forbidden()

#: Functions of C that tell what a graph does not know.
_ASKS_GRADIENTS = {id(f) for f in (torch.is_grad_enabled, torch.is_inference_mode_enabled)}
_ASKS_AUTOCAST = {
    id(getattr(torch, name, None))
    for name in (
        "is_autocast_enabled",
        "is_autocast_cpu_enabled",
        "get_autocast_dtype",
        "get_autocast_gpu_dtype",
        "get_autocast_cpu_dtype",
    )
}

_ASKS = _ASKS_GRADIENTS | _ASKS_AUTOCAST


def _meaning(code: CodeType) -> str | None:
    """Why a recording cannot go on where ``code`` begins to run."""
    if code in _FORBIDDEN:
        return _FORBIDDEN[code]
    if code.co_name == "compile_wrapper" and code.co_filename.endswith("eval_frame.py"):
        return "calls a function made by torch.compile, whose insides take no quantizers"
    return None


@contextmanager
def watching(watched: Watched) -> Iterator[None]:
    """While this holds, ``watched`` is told. Another profile function (Python's, a debugger's) is put back after it."""
    before = cast("Any", sys.getprofile())
    suspended = hasattr(before, "disable")  # cProfile before Python 3.12: no function that could be set

    def put_back() -> None:
        sys.setprofile(None if suspended else before)
        if suspended:
            before.enable()

    with put_back_after(put_back):
        if suspended:
            before.disable()
        sys.setprofile(_hook(watched))
        yield


class unwatched:
    """While this holds, nobody is told: what is called is one operator, and a profile function makes it slow."""

    __slots__ = ("before",)

    def __enter__(self) -> None:
        self.before: Any = sys.getprofile()
        sys.setprofile(None)

    def __exit__(self, *_: object) -> None:
        sys.setprofile(self.before)


def _hook(watched: Watched) -> Callable[[FrameType, str, Any], None]:
    meanings: dict[CodeType, str | None] = {}
    inside: list[FrameType] = []

    def call(frame: FrameType, what: str) -> None:
        if watched.paused:
            return
        if frame.f_code is APPLY:
            watched.enter_function(frame)
            inside.append(frame)
        else:
            watched.forbid(f"{what}; {_OUT}")

    # It runs at every call of every function: what is usual comes first, and asks the least.
    def hook(frame: FrameType, event: str, arg: Any) -> None:
        if event == "call":
            code = frame.f_code
            if code not in meanings:
                meanings[code] = "" if code is APPLY else _meaning(code)
            what = meanings[code]
            if what is not None:
                call(frame, what)
        elif event == "return":
            if inside and inside[-1] is frame:
                inside.pop()
                watched.leave_function(arg)
        elif event == "c_call" and id(arg) in _ASKS:
            if watched.paused or frame.f_code.co_filename.startswith((TORCH_HOME, OUR_HOME)):
                return
            if id(arg) in _ASKS_AUTOCAST:
                watched.note_autocast()
            else:
                watched.forbid(f"asks whether gradients are wanted ({arg.__name__}), which a graph does not know")
        elif event == "c_call" and arg.__name__ == "apply":
            function = None if watched.paused else applied_function(arg)
            if function is None:
                return
            watched.forbid(
                f"calls the autograd function {function.__name__} where only C knows of it; call it by its name in the "
                f"module of the forward, or {_OUT}"
            )

    return hook
