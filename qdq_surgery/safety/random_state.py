"""Random numbers that an analysis draws are not missed by whoever draws the next."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from qdq_surgery.safety.transaction import put_back_after

__all__ = ["kept_random", "seed_generators"]


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


def seed_generators(seed: int, devices: Iterable[torch.device]) -> None:
    """Seed torch's generator of the CPU, and those of ``devices``.

    ``torch.manual_seed`` seeds all devices there are, also those whose generators :func:`kept_random` does not put
    back. While CUDA is not in use yet, it notes the seed for later, and formats the whole stack for that each time.

    Args:
        devices: CUDA devices, in use.
    """
    torch.default_generator.manual_seed(seed)
    for device in devices:
        torch.cuda.default_generators[device.index].manual_seed(seed)
