"""pytorch-quantization's descriptors as plain data and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from pytorch_quantization.tensor_quant import QuantDescriptor

from qdq_surgery.numerics.grid import Grid
from qdq_surgery.safety.untrusted import DamagedError, Item

__all__ = ["descriptor_from_data", "descriptor_to_data", "fields_of", "grid_of", "kept_axes"]

#: The largest range there is, float32's largest number, and the most channels that may have one.
_LARGEST, _MOST_CHANNELS = 3.4028235e38, 1_000_000

#: The fields of a descriptor and what they are by default.
_FIELDS = {
    "num_bits": 8,
    "axis": None,
    "calib_method": "max",
    "unsigned": False,
    "narrow_range": False,
    "fake_quant": True,
    "learn_amax": False,
    "scale_amax": None,
    "name": None,
}


def descriptor_to_data(descriptor: QuantDescriptor) -> dict[str, Any]:
    """``descriptor`` as JSON-able data: bits, axis, calibration method, and what else is not the default."""
    fields = {name: getattr(descriptor, f"_{name}") for name in _FIELDS}
    shown = ("num_bits", "axis", "calib_method")
    data = {name: value for name, value in fields.items() if name in shown or value != _FIELDS[name]}
    if isinstance(data["axis"], (tuple, list)):
        data["axis"] = list(data["axis"])
    if descriptor.amax is not None:
        data["amax"] = np.asarray(descriptor.amax).tolist()
    return data


def descriptor_from_data(data: Item) -> QuantDescriptor:
    """What :func:`descriptor_to_data` gave.

    Raises:
        DamagedError: It is no descriptor; says where.
    """
    found = data.fields(("num_bits", "axis"), (*_FIELDS, "amax"))
    try:
        return QuantDescriptor(**{name: _READERS[name](item) for name, item in found.items()})
    except (TypeError, ValueError) as error:  # fields that do not go together
        raise DamagedError(f"{data.where}: {error}") from None


def _axis(item: Item) -> Any:
    if isinstance(item.value, list):
        return tuple(each.integer(-8, 8) for each in item.items(8))
    return None if item.value is None else item.integer(-8, 8)


def _range(item: Item, depth: int = 4) -> Any:
    if isinstance(item.value, list) and depth:
        return [_range(each, depth - 1) for each in item.items(_MOST_CHANNELS)]
    return item.number(0.0, _LARGEST)


_READERS: dict[str, Callable[[Item], Any]] = {
    "num_bits": lambda item: item.integer(0, 32),
    "axis": _axis,
    "calib_method": lambda item: item.one_of(("max", "histogram")),
    "unsigned": Item.flag,
    "narrow_range": Item.flag,
    "fake_quant": Item.flag,
    "learn_amax": Item.flag,
    "scale_amax": lambda item: None if item.value is None else item.number(0.0, _LARGEST),
    "name": lambda item: None if item.value is None else item.text(),
    "amax": _range,
}


def kept_axes(axis: Any) -> tuple[int, ...] | None:
    """The per-channel axes, of which pytorch-quantization takes one, or several in a tuple or a list."""
    return axis if axis is None else tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)


def grid_of(quantizer: Any) -> Grid:
    """The grid of a descriptor, or of a quantizer."""
    spec = getattr(quantizer, "spec", None)  # a descriptor has none, nor a zero point
    zero_point = 0 if spec is None else spec.zero_point
    return Grid(quantizer._num_bits, quantizer._unsigned, quantizer._narrow_range, zero_point)


def fields_of(quantizer: Any) -> tuple[int, tuple[int, ...] | None, bool, bool, bool]:
    """Bits, axes, unsigned, narrow range, and whether what comes out is float; of a descriptor or a quantizer."""
    grid = grid_of(quantizer)
    return grid.bits, kept_axes(quantizer._axis), grid.unsigned, grid.narrow_range, quantizer._fake_quant
