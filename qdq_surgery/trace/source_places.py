"""Where in the source a recorded call stands, and what its frames tell: the one place that reads the stack."""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch

__all__ = ["OUR_HOME", "TORCH_HOME", "grad_mode_owners", "parameter_names", "place"]

TORCH_HOME = str(Path(torch.__file__).parent)
#: The whole package, not this folder of it.
OUR_HOME = str(Path(__file__).parent.parent)

#: What stands behind an instruction for its caches; no release before 3.11 has any, and none has another use for it.
_CACHE = b"\0"

_GRAD_MODE = str(Path(TORCH_HOME, "autograd", "grad_mode.py"))


def place(stop: CodeType) -> tuple[tuple[tuple[str, str, int], ...], str]:
    """Identity of the place that is running, from the caller of ``stop`` inwards; and file:line of its innermost line.

    Frames of torch and of this package do not count: the place is one in a modeling file.
    """
    frames: list[tuple[str, str, int]] = []
    line, told = "", True  # whether what the frame called is ours: then C called it
    frame = sys._getframe(1)
    while frame is not None and frame.f_code is not stop:
        code = frame.f_code
        name = _name_outside(code.co_filename)
        if name is not None:
            at = frame.f_lasti if told else _end_of_call(code, frame.f_lasti)
            frames.append((name, code.co_name, at))
            if code.co_filename != contextlib.__file__:
                line = line or f"{name}:{frame.f_lineno}"
        told = code.co_filename.startswith(OUR_HOME)
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(frames), line


@functools.lru_cache(maxsize=4096)
def _end_of_call(code: CodeType, at: int) -> int:
    """The last place of the instruction at ``at``, its caches included.

    CPython runs a call of a Python function from one Python function in the same loop, and then stands at the end of
    the instruction; where something sees each frame (a debugger, dynamo), it does not, and stands at its beginning.
    """
    text = code.co_code
    while text[at + 2 : at + 3] == _CACHE:
        at += 2
    return at


@functools.lru_cache(maxsize=4096)
def _name_outside(path: str) -> str | None:
    """The name of a file; ``None`` if it is torch's or this package's."""
    return None if path.startswith((TORCH_HOME, OUR_HOME)) else Path(path).name


def grad_mode_owners() -> tuple[list[Any], bool]:
    """The contexts (``torch.no_grad()`` and its like) that are setting the grad mode now, and whether they end."""
    owners: list[Any] = []
    ends = False
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and frame.f_code.co_filename.startswith((TORCH_HOME, OUR_HOME)):
        if frame.f_code.co_filename == _GRAD_MODE and "self" in frame.f_locals:
            owners.append(frame.f_locals["self"])
            ends |= frame.f_code.co_name in ("__exit__", "__call__")
        frame = frame.f_back
    return owners, ends


def parameter_names(function: Callable[..., Any]) -> list[str]:
    """Names of the positional parameters after the block itself."""
    function = inspect.unwrap(function)
    if isinstance(function, FunctionType):  # a signature takes longer than all the rest of a small recording
        return list(function.__code__.co_varnames[1 : function.__code__.co_argcount])
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [p.name for p in inspect.signature(function).parameters.values() if p.kind in kinds][1:]
