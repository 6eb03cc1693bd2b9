"""A recorded graph as lines that a person reads: one per tensor operation, sizes left out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from qdq_surgery.graph.block_graph import SELF, BlockGraph
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.provenance import Provenance
from qdq_surgery.quantize.quantizer import TensorQuantizer

__all__ = ["Line", "list_routine"]

#: Nodes that say nothing about where tensors go.
_HIDDEN = frozenset({"size", "numel", "expect", "item", "parameter"})


@dataclass(frozen=True)
class Line:
    """One line of a listing.

    Attributes:
        text: Such as ``add = add(dropout, input_tensor)``.
        key: What the line does, whatever its operands are called: lines with the same key correspond.
        quantizer: Path of the quantizer below the block, if the line is one.
        provenance: Why that quantizer is there.
    """

    text: str
    key: str
    quantizer: str | None = None
    provenance: Provenance | None = None


def list_routine(routine: BlockGraph) -> list[Line]:
    """The graph of a routine, line by line. Quantized linears show their quantizers as lines of their own."""
    names: dict[Node, str] = {}
    lines: list[Line] = []
    inputs = [n for n in routine.graph.nodes if n.op == "placeholder" and n.target != SELF]
    for node in routine.graph.nodes:
        names[node] = _name(node, names)
    used = [names[node] for node in inputs if node.users and node.meta.get("shape") != ()]
    lines.append(Line(f"({', '.join(used)})", "inputs"))
    for node in routine.graph.nodes:
        if node.op in ("placeholder", "output") or node.meta.get("op") in _HIDDEN:
            continue
        lines.extend(_lines(routine, node, names))
    lines.append(Line(f"return {_show(routine.output, names)}", "return"))
    return lines


def _lines(routine: BlockGraph, node: Node, names: dict[Node, str]) -> Iterator[Line]:
    op = str(node.meta["op"])
    args = node.args[1:] if node.op == "call_function" and op == "block" else node.args
    shown = [_show(argument, names) for argument in args]
    shown += [f"{key}={_show(value, names)}" for key, value in node.kwargs.items() if _says_something(value)]
    key = f"{op} {node.target if node.op == 'call_module' else ''}".strip()
    module = routine.owner.get_submodule(str(node.target)) if node.op == "call_module" else None
    if isinstance(module, TensorQuantizer):
        yield Line(
            f"{names[node]} = quantize({', '.join(shown)})",
            f"quantize {node.target}",
            str(node.target),
            module.provenance,
        )
        return
    if isinstance(module, QuantLinear):
        weight = f"{node.target}.weight"
        for role, tensor in (("input", shown[0]), ("weight", weight)):
            quantizer = getattr(module, f"_{role}_quantizer")
            if quantizer is not None:
                path = f"{node.target}._{role}_quantizer"
                yield Line(f"{_short(path)} = quantize({tensor})", f"quantize {path}", path, quantizer.provenance)
        shown[0] = _short(f"{node.target}._input_quantizer") if module._input_quantizer is not None else shown[0]
        if module._weight_quantizer is not None:
            shown.append(_short(f"{node.target}._weight_quantizer"))
    if isinstance(module, QuantEmbedding):
        path = f"{node.target}._weight_quantizer"
        provenance = module._weight_quantizer.provenance
        yield Line(f"{_short(path)} = quantize({node.target}.weight)", f"quantize {path}", path, provenance)
        shown.append(_short(path))
    if op == "block":
        callee = node.meta.get("callee")
        what = type(module).__name__ if module is not None else getattr(callee, "function", "attention")
        yield Line(f"{names[node]} = {what}({', '.join(shown)})", key)
        return
    yield Line(f"{names[node]} = {op}({', '.join(shown)})", key)


def _short(path: str) -> str:
    owner, _, name = path.rpartition(".")
    return f"{owner}.{name.removeprefix('_').removesuffix('_quantizer')}_q"


def _name(node: Node, names: dict[Node, str]) -> str:
    op = node.meta.get("op")
    if op == "item":
        source, index = node.args
        return f"{names.get(source, source)}[{index}]"  # type: ignore[arg-type]
    if op == "parameter":
        return str(node.target)
    if op in ("size", "numel"):
        return "n"
    return node.name


def _says_something(value: Any) -> bool:
    return value is not None and not isinstance(value, bool)


def _show(value: Any, names: dict[Node, str]) -> str:
    if isinstance(value, Node):
        return names[value]
    if isinstance(value, (tuple, list)):
        return f"({', '.join(_show(item, names) for item in value)})"
    if isinstance(value, slice):
        ends = ["" if end is None else _show(end, names) for end in (value.start, value.stop)]
        return ":".join(ends)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "..." if value is ... else str(value)
