"""States that are put back."""

from __future__ import annotations

import pytest
from torch import nn

from qdq_surgery.safety.transaction import kept_modes


def test_each_module_has_its_own_mode_again() -> None:
    one, two = nn.Sequential(nn.Dropout(), nn.Linear(2, 2)), nn.Dropout()
    one[0].eval()
    two.eval()

    def changed_and_stopped() -> None:
        with kept_modes(one, two):
            one.train()
            two.train()
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        changed_and_stopped()
    assert [each.training for each in (*one.modules(), *two.modules())] == [True, False, True, False]
