"""The ranges in a checkpoint: from safetensors, or from pickles that hold nothing but tensors. And its metadata."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from transformers.modeling_utils import load_state_dict

from qdq_surgery.errors import ModelError

__all__ = ["RANGE_PATTERN", "RANGE_SUFFIX", "read_ranges"]

#: How the name of a range ends in a state dict, here as in QDQBERT.
RANGE_SUFFIX = "_quantizer._amax"

#: The same as a regular expression.
RANGE_PATTERN = r"_quantizer\._amax$"


def read_ranges(files: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Ranges by the name of their quantizer, in float32; and the metadata of the first file.

    Raises:
        ModelError: One is negative or not finite.
    """
    ranges: dict[str, Tensor] = {}
    first: dict[str, str] | None = None
    for path in files:
        found, metadata = _in_safetensors(path) if path.endswith(".safetensors") else (_in_pickle(path), {})
        ranges.update({name.removesuffix("._amax"): value for name, value in found.items()})
        first = metadata if first is None else first
    if ranges:
        # (In numpy, because torch would wake up its threads for this.)
        every = np.concatenate([value.numpy().reshape(-1) for value in ranges.values()])
        if not (np.isfinite(every) & (every >= 0)).all():
            wrong = next(name for name, v in ranges.items() if not bool((v.isfinite() & (v >= 0)).all()))
            raise ModelError(
                f"the checkpoint's range of {wrong} is negative or not finite; calibrate the model again and save it"
            )
    return ranges, first or {}


def _in_safetensors(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    # By way of numpy, which takes half the time for so many small tensors, and copies what would else be a view of the
    # whole file.
    with safe_open(path, framework="np") as file:
        metadata = file.metadata() or {}
        names = [name for name in file.keys() if name.endswith(RANGE_SUFFIX)]  # noqa: SIM118 (it is no dict)
        try:
            found = {name: torch.from_numpy(file.get_tensor(name)) for name in names}
        except TypeError:  # somebody cast them to bfloat16, which numpy does not know
            with safe_open(path, framework="pt") as other:
                found = {name: other.get_tensor(name) for name in names}
    floats = {name: value if value.dtype == torch.float32 else value.float() for name, value in found.items()}
    return floats, metadata


def _in_pickle(path: str) -> dict[str, Tensor]:
    state = load_state_dict(path, weights_only=True)
    # A copy: these are views of the file.
    return {name: value.to(torch.float32, copy=True) for name, value in state.items() if name.endswith(RANGE_SUFFIX)}
