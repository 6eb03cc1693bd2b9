"""Random numbers that an analysis draws are not missed by whoever draws the next."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from qdq_surgery.safety.transaction import put_back_after

__all__ = ["kept_random"]


@contextmanager
def kept_random(devices: Iterable[torch.device]) -> Iterator[None]:
    """The generators of torch, Python and numpy are afterwards as they were.

    Args:
        devices: The CUDA devices whose generators may be used; the CPU's always is.
    """
    python, arrays = random.getstate(), np.random.get_state()

    def put_back() -> None:
        random.setstate(python)
        np.random.set_state(arrays)

    with put_back_after(put_back), torch.random.fork_rng(list(devices)):
        yield
