"""Which node of the graph that a runtime made runs which product of the file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from qdq_surgery.onnx_graph.products import Product

__all__ = ["claim"]

_Node = TypeVar("_Node")


def claim(
    gemms: Sequence[Product],
    nodes: Sequence[_Node],
    ranks: Sequence[Callable[[_Node, Product], bool]],
    shared: Callable[[_Node], bool] = lambda _: False,
) -> dict[str, _Node]:
    """The node that runs each product, by the product's name; those that cannot be told are left out.

    Args:
        ranks: Whether a node may be the one that runs a product; what is surest first.
        shared: Whether a node runs several products; others run one.
    """
    claimed: dict[str, _Node] = {}
    for rank in ranks:
        taken = {id(node) for node in claimed.values() if not shared(node)}
        found = {
            gemm.name: [node for node in nodes if id(node) not in taken and rank(node, gemm)]
            for gemm in gemms
            if gemm.name not in claimed
        }
        wanted = [id(node) for fitting in found.values() for node in fitting if not shared(node)]
        for name, fitting in found.items():
            # Two that fit are as bad as none.
            if len(fitting) == 1 and wanted.count(id(fitting[0])) <= 1:
                claimed[name] = fitting[0]
    return claimed
