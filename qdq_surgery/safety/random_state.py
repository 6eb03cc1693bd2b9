"""Random numbers that an analysis draws are not missed by whoever draws the next."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch

from qdq_surgery.safety.transaction import put_back_after

__all__ = ["alone", "kept_random", "seed_generators"]

_alone = threading.RLock()


def _after_fork() -> None:
    """A child of a process in which a thread held the lock has no thread that lets it go."""
    global _alone
    _alone = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@contextmanager
def alone() -> Iterator[None]:
    """One thread at a time: whoever compares two runs that draw the same numbers, and so counts on the generators.

    These belong to the process. What runs inside must not wait for another thread that comes here, too.
    """
    with _alone:
        yield


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
