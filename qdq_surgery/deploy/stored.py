"""What a file says about itself: its metadata, and the weights it stores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdq_surgery.deploy.sites import METADATA, Site, load_sites
from qdq_surgery.errors import ExportError

__all__ = ["read_metadata", "read_sites", "stored_weights"]


def read_metadata(path: Path) -> dict[str, str]:
    """The file's own entries, without their prefix.

    Raises:
        ExportError: There is no such file, it is no ONNX file, or qdq_surgery did not write it.
    """
    import onnx_ir as ir

    if not path.is_file():
        raise ExportError(f"there is no file {path}")
    try:
        properties = ir.load(path).metadata_props
    except Exception as error:  # protobuf has its own
        raise ExportError(f"{path} is no ONNX file: {str(error).splitlines()[0]}") from error
    found = {key.removeprefix(METADATA): value for key, value in properties.items() if key.startswith(METADATA)}
    if "sites" not in found:
        raise ExportError(f"{path} was not written by qdq_surgery.export_onnx; it has none of its metadata")
    return found


def read_sites(path: Path) -> list[Site]:
    """The file's Q/DQ pairs; same errors."""
    return load_sites(read_metadata(path)["sites"])


def stored_weights(path: Path) -> dict[str, NDArray[Any]]:
    """The dequantized weights, float32, by the name of the DequantizeLinear's output."""
    import onnx_ir as ir

    made: dict[str, NDArray[Any]] = {}
    for node in ir.load(path).graph:
        constants = [None if value is None else value.const_value for value in node.inputs]
        if node.op_type != "DequantizeLinear" or len(constants) < 2 or constants[0] is None or constants[1] is None:
            continue
        integers, scale = constants[0].numpy().astype(np.float32), constants[1].numpy().astype(np.float32)
        if len(constants) > 2 and constants[2] is not None:
            zero_point = constants[2].numpy().astype(np.float32)
        else:
            zero_point = np.zeros_like(scale)
        axis = node.attributes.get_int("axis", 1)
        shape = [-1 if at == axis % integers.ndim else 1 for at in range(integers.ndim)] if scale.ndim else []
        name = node.outputs[0].name
        assert name is not None
        made[name] = (integers - zero_point.reshape(shape)) * scale.reshape(shape)
    return made
