"""Which specs a kind of sites may have beside its own: other ranges, scales and grids, of the same cost at run time."""

from __future__ import annotations

from dataclasses import replace

from qdq_surgery.numerics.range_choice import RANGE_METHODS
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec

__all__ = ["grids", "ranges"]

#: Thresholds of ``outliers`` and shares of ``smooth`` that are tried.
_THRESHOLDS = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
_ALPHAS = (0.4, 0.5, 0.65, 0.8)

#: A zero point is tried at these shares of the rules' own.
_ZERO_POINTS = (0.5, 0.75, 1.5, 2.0)


def ranges(spec: QuantSpec, role: str = "input") -> tuple[QuantSpec, ...]:
    """The same grid with other ways to its range, or to its scales where the rules give it scales.

    Args:
        role: ``"weight"`` or ``"input"``: ranges by channel have more than one way for weights alone.
    """
    if spec.scaled:
        found = [CalibratorSpec("outliers", threshold=each) for each in _THRESHOLDS]
        found += [CalibratorSpec("smooth", alpha=each) for each in _ALPHAS]
    elif spec.axis is not None:
        names = [name for name, each in RANGE_METHODS.items() if each.by_channel or not each.histogram]
        found = [CalibratorSpec(name) for name in names if role == "weight"]
    else:
        settings = [(name, setting) for name, each in RANGE_METHODS.items() for setting in each.settings]
        found = [CalibratorSpec(name, setting.get("percentile")) for name, setting in settings]
    return tuple(replace(spec, calibrator=each) for each in found if each != spec.calibrator)


def grids(spec: QuantSpec) -> tuple[QuantSpec, ...]:
    """The same range on other grids, where the target has them: other zero points where there is one."""
    if not spec.zero_point:
        return ()
    found = {round(share * spec.zero_point) for share in _ZERO_POINTS} - {0, spec.zero_point}
    return tuple(replace(spec, zero_point=each) for each in sorted(found) if each <= 2**spec.num_bits // 2)
