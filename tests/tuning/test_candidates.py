"""Which specs are tried."""

from __future__ import annotations

import pytest

from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.tuning.candidates import grids, ranges

SPECS = [
    QuantSpec(),
    QuantSpec(unsigned=True),
    QuantSpec(calibrator=CalibratorSpec("mse"), num_bits=4),
    QuantSpec(axis=0),
    QuantSpec(axis=-1, calibrator=CalibratorSpec("outliers", threshold=1.5)),
    QuantSpec(axis=-1, calibrator=CalibratorSpec("smooth"), unsigned=True, zero_point=32),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_they_cost_what_the_spec_costs(spec: QuantSpec) -> None:
    """The same integers, along the same axis."""
    found = (*ranges(spec, "weight" if spec.axis == 0 else "input"), *grids(spec))
    assert len(set(found)) == len(found) > 0
    assert spec not in found
    assert {(each.num_bits, each.axis, each.unsigned, each.narrow_range) for each in found} == {
        (spec.num_bits, spec.axis, spec.unsigned, spec.narrow_range)
    }
    assert all(each.zero_point == spec.zero_point for each in ranges(spec))
    assert all(each.calibrator == spec.calibrator and each.zero_point > 0 for each in grids(spec))


def test_what_is_tried() -> None:
    names = [str(each.calibrator) for each in ranges(QuantSpec())]
    assert names == ["percentile(99.9%)", "percentile(99.99%)", "percentile(99.999%)", "entropy", "mse"]
    assert [str(each.calibrator) for each in ranges(QuantSpec(axis=0), "weight")] == ["mse"]
    assert ranges(QuantSpec(axis=0), "input") == ()
    assert {each.calibrator.name for each in ranges(SPECS[4])} == {"outliers", "smooth"}
    assert [each.zero_point for each in grids(SPECS[5])] == [16, 24, 48, 64]
    assert grids(QuantSpec(unsigned=True)) == ()
