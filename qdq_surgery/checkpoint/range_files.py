"""The ranges in a checkpoint: from safetensors, or from pickles that hold nothing but tensors. And its metadata."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.modeling_utils import load_state_dict

from qdq_surgery.errors import ModelError
from qdq_surgery.safety.untrusted import DamagedError, quoted

__all__ = ["RANGE_PATTERN", "RANGE_SUFFIX", "Ranges", "read_ranges"]

#: How the name of a range ends in a state dict, here as in QDQBERT.
RANGE_SUFFIX = "_quantizer._amax"

#: What a range may be stored in: no integers, and no floats of eight bits, in which a range would be another.
_FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})

#: The most axes of a range, and the most numbers in the ranges of a file.
_MOST_AXES, _MOST_VALUES = 8, 1 << 24

#: The same as a regular expression, which holds from the start of a name: otherwise it would be tried at each place.
RANGE_PATTERN = r"^(?s:.*)_quantizer\._amax$"


class Ranges(NamedTuple):
    """What the files of a checkpoint say.

    Attributes:
        values: Ranges by the name of their quantizer, in float32.
        zeros: Whether one of them is zero somewhere. Hardly ever is one.
        metadata: Of the first file.
    """

    values: dict[str, Tensor]
    zeros: bool
    metadata: dict[str, str]


def read_ranges(files: Sequence[str]) -> Ranges:
    """The ranges in ``files``.

    Raises:
        ModelError: A file cannot be read, or a range is no range: of integers, negative, not finite. Names both.
    """
    ranges: dict[str, Tensor] = {}
    zeros = False
    first: dict[str, str] | None = None
    for path in files:
        with _naming(path):
            found, metadata = _in_safetensors(path) if path.endswith(".safetensors") else (_in_pickle(path), {})
            zeros |= _check(found)
        ranges.update({name.removesuffix("._amax"): value for name, value in found.items()})
        first = metadata if first is None else first
    return Ranges(ranges, zeros, first or {})


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


def _in_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    # By way of numpy, which takes half the time for so many small tensors, and copies what would else be a view of the
    # whole file.
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        names = [name for name in file.keys() if name.endswith(RANGE_SUFFIX)]  # noqa: SIM118 (it is no dict)
        _check_sizes((name, file.get_slice(name).get_shape()) for name in names)
        try:
            found = {name: torch.from_numpy(file.get_tensor(name)) for name in names}
        except (TypeError, AttributeError):  # of a kind that numpy does not know, bfloat16 for one
            with safe_open(path, framework="pt") as other:
                found = {name: other.get_tensor(name) for name in names}
    return {name: _in_float32(name, value) for name, value in found.items()}, metadata


def _in_pickle(path: str) -> dict[str, Tensor]:
    try:
        state = load_state_dict(path, weights_only=True)
    except Exception as error:  # whatever a damaged archive makes of torch
        raise DamagedError(str(error) or type(error).__name__) from error
    if not isinstance(state, Mapping):
        raise DamagedError(f"it holds a {type(state).__name__}, wanted tensors by name")
    found = {name: value for name, value in state.items() if isinstance(name, str) and name.endswith(RANGE_SUFFIX)}
    for name, value in found.items():
        if not isinstance(value, Tensor):
            raise DamagedError(f"{quoted(name)} is a {type(value).__name__}, wanted a tensor")
    _check_sizes((name, value.shape) for name, value in found.items())
    # A copy: these are views of the file.
    return {name: _in_float32(name, value).clone() for name, value in found.items()}


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
