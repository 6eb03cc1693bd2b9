"""Where quantizers belong."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qdq_surgery.quantize.factory import device_of

META, CPU, CUDA = map(torch.device, ("meta", "cpu", "cuda:1"))


@pytest.mark.parametrize(
    ("weight", "bias", "hook", "elsewhere", "wanted"),
    [
        (CUDA, None, None, CPU, CUDA),
        (META, CUDA, None, META, CUDA),  # a frozen linear while it is loaded
        (META, META, CUDA, CPU, CUDA),  # offloaded, and brought in by accelerate
        (META, None, None, CUDA, CPU),  # not loaded yet
        (None, None, None, CUDA, CUDA),
        (None, None, None, META, CPU),
    ],
)
def test_the_device_of_a_module(
    weight: torch.device | None,
    bias: torch.device | None,
    hook: torch.device | None,
    elsewhere: torch.device,
    wanted: torch.device,
) -> None:
    """By what it holds, and else by the model: machines have not these devices, so parameters are told."""
    owner, model = nn.Module(), SimpleNamespace(device=elsewhere)
    parameters: dict[str, Any] = {"weight": weight, "bias": bias}
    told: Any = {name: device and SimpleNamespace(device=device) for name, device in parameters.items()}
    object.__setattr__(owner, "_parameters", told)
    if hook is not None:
        object.__setattr__(owner, "_hf_hook", SimpleNamespace(execution_device=hook))
    found: Any = model
    assert device_of(owner, found) == wanted
