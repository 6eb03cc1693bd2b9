"""What a file says about itself: its metadata, and the weights it stores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_file.metadata import own_entries
from qdq_surgery.onnx_file.reader import open_graph
from qdq_surgery.onnx_file.sites import METADATA, Site, check_sites, load_sites
from qdq_surgery.safety.untrusted import quoted

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["read_metadata", "read_sites", "stored_weights"]


def read_metadata(path: Path) -> dict[str, str]:
    """The file's own entries, without their prefix.

    Raises:
        ExportError: There is no such file, it is no ONNX file, or qdq_surgery did not write it.
    """
    return _metadata(path, open_graph(path))


def read_sites(path: Path) -> list[Site]:
    """The file's Q/DQ pairs; same errors, and the pairs must be those of its graph."""
    model = open_graph(path)
    sites = load_sites(_metadata(path, model)["sites"], f"{path}, '{METADATA}sites' of its metadata")
    nodes = {
        node.name: (node.op_type, [str(value.name) for value in node.outputs])
        for node in model.graph
        if node.name is not None
    }
    check_sites(sites, nodes, str(path))
    return sites


def stored_weights(path: Path) -> dict[str, NDArray[Any]]:
    """The dequantized weights, float32, by the name of the DequantizeLinear's output.

    Raises:
        ExportError: See :func:`read_metadata`, or a weight's scale does not fit it.
    """
    made: dict[str, NDArray[Any]] = {}
    for node in open_graph(path).graph:
        if node.op_type != "DequantizeLinear":
            continue
        name = str(node.outputs[0].name)
        try:
            found = _dequantized(node)
        except Exception as error:  # NumPy's, or onnx_ir's of a tensor that is not what it says
            raise ExportError(f"{path} has a weight {quoted(name)} that cannot be read: {error}") from error
        if found is not None:
            made[name] = found
    return made


def _metadata(path: Path, model: ir.Model) -> dict[str, str]:
    found = own_entries(model.metadata_props.items(), str(path))
    if "sites" not in found:
        raise ExportError(f"{path} was not written by qdq_surgery.export_onnx; it has none of its metadata")
    return found


def _dequantized(node: ir.Node) -> NDArray[Any] | None:
    constants = [None if value is None else value.const_value for value in node.inputs]
    if constants[0] is None or constants[1] is None:
        return None
    integers, scale = constants[0].numpy().astype(np.float32), constants[1].numpy().astype(np.float32)
    if len(constants) > 2 and constants[2] is not None:
        zero_point = constants[2].numpy().astype(np.float32)
    else:
        zero_point = np.zeros_like(scale)
    axis = node.attributes.get_int("axis", 1)
    shape = [-1 if at == axis % integers.ndim else 1 for at in range(integers.ndim)] if scale.ndim else []
    weight: NDArray[Any] = (integers - zero_point.reshape(shape)) * scale.reshape(shape)
    if weight.shape != integers.shape:
        raise ValueError(f"its scale has {scale.size} values, and its shape is {integers.shape}")
    return weight
