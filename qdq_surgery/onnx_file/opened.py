"""A graph with what its file says of it: read once, and passed along to all who look at it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_file.metadata import METADATA, Site, check_sites, load_sites, own_entries, read_config
from qdq_surgery.onnx_file.reader import open_graph
from qdq_surgery.onnx_file.writer import LARGEST
from qdq_surgery.safety.untrusted import quoted

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["OnnxFile", "open_exported", "open_file"]


class OnnxFile:
    """A graph and its metadata.

    Attributes:
        model: Weights that lie beside the file are read when they are asked for.
        path: Of the file; what messages call a graph that is in none.
        sites: Its Q/DQ pairs, if they are known from elsewhere; read from its metadata if left out.
    """

    def __init__(self, model: ir.Model, path: Path = Path("this model"), sites: Sequence[Site] | None = None) -> None:
        self.model, self.path = model, path
        if sites is not None:
            self.sites = tuple(sites)

    @cached_property
    def metadata(self) -> Mapping[str, str]:
        """The entries that ``export_onnx`` wrote, without their prefix.

        Raises:
            ExportError: One stands twice.
        """
        return own_entries(self.model.metadata_props.items(), str(self.path))

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """The Q/DQ pairs that it lists; none if it lists none.

        Raises:
            ExportError: The list is none, or not of this graph.
        """
        text = self.metadata.get("sites", "[]")
        sites = load_sites(text, f"{self.path}, '{METADATA}sites' of its metadata")
        nodes = {
            str(node.name): (node.op_type, [str(value.name) for value in node.outputs]) for node in self.model.graph
        }
        check_sites(sites, nodes, str(self.path))
        return tuple(sites)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """That of the model; empty if the file does not tell.

        Raises:
            ExportError: It is none.
        """
        return read_config(self.metadata.get("config", "{}"), str(self.path))

    @cached_property
    def weights(self) -> Mapping[str, NDArray[Any]]:
        """The dequantized weights, float32, by the name of the DequantizeLinear's output.

        Raises:
            ExportError: A weight's scale does not fit it.
        """
        made: dict[str, NDArray[Any]] = {}
        for node in self.model.graph:
            if node.op_type != "DequantizeLinear":
                continue
            name = str(node.outputs[0].name)
            try:
                found = _dequantized(node)
            except Exception as error:  # NumPy's, or onnx_ir's of a tensor that is not what it says
                raise ExportError(f"{self.path} has a weight {quoted(name)} that cannot be read: {error}") from error
            if found is not None:
                made[name] = found
        return made

    @property
    def any_batch(self) -> bool:
        """Whether the first axis of each input is open."""
        shapes = [value.shape for value in self.model.graph.inputs]
        return all(shape is not None and len(shape) and not isinstance(shape[0], int) for shape in shapes)

    def save(self, path: Path, data: str) -> None:
        """Write the graph as it is by now.

        Args:
            data: Name of a file beside it, for weights that are too large to be in it.
        """
        import onnx_ir as ir

        size = sum(value.const_value.nbytes for value in self.model.graph.initializers.values() if value.const_value)
        ir.save(self.model, path, external_data=data if size > LARGEST else None)


def open_file(path: str | Path, sites: Sequence[Site] | None = None) -> OnnxFile:
    """Any ONNX file.

    Args:
        sites: See :class:`OnnxFile`.

    Raises:
        ExportError: There is no such file, or it is no ONNX file that can be opened.
    """
    return OnnxFile(open_graph(path), Path(path), sites)


def open_exported(path: str | Path) -> OnnxFile:
    """The same of a file that ``export_onnx`` wrote.

    Raises:
        ExportError: See :func:`open_file`; or it wrote another.
    """
    file = open_file(path)
    if "sites" not in file.metadata:
        raise ExportError(
            f"{path} was not written by qdq_surgery.export_onnx; it has none of its metadata; export the model anew"
        )
    return file


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
