"""What the limit of the tables of growth is made of: the model's own products, each once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import benchmark_growth as growth
import qdq_surgery as qs

POINT = growth.Point(batch=2, length=8, layers=2, width=128)


def test_multiply_adds_are_those_of_the_receipt() -> None:
    qmodel = qs.convert(POINT.model(), "linear-only", inplace=True)
    qs.calibrate(qmodel, [POINT.inputs()])
    receipt = qs.frozen_receipt(qs.freeze(qmodel, inplace=True), shape=(POINT.batch, POINT.length))
    found = [sum(gemm.macs for gemm in receipt.gemms if gemm.kind == kind) for kind in ("linear", "attention")]
    assert POINT.adds() == tuple(found)


class Products(TorchDispatchMode):
    """Sees how many multiply-adds are made, from the shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.adds = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.bmm, torch.ops.onednn.qlinear_pointwise):
            self.adds += math.prod(result.shape) * args[0].shape[-1]
        return result


@pytest.mark.parametrize("kind", growth.RUNS)
def test_plain_products_are_as_many_as_the_model_has(kind: str) -> None:
    linear, attention = POINT.adds()
    found = growth.products(POINT, kind)
    with torch.inference_mode(False), torch.no_grad():
        for name, wanted in zip(("linears", "attention"), (linear, attention), strict=True):
            if name in found:
                with Products() as seen:
                    found[name](None)
                assert seen.adds == wanted
    assert ("attention" in found) == (kind in ("frozen", "float"))


def test_the_axes_meet_in_the_middle() -> None:
    for axis, values in growth.AXES.items():
        assert growth.Point() in [replace(growth.Point(), **{axis: value}) for value in values]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the system does not tell a process's peak")
def test_memory_and_time_are_seen() -> None:
    made, cost = growth.once(lambda: torch.ones(50_000_000, dtype=torch.uint8))
    assert made.sum() == 50_000_000
    assert 45 < cost.megabytes < 80
    assert cost.seconds > 0
