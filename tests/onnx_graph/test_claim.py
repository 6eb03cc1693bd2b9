"""Which node runs which product: what is surest first, and two that fit are as bad as none."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

ir = pytest.importorskip("onnx_ir")

from qdq_surgery.onnx_graph.claim import claim  # noqa: E402
from qdq_surgery.onnx_graph.products import Product  # noqa: E402


@dataclass(frozen=True)
class Node:
    """A node with a name; ``*`` runs whatever is asked."""

    name: str


def gemm(name: str) -> Product:
    """A product of that name."""
    return Product(ir.Node("", "MatMul", [], name=name), (), "linear", False)


def same(node: Node, product: Product) -> bool:
    """The surest rank."""
    return node.name == product.name


def begins(node: Node, product: Product) -> bool:
    """The next one."""
    return node.name.startswith(product.name) or node.name == "*"


@pytest.mark.parametrize(
    ("products", "nodes", "claimed"),
    [
        (["a", "b"], ["a", "b"], {"a": "a", "b": "b"}),
        (["a"], ["a", "ab"], {"a": "a"}),  # the surest rank comes first
        (["a"], ["ab"], {"a": "ab"}),
        (["a"], ["ab", "ac"], {}),  # two nodes for a product
        (["a", "ab"], ["abc"], {}),  # two products for a node
        (["a", "ab"], ["a", "abc"], {"a": "a", "ab": "abc"}),  # unless one has another
        (["a", "b"], ["*"], {"a": "*", "b": "*"}),  # a node that runs several
        (["a"], [], {}),
    ],
)
def test_claims(products: list[str], nodes: list[str], claimed: dict[str, str]) -> None:
    found = claim([*map(gemm, products)], [*map(Node, nodes)], (same, begins), shared=lambda node: node.name == "*")
    assert {name: node.name for name, node in found.items()} == claimed
