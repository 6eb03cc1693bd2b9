"""The ranges in a checkpoint: from safetensors, or from pickles that hold nothing but tensors. And what else is there.

Ranges are many and small, and all are read at once. What weights are moved by before they are rounded is as large as
the weights, and read when its quantizer is known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import load_state_dict

from qdq_surgery.errors import ModelError
from qdq_surgery.match.site_names import STATE_SUFFIXES
from qdq_surgery.safety.untrusted import DamagedError, quoted

__all__ = ["STATE_PATTERN", "Stored", "read_ranges", "read_roundings"]

#: How the names in a state dict end: of a range, as in QDQBERT, and of what a weight is moved by.
_RANGE, _ROUNDING = STATE_SUFFIXES

#: Both as a regular expression, which holds from the start of a name: otherwise it would be tried at each place.
STATE_PATTERN = r"^(?s:.*)_quantizer\.(?:_amax|_rounding)$"

#: What a range may be stored in: no integers, and no floats of eight bits, in which a range would be another.
_FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})

#: The most axes of a range, and the most numbers in the ranges of a file.
_MOST_AXES, _MOST_VALUES = 8, 1 << 24


#: Why a rounding of such a dtype and shape cannot be a quantizer's; ``None`` if it can.
Misfit: TypeAlias = "Callable[[torch.dtype, Sequence[int]], str | None]"


class Stored(NamedTuple):
    """What the files of a checkpoint hold of quantizers.

    Attributes:
        ranges: By the name of the quantizer, in float32.
        zeros: Whether one of them is zero somewhere. Hardly ever is one.
        roundings: By the name of the quantizer, the file that holds what its weight is moved by.
        metadata: Of the first file.
    """

    ranges: dict[str, Tensor]
    zeros: bool
    roundings: dict[str, str]
    metadata: dict[str, str]


def read_ranges(files: Sequence[str]) -> Stored:
    """All ranges, and where the rest is.

    Raises:
        ModelError: A file cannot be read, or a range is no range: of integers, negative, not finite. Names both.
    """
    ranges: dict[str, Tensor] = {}
    roundings: dict[str, str] = {}
    zeros, first = False, None
    for path in files:
        with _naming(path):
            found, own, metadata = _in_safetensors(path) if path.endswith(".safetensors") else _in_pickle(path)
            zeros |= _check(found)
        ranges.update({name.removesuffix("._amax"): value for name, value in found.items()})
        roundings.update(dict.fromkeys(own, path))
        first = metadata if first is None else first
    return Stored(ranges, zeros, roundings, first or {})


def read_roundings(path: str, misfits: Mapping[str, Misfit]) -> dict[str, Tensor]:
    """What weights are moved by, by the name of the quantizer: int8, shape of the weight.

    Args:
        misfits: For each quantizer, why a rounding of such a dtype and shape cannot be its own.

    Raises:
        ModelError: The file cannot be read, or has one that does not fit; names both.
    """
    found = {}
    with _naming(path), _opened(path) as tensor_of:
        for name, misfit in misfits.items():
            value = tensor_of(f"{name}._rounding")
            problem = misfit(value.dtype, value.shape)
            if problem is not None:
                raise DamagedError(f"{quoted(name)}: {problem}")
            found[name] = value.clone()  # what is a view of the whole file else
    return found


@contextmanager
def _opened(path: str) -> Iterator[Callable[[str], Tensor]]:
    if path.endswith(".safetensors"):
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor
    else:
        yield _state(path).__getitem__


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """Whatever a damaged file makes of the libraries that read it is an error that names the file."""
    try:
        yield
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or str(error)[:300]}") from error
    except (DamagedError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{Path(path).name} is damaged: {reason[:300]}; save the model again") from error


def _check(found: Mapping[str, Tensor]) -> bool:
    """Refuse what is no range; whether one is zero somewhere."""
    if not found:
        return False
    # (In numpy, because torch would wake up its threads for this.)
    every = np.concatenate([value.numpy().reshape(-1) for value in found.values()])
    if not (np.isfinite(every) & (every >= 0)).all():
        wrong = next(name for name, v in found.items() if not bool((v.isfinite() & (v >= 0)).all()))
        raise DamagedError(f"the range of {quoted(wrong.removesuffix('._amax'))} is negative or not finite")
    return not bool(every.all())


#: Ranges, the quantizers that have a rounding, and metadata.
_Found = tuple[dict[str, Tensor], list[str], dict[str, str]]


def _in_safetensors(path: str) -> _Found:
    # By way of numpy, which takes half the time for so many small tensors, and copies what would else be a view of the
    # whole file.
    with safe_open(path, framework="np") as file:
        own = [name for name in file.keys() if name.endswith(STATE_SUFFIXES)]  # noqa: SIM118 (it is no dict)
        names = [name for name in own if name.endswith(_RANGE)]
        _check_sizes((name, file.get_slice(name).get_shape()) for name in names)
        try:
            found = {name: torch.from_numpy(file.get_tensor(name)) for name in names}
        except (TypeError, AttributeError):  # of a kind that numpy does not know, bfloat16 for one
            with safe_open(path, framework="pt") as other:
                found = {name: other.get_tensor(name) for name in names}
        ranges = {name: _in_float32(name, value) for name, value in found.items()}
        return ranges, _roundings(own), file.metadata() or {}


def _in_pickle(path: str) -> _Found:
    state = _state(path)
    found = {name: value for name, value in state.items() if name.endswith(_RANGE)}
    _check_sizes((name, value.shape) for name, value in found.items())
    # A copy: these are views of the file.
    ranges = {name: _in_float32(name, value).clone() for name, value in found.items()}
    return ranges, _roundings(state), {}


def _roundings(names: Iterable[str]) -> list[str]:
    return [name.removesuffix("._rounding") for name in names if name.endswith(_ROUNDING)]


def _state(path: str) -> dict[str, Tensor]:
    """What a pickle has of quantizers."""
    try:
        state = load_state_dict(path, weights_only=True)
    except Exception as error:  # whatever a damaged archive makes of torch
        raise DamagedError(str(error) or type(error).__name__) from error
    if not isinstance(state, Mapping):
        raise DamagedError(f"it holds a {type(state).__name__}, wanted tensors by name")
    found = {name: value for name, value in state.items() if isinstance(name, str) and name.endswith(STATE_SUFFIXES)}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise DamagedError(f"{quoted(name)} is a {type(value).__name__}, wanted a tensor")
        if value.layout != torch.strided or value.is_meta or value.is_nested:
            raise DamagedError(f"{quoted(name)} is a tensor without values in a row, wanted a plain one")
    return found


def _check_sizes(shapes: Iterable[tuple[str, Sequence[int]]]) -> None:
    total = 0
    for name, shape in shapes:
        total += math.prod(shape)
        if len(shape) > _MOST_AXES or total > _MOST_VALUES:
            raise DamagedError(f"the range {quoted(name)} has the shape {quoted(tuple(shape))}, which no range has")


def _in_float32(name: str, value: Tensor) -> Tensor:
    if value.dtype not in _FLOATS:
        kind = str(value.dtype).removeprefix("torch.")
        raise DamagedError(f"the range {quoted(name)} is in {kind}, wanted float32")
    return value if value.dtype == torch.float32 else value.float()
