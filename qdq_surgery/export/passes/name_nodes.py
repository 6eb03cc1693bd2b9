"""Names of nodes: the module's path and the operator, so that what a runtime says can be read."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Collection

import onnx_ir as ir

__all__ = ["name_nodes"]

_SCOPES = "pkg.torch.onnx.name_scopes"
_KEPT = ("QuantizeLinear", "DequantizeLinear")


def name_nodes(graph: ir.Graph, kept: Collection[str] = ()) -> None:
    """Name every node ``<module path>/<operator>``, numbered from the second; Q/DQ pairs have their quantizer's name.

    What the exporter noted on the nodes goes: paths of the machine it ran on, and lines of the model's code.

    Args:
        kept: Names that stay, beside those of Q/DQ pairs.
    """
    own = {str(node.name) for node in graph if node.name and (node.op_type in _KEPT or node.name in kept)}
    taken = Counter[str](own)
    for node in graph:
        if str(node.name) not in own:
            module = _module(node)
            base = f"{module}/{node.op_type}" if module else node.op_type
            taken[base] += 1
            node.name = base if taken[base] == 1 else f"{base}_{taken[base]}"
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    graph.metadata_props.clear()
    graph.doc_string = None


def _module(node: ir.Node) -> str:
    """The innermost module that the node was traced in; nothing where the exporter made it up."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (SyntaxError, ValueError):
        return ""
    # The last one is the operator.
    module = str(scopes[-2]) if isinstance(scopes, list) and len(scopes) > 1 else ""
    return "" if module.startswith("_empty_nn_module_stack") else module  # torch's word for none
