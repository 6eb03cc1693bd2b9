"""The methods that find a range, by name: rules, statistics, reports and command lines read them here.

A new method is a function beside those of :mod:`~qdq_surgery.numerics.range_methods`, and its entry.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qdq_surgery.errors import CalibrationError, OptionError
from qdq_surgery.numerics import range_methods
from qdq_surgery.numerics.grid import INT8, Grid
from qdq_surgery.numerics.histogram import Histogram

__all__ = ["BEST", "PERCENTILES", "RANGE_METHODS", "RangeMethod", "check_method_name", "choose", "method_names"]

#: The percentiles that are compared.
PERCENTILES = (99.9, range_methods.DEFAULT_PERCENTILE, 99.999)

#: Of all methods and settings the one with the smallest quantization error.
BEST = "best"


@dataclass(frozen=True)
class RangeMethod:
    """One way from data to a range.

    Attributes:
        find: From ``counts``, ``edges`` and those options that it names, such as ``grid``, to a range; what lies above
            the largest magnitude counts as that.
        words: What reports call it, a format of its options.
        settings: The options that are compared, and that ``best`` chooses from.
        histogram: Whether it needs one; otherwise its range is the largest magnitude.
        by_channel: From a weight, its channels' axis and a grid to a range for each channel, if it can.
    """

    find: Callable[..., float]
    words: str
    settings: tuple[Mapping[str, float], ...] = ({},)
    histogram: bool = True
    by_channel: Callable[[Tensor, int, Grid], Tensor] | None = None

    def options(self, **given: Any) -> dict[str, Any]:
        """The options of :attr:`find`: those of ``given`` that are not ``None``, and its defaults."""
        parameters = list(inspect.signature(self.find).parameters.values())[2:]
        found = {each.name: given.get(each.name) for each in parameters}
        return {each.name: each.default if found[each.name] is None else found[each.name] for each in parameters}

    def in_words(self, **given: Any) -> str:
        """The method with these options, in words."""
        return self.words.format(**self.options(**given))


RANGE_METHODS: dict[str, RangeMethod] = {
    "max": RangeMethod(range_methods.max_amax, "max", histogram=False),
    "percentile": RangeMethod(
        range_methods.percentile_amax, "{percentile:g} %", tuple({"percentile": each} for each in PERCENTILES)
    ),
    "entropy": RangeMethod(range_methods.entropy_amax, "entropy"),
    "mse": RangeMethod(range_methods.mse_amax, "mse", by_channel=range_methods.channel_mse_amax),
}


def method_names() -> tuple[str, ...]:
    """What may be asked for."""
    return (*RANGE_METHODS, BEST)


def takes_percentile(name: str | None) -> bool:
    """Whether the method of that name has a percentile."""
    return name in RANGE_METHODS and "percentile" in RANGE_METHODS[name].options()


def check_method_name(name: str) -> None:
    """Whether there is such a method.

    Raises:
        OptionError: There is none.
    """
    if name not in method_names():
        raise OptionError(f"unknown calibration method '{name}'; write one of {', '.join(method_names())}")


def choose(histogram: Histogram, method: str, grid: Grid = INT8, **options: Any) -> tuple[float, str]:
    """The range by one method, and the method in words; of ``best``, the one that it took.

    Args:
        method: One of :func:`method_names`.
        options: For the methods that take them, such as ``percentile``, in percent.

    Raises:
        CalibrationError: There was a NaN or an infinite value.
        OptionError: There is no such method.
    """
    check_method_name(method)
    top = float(histogram.amax)
    if not math.isfinite(top):
        raise CalibrationError(f"there was {'an infinite value' if math.isinf(top) else 'a NaN'} in the data")
    if top == 0.0:
        return 0.0, method
    table = histogram.table()
    settings = [(each, setting) for each in RANGE_METHODS.values() for setting in each.settings]
    found: list[tuple[float, float, str]] = []
    for each, setting in settings if method == BEST else [(RANGE_METHODS[method], options)]:
        given = {**options, **setting}
        amax = min(each.find(*table, **each.options(grid=grid, **given)), top)
        error = range_methods.relative_error(*table, amax, grid) if method == BEST else 0.0
        found.append((error, amax, each.in_words(**given)))
    _, amax, words = min(found, key=lambda item: item[0])
    return amax, words
