"""Whether a parsed graph is one: what a node reads was made before it, and nodes have the inputs they must have.

ONNX asks for this of every file. What looks at graphs here follows values from node to node, and relies on it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qdq_surgery.safety.untrusted import quoted
from qdq_surgery.text.optional_imports import require

__all__ = ["check_structure"]

_OWN = ("", "ai.onnx")
#: Attributes of these types hold graphs.
_GRAPH, _GRAPHS = 5, 10


def check_structure(model: Any) -> None:
    """Nothing, if the graphs of an ``onnx.ModelProto`` are in order.

    Raises:
        ValueError: What is wrong, as the reason in a message.
    """
    versions = {each.domain: each.version for each in model.opset_import}
    opset = max((versions.get(domain, 0) for domain in _OWN), default=0)
    if not 1 <= opset <= 1000:
        raise ValueError(f"it has version {opset} of ONNX's operators, which there is not")
    _graph(model.graph, frozenset(), opset)
    for function in model.functions:
        _nodes(function.node, set(function.input), opset)


def _graph(graph: Any, outer: Iterable[str], opset: int) -> None:
    known = set(outer)
    known.update(value.name for value in graph.input)
    known.update(tensor.name for tensor in graph.initializer)
    known.update(tensor.values.name for tensor in graph.sparse_initializer)
    _nodes(graph.node, known, opset)
    for value in graph.output:
        if value.name not in known:
            raise ValueError(f"no node makes its output {quoted(value.name)}")


def _nodes(nodes: Iterable[Any], known: set[str], opset: int) -> None:
    made: set[str] = set()
    for node in nodes:
        what = f"node {quoted(node.name)} ({quoted(node.op_type)})"
        texts = (node.name, node.op_type, node.domain, *node.input, *node.output)
        if not all(isinstance(text, str) for text in texts):  # protobuf gives bytes that are no UTF-8 as they are
            raise ValueError(f"{what} has a name that is no UTF-8")
        absent = next((value for value in node.input if value and value not in known), None)
        if absent is not None:
            raise ValueError(f"{what} reads {quoted(absent)}, which nothing makes before it")
        _operator(node, what, opset)
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.type == _GRAPH else []), *attribute.graphs):
                _graph(inner, known, opset)
        for value in node.output:
            if value and value in made:
                raise ValueError(f"{what} makes {quoted(value)}, which another node makes")
            made.add(value)
            known.add(value)


def _operator(node: Any, what: str, opset: int) -> None:
    """Numbers of inputs and outputs, and types of attributes, as ONNX has them; nothing is known of other domains."""
    defs = require("onnx", "looking at an ONNX file").defs
    if not defs.has(node.op_type):
        return
    if node.domain not in _OWN:
        # Its name is all that is looked at in places: whatever is called Reshape reads something.
        if defs.get_schema(node.op_type).min_input and not (node.input and node.output):
            raise ValueError(f"{what} reads or makes nothing")
        return
    try:
        schema = defs.get_schema(node.op_type, min(opset, defs.onnx_opset_version()))
    except defs.SchemaError:
        return  # newer than the file says; the runtime will tell
    single = defs.OpSchema.FormalParameterOption.Single
    given = len(node.input)
    empty = [
        each.name for each, value in zip(schema.inputs, node.input, strict=False) if each.option == single and not value
    ]
    if empty or not schema.min_input <= given <= schema.max_input:
        raise ValueError(f"{what} reads {given - len(empty)} values, which are not what ONNX's operator takes")
    if not schema.min_output <= len(node.output) <= schema.max_output or not node.output[0]:
        raise ValueError(f"{what} makes {len(node.output)} values")
    found = {attribute.name: attribute for attribute in node.attribute}
    for name, wanted in schema.attributes.items():
        if name not in found:
            if wanted.required:
                raise ValueError(f"{what} lacks the attribute '{name}'")
        elif found[name].type != int(wanted.type.value):
            raise ValueError(f"{what} has an attribute '{name}' of another type than ONNX's")
