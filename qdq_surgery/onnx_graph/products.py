"""The matrix products of an exported file: which they are, what feeds them, what reads them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_file.metadata import own_entries
from qdq_surgery.onnx_file.reader import open_proto
from qdq_surgery.onnx_file.sites import METADATA, Site, check_sites, load_sites

__all__ = ["KINDS", "MOVES", "FileGemm", "FileGraph", "module_of"]

#: What a product is for. ``linear``: of the encoder, or with a quantized weight. ``attention``: of two activations.
#: ``head``: behind the encoder. ``other``: the rest, such as the projection of embeddings.
KINDS = ("linear", "attention", "head", "other")

#: Which inputs of a node are its factors.
_FACTORS = {"MatMul": 2, "Gemm": 2, "Conv": 2, "Einsum": None, "Attention": 3}

#: Operators that move values about and change none.
MOVES = frozenset(
    "Reshape Transpose Squeeze Unsqueeze Flatten Slice Split Concat Gather Expand Tile Identity Cast".split()
)
_PAIR = ("QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True)
class FileGemm:
    """One product of the file.

    Attributes:
        name: Of the node.
        op: Its operator.
        kind: One of :data:`KINDS`.
        factors: Names of the values that are multiplied.
        output: Name of the result.
        sites: For each factor the Q/DQ pair that it comes from, or ``None``.
        constant: No input of the file changes it, so that a runtime may compute it once, when it opens the file.
        aliases: Names under which a runtime may know it if it merged it with what follows: of the nodes that read its
            result one after another, and of what they return.
    """

    name: str
    op: str
    kind: str
    factors: tuple[str, ...]
    output: str
    sites: tuple[Site | None, ...]
    constant: bool
    aliases: frozenset[str]

    @property
    def module(self) -> str:
        """Path of the module in PyTorch that it belongs to; empty if it is not known."""
        return module_of(self.name)


class FileGraph:
    """The graph of an exported file, without its weights.

    Attributes:
        path: The file.
        model: The ``onnx.ModelProto``; what is stored beside the file is not in it.
        metadata: The file's own, without their prefix.
        sites: Its Q/DQ pairs.
        nodes: By name.
        producers: The node that makes a value, by the value's name.
        readers: The nodes that read a value, by the value's name.
        constants: Names of the stored values.
        gemms: All products, in the order of the file.

    Raises:
        ExportError: There is no such file, it is no ONNX file, ``export_onnx`` did not write it, or it holds products
            where the receipt does not look.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.model: Any = open_proto(path)
        graph = self.model.graph
        self.metadata = own_entries(((entry.key, entry.value) for entry in self.model.metadata_props), str(path))
        if "sites" not in self.metadata:
            raise ExportError(f"{path} was not written by qdq_surgery.export_onnx; it has none of its metadata")
        self.sites = load_sites(self.metadata["sites"], f"{path}, '{METADATA}sites' of its metadata")
        self.nodes = {node.name: node for node in graph.node}
        self.producers = {value: node for node in graph.node for value in node.output}
        self.readers: dict[str, list[Any]] = {}
        for node in graph.node:
            for value in dict.fromkeys(node.input):
                self.readers.setdefault(value, []).append(node)
        self.constants = {tensor.name for tensor in graph.initializer}
        self._outputs = {value.name for value in graph.output}
        self._by_value = {site.value: site for site in self.sites}
        self._check()
        check_sites(self.sites, {name: (node.op_type, node.output) for name, node in self.nodes.items()}, str(path))
        products = [node for node in graph.node if node.op_type in _FACTORS]
        fixed = self._constant_values()
        layers = {_layers(name) for site in self.sites for name in site.quantizers} - {None}
        behind: set[str] = set()  # values that an encoder's product leads to
        gemms: list[FileGemm] = []
        for node in graph.node:
            # ONNX orders nodes.
            reached = any(value in behind for value in node.input)
            if node.op_type in _FACTORS:
                factors = tuple(node.input)[: _FACTORS[node.op_type]]
                sites = tuple(self.site_of(factor) for factor in factors)
                kind = self._kind(node.name, factors, sites, layers, reached)
                reached = reached or kind in ("linear", "attention")
                gemms.append(
                    FileGemm(
                        node.name,
                        node.op_type,
                        kind,
                        factors,
                        node.output[0],
                        sites,
                        node.output[0] in fixed,
                        frozenset(self._aliases(node)),
                    )
                )
            if reached:
                behind.update(node.output)
        assert len(gemms) == len(products)
        self.gemms = tuple(gemms)

    def site_of(self, value: str) -> Site | None:
        """The Q/DQ pair that ``value`` comes from, if nothing but moves stands between."""
        while value not in self._by_value:
            node = self.producers.get(value)
            if node is None or node.op_type not in MOVES:
                return None
            value = node.input[0]
        # That the file lists a pair does not mean that it is there.
        node = self.producers.get(value)
        return self._by_value[value] if node is not None and node.op_type == "DequantizeLinear" else None

    def upstream(self, value: str) -> Iterator[Any]:
        """The nodes that ``value`` comes from: pairs, moves, a bias or a factor, and the first node that does more."""
        queue = [value]
        seen: set[str] = set()
        while queue:
            node = self.producers.get(queue.pop(0))
            if node is None or node.name in seen:
                continue
            seen.add(node.name)
            yield node
            if node.op_type in MOVES or node.op_type in _PAIR:
                queue.append(node.input[0])
            elif node.op_type in ("Add", "Mul", "Div") and any(each in self.constants for each in node.input):
                queue.extend(each for each in node.input if each not in self.constants)

    def lost(self, module: str) -> list[str]:
        """Quantizers of a module that the file lists and whose pair is not in it."""
        return [
            name
            for site in self.sites
            if site.dequantize not in self.nodes
            for name in site.quantizers
            if name.rpartition(".")[0] == module
        ]

    def _check(self) -> None:
        nested = [node.name for node in self.model.graph.node if any(each.HasField("g") for each in node.attribute)]
        if nested or self.model.functions:
            where = f"the branch or loop '{nested[0]}'" if nested else f"the function '{self.model.functions[0].name}'"
            raise ExportError(f"{self.path} has {where}, in which a receipt cannot count; export the model again")
        unnamed = [node for node in self.model.graph.node if node.op_type in _FACTORS and not node.name]
        if unnamed or len(self.nodes) != len(self.model.graph.node):
            raise ExportError(f"{self.path} has nodes without a name of their own; export the model again")

    def _constant_values(self) -> set[str]:
        known = set(self.constants) | {""}
        for node in self.model.graph.node:
            if all(value in known for value in node.input):
                known.update(node.output)
        return known - {""}

    def _kind(
        self, name: str, factors: Sequence[str], sites: Sequence[Site | None], layers: set[str | None], reached: bool
    ) -> str:
        weights = [self._is_weight(factor) for factor in factors]
        if not any(weights):
            return "attention"
        inside = _layers(module_of(name))
        quantized = any(weight and site is not None for weight, site in zip(weights, sites, strict=True))
        # Without a quantizer in the file, any module with a number in its path counts as a layer.
        if quantized or (inside is not None and (inside in layers or not layers)):
            return "linear"
        return "head" if reached else "other"

    def _is_weight(self, value: str) -> bool:
        while value not in self.constants:
            node = self.producers.get(value)
            if node is None or (node.op_type not in MOVES and node.op_type not in _PAIR):
                return False
            value = node.input[0]
        return True

    def _aliases(self, product: Any) -> Iterator[str]:
        node = product
        for _ in range(4):  # a bias, a residual, an activation, a move: nothing merges more
            yield node.name
            yield from node.output
            readers = self.readers.get(node.output[0], [])
            if len(readers) != 1 or node.output[0] in self._outputs or readers[0].op_type in (*_FACTORS, *_PAIR):
                return
            node = readers[0]


def module_of(name: str) -> str:
    """Path of the module that a node is named after."""
    return name.rpartition("/")[0]


def _layers(path: str) -> str | None:
    """``encoder.layer`` for ``encoder.layer.0.output.dense``; ``None`` for what is in no numbered module."""
    parts = path.split(".")
    return next((".".join(parts[:at]) for at, part in enumerate(parts) if part.isdecimal()), None)
