"""One reader of a graph: what is stored, what is a move, what a product is for. The linter and the receipt share it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

from graphs import Graph  # noqa: E402

from qdq_surgery.onnx_file.metadata import Site, dump_sites  # noqa: E402
from qdq_surgery.onnx_file.opened import OnnxFile  # noqa: E402
from qdq_surgery.onnx_graph.graph import OnnxGraph  # noqa: E402
from qdq_surgery.onnx_graph.products import layers_of  # noqa: E402
from qdq_surgery.onnx_graph.qdq_pairs import stored  # noqa: E402


def read(graph: Graph, *sites: Site, **options: Any) -> OnnxGraph:
    model = ir.from_proto(graph.model())
    model.metadata_props["qdq_surgery.sites"] = dump_sites(sites)
    return OnnxGraph(OnnxFile(model), **options)


ROWS = np.array([0, 1])

STORED: dict[str, tuple[Callable[[Graph], str], bool]] = {
    "stored floats": (lambda g: g.op("Identity", g.ones(4, 8)), True),
    "a constant node": (lambda g: g.op("Constant", value=onnx.numpy_helper.from_array(np.ones((4, 8)))), True),
    "integers": (lambda g: g.weight(), True),
    "integers that are turned": (lambda g: g.weight(turned=True), True),
    "rounded floats": (lambda g: g.pair(g.ones(4, 8), "p"), True),
    "a slice": (lambda g: g.op("Slice", g.ones(4, 8), g.const([0]), g.const([2])), True),
    "chosen rows": (lambda g: g.op("Gather", g.ones(4, 8), g.const(ROWS)), True),
    "put together": (lambda g: g.op("Concat", g.ones(4, 8), g.ones(4, 8), axis=0), True),
    "rows that an input chooses": (lambda g: g.op("Gather", g.ones(4, 8), g.input("ids", ("b",), True)), False),
    "put together with an input": (lambda g: g.op("Concat", g.ones(4, 8), g.input("y", (4, 8)), axis=0), False),
    "computed": (lambda g: g.op("Add", g.ones(4, 8), g.ones(4, 8)), False),
    "an input": (lambda g: g.op("Transpose", g.input("y", (4, 8)), perm=[1, 0]), False),
}


@pytest.mark.parametrize("case", STORED)
def test_what_is_stored(case: str) -> None:
    make, expected = STORED[case]
    graph = Graph()
    graph.end(make(graph))
    (last,) = (node for node in read(graph).graph if node.op_type == "Erf")
    assert stored(last.inputs[0]) is expected


def test_many_ways_to_one_value_take_no_time() -> None:
    graph = Graph()
    value = graph.ones(1, 1)
    for _ in range(64):
        value = graph.op("Concat", value, value, axis=0)
    graph.nodes.append(onnx.helper.make_node("Erf", [value], ["y"], name="end"))
    model = onnx.helper.make_model(onnx.helper.make_graph(graph.nodes, "g", [], [], graph.constants))
    (last,) = (node for node in ir.from_proto(model).graph if node.op_type == "Erf")
    assert stored(last.inputs[0])


def encoder() -> Graph:
    """Embeddings, a layer with a linear and an attention, and a head."""
    g = Graph()
    x = g.op("MatMul", g.input(), g.ones(8, 8), name="embeddings.projection/MatMul")
    linear = "encoder.layer.0.dense"
    x = g.op("MatMul", g.pair(x, f"{linear}.q"), g.weight(f"{linear}.w"), name=f"{linear}/MatMul")
    turned = g.op("Transpose", x, perm=[0, 2, 1])
    scores = g.op("MatMul", x, turned, name="encoder.layer.0.attention/MatMul")
    x = g.op("Einsum", scores, x, equation="bij,bjk->bik", name="encoder.layer.0.attention/Einsum")
    x = g.op("MatMul", x, g.ones(8, 8), name="encoder.layer.1.dense/MatMul")
    fixed = g.op("MatMul", g.op("Add", g.ones(8, 8), g.ones(8, 8)), g.ones(8, 8), name="positions/MatMul")
    g.end(g.op("MatMul", x, fixed, name="head/MatMul"))
    return g


def test_what_products_are_for() -> None:
    found = {product.name: (product.kind, product.constant) for product in read(encoder(), *SITES).products}
    assert found == {
        "embeddings.projection/MatMul": ("other", False),
        "encoder.layer.0.dense/MatMul": ("linear", False),
        "encoder.layer.0.attention/MatMul": ("attention", False),
        "encoder.layer.0.attention/Einsum": ("attention", False),
        "encoder.layer.1.dense/MatMul": ("linear", False),
        "positions/MatMul": ("other", True),
        "head/MatMul": ("attention", False),
    }


SITES = (
    Site(
        ["encoder.layer.0.dense._input_quantizer"],
        "input",
        "encoder.layer.0.dense.q/QuantizeLinear",
        "encoder.layer.0.dense.q",
        "encoder.layer.0.dense.q/out",
    ),
    Site(
        ["encoder.layer.1.dense._weight_quantizer"], "weight", None, "encoder.layer.1.dense.w", "encoder.layer.1.gone"
    ),
)


def test_pairs_that_are_listed_and_pairs_that_are_there() -> None:
    graph = read(encoder(), *SITES)
    assert [pair.names for pair in graph.pairs] == [(SITES[0].name,), ("encoder.layer.0.dense.w",)]
    assert [pair.constant for pair in graph.pairs] == [False, True]
    product = next(product for product in graph.products if product.pairs)
    assert product.sites == tuple(pair.site for pair in graph.pairs)
    assert product.sites[0] == SITES[0]
    assert graph.lost("encoder.layer.1.dense") == [SITES[1].name]
    assert graph.lost("encoder.layer.0.dense") == []


def test_the_operator_of_a_whole_attention_is_no_matmul() -> None:
    g = Graph(opset=23)
    q, k, v = (g.input(name, ("b", 2, 4, 8)) for name in "qkv")
    g.end(g.op("MatMul", g.op("Attention", q, k, v, name="whole"), g.ones(8, 8), name="out"))
    graph = read(g)
    assert [product.name for product in graph.products] == ["whole", "out"]
    assert [len(product.operands) for product in graph.products] == [3, 2]
    assert [product.name for product in graph.matmuls] == ["out"]


def test_runtimes_differ_in_what_they_move_a_pair_through() -> None:
    g = Graph()
    taken = g.op("Gather", g.pair(g.input(), "x"), g.const(ROWS), axis=1)
    half = g.op("Mul", g.op("Reshape", taken, g.const([0, 0, 8])), g.const(np.float32(0.5)))
    g.end(g.op("MatMul", half, g.weight(), name="product"))
    ways: list[dict[str, Any]] = [
        {},
        {"moves": ("Reshape", "Gather"), "factors": ("Mul",)},
        {"moves": ("Reshape",), "factors": ("Mul",)},
        {"moves": ("Reshape", "Gather")},
    ]
    found = [read(g, **way).products[0].operands[0] for way in ways]
    assert [operand.pair is not None for operand in found] == [False, True, False, False]
    assert [node.op_type for node in found[1].moves] == ["Gather", "Reshape", "Mul"]
    way = [node.op_type for node in read(g).upstream(found[0].value)]
    assert way == ["Mul", "Reshape", "Gather", "DequantizeLinear", "QuantizeLinear"]


@pytest.mark.parametrize(
    ("path", "layers"),
    [("encoder.layer.0.dense", "encoder.layer"), ("encoder.layer.12", "encoder.layer"), ("pooler.dense", None)],
)
def test_layers_that_a_module_is_in(path: str, layers: str | None) -> None:
    assert layers_of(path) == layers


def test_aliases_end_where_a_result_is_read_twice() -> None:
    found = {product.name: product.aliases for product in read(encoder()).products}
    assert found["head/MatMul"] >= {"head/MatMul", "head/MatMul/out"}
    assert found["encoder.layer.0.dense/MatMul"] == {"encoder.layer.0.dense/MatMul", "encoder.layer.0.dense/MatMul/out"}
    # The next one is a product of its own.
    assert found["encoder.layer.1.dense/MatMul"] == {"encoder.layer.1.dense/MatMul", "encoder.layer.1.dense/MatMul/out"}


def test_sites_come_from_the_metadata_or_from_whoever_knows_them() -> None:
    file = OnnxFile(ir.from_proto(encoder().model()), sites=SITES)
    assert file.sites == SITES
    file.model.metadata_props["qdq_surgery.sites"] = json.dumps([])
    assert OnnxFile(file.model).sites == ()
