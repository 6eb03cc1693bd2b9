"""Random numbers of an analysis: the same each time, and none that somebody else draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for
from ecosystem import calibrated

import qdq_surgery as qs
from qdq_surgery.safety.random_state import kept_random, seed_generators


def test_the_numbers_are_those_of_manual_seed() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(4)
    torch.manual_seed(6)
    before = torch.get_rng_state()
    with kept_random([]):
        seed_generators(5, [])
        assert torch.equal(torch.rand(4), wanted)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["sensitivity", "calibrate"])
def test_other_devices_get_no_seed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps a seed until CUDA is first used: what somebody draws there then would always be the same."""
    own = tmp_path / "own.yaml"
    own.write_text("schema: 1\nname: own\nextends: qdqbert\ncalibration: {dropout: true}\n", encoding="utf-8")
    qmodel = calibrated(rules=str(own))
    data: list[dict[str, Any]] = [batch_for(qmodel, (2, 5))]
    seeded: list[Any] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "manual_seed", seeded.append)
    if name == "sensitivity":
        qs.sensitivity(qmodel, data, sites=False, kinds=False)
    else:  # which asks, too, what padding does
        qs.calibrate(qmodel, data)
    assert seeded == []
