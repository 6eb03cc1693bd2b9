"""pytorch-quantization's descriptors as plain data and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pytorch_quantization.tensor_quant import QuantDescriptor

from qdq_surgery.errors import ModelError

__all__ = ["descriptor_from_data", "descriptor_to_data", "grid_of"]

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


def descriptor_from_data(data: Mapping[str, Any]) -> QuantDescriptor:
    """What :func:`descriptor_to_data` gave.

    Raises:
        ModelError: It is no descriptor.
    """
    try:
        axis = data["axis"]
        return QuantDescriptor(**{**data, "axis": tuple(axis) if isinstance(axis, list) else axis})
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"the model's config holds a default descriptor that is none ({error}); save the model again"
        ) from error


def grid_of(quantizer: Any) -> tuple[int, tuple[int, ...] | None, bool, bool, bool]:
    """Bits, axes, unsigned, narrow range, and whether what comes out is float; of a descriptor or a quantizer."""
    axis = quantizer._axis
    axes = axis if axis is None else tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    return quantizer._num_bits, axes, quantizer._unsigned, quantizer._narrow_range, quantizer._fake_quant
