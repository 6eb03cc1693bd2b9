"""The factor of the attention scores moves into the queries: on attention of a few nodes, with and without the fold."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from exported import compute, graph, operators  # noqa: E402

from qdq_surgery.export.passes.fold_score_scale import fold_score_factors  # noqa: E402
from qdq_surgery.export.passes.lower_qdq import lower  # noqa: E402
from qdq_surgery.export.qparams import QParams  # noqa: E402
from qdq_surgery.numerics.grid import INT8  # noqa: E402
from qdq_surgery.onnx_graph.qdq_pairs import Pair  # noqa: E402

#: Two heads; what is behind the scores reads them once.
ATTENTION = """
attention (float[b,s,WIDTH] x) => (float[b,2,s,t] y) {
  xq = qdq_surgery.FakeQuant<quantizer = "query._input_quantizer">(x)
  wq = qdq_surgery.FakeQuant<quantizer = "query._weight_quantizer">(w1)
  wqt = Transpose<perm = [1, 0]>(wq)
  q0 = MatMul(xq, wqt)
  q1 = Add(q0, b1)
  q2 = Reshape(q1, split)
  q3 = Transpose<perm = [0, 2, 1, 3]>(q2)
  q = qdq_surgery.FakeQuant<quantizer = "matmul_q_input_quantizer">(q3)
  k2 = Reshape(x, split)
  k3 = Transpose<perm = [0, 2, 3, 1]>(k2)
  k = qdq_surgery.FakeQuant<quantizer = "matmul_k_input_quantizer">(k3)
  s0 = MatMul(q, k)
  scores = Mul(s0, a)
  y = Softmax(scores)
}"""

RANDOM = np.random.default_rng(0)


def constants(size: int, factor: float) -> dict[str, NDArray[Any]]:
    width = 2 * size
    return {
        "w1": RANDOM.normal(size=(width, width)).astype(np.float32) / np.float32(np.sqrt(width)),
        "b1": RANDOM.normal(size=width).astype(np.float32),
        "split": np.asarray([0, 0, 2, size]),
        "a": np.asarray(factor, np.float32),
    }


QPARAMS = {
    name: QParams(name, role, amax, 0 if amax is None else None, INT8, False)
    for name, role, amax in (
        ("query._input_quantizer", "input", np.asarray(2.0, np.float32)),
        ("query._weight_quantizer", "weight", None),
        ("matmul_q_input_quantizer", "input", np.asarray(3.0, np.float32)),
        ("matmul_k_input_quantizer", "input", np.asarray(2.5, np.float32)),
    )
}
QUERY, WEIGHT = "matmul_q_input_quantizer", "query._weight_quantizer"


def made(
    text: str = ATTENTION, size: int = 16, factor: float = 0.25, kind: str = "int8"
) -> tuple[ir.Model, list[Pair]]:
    model = graph(text.replace("WIDTH", str(2 * size)), **constants(size, factor))
    return model, lower(model.graph, QPARAMS, kind, {})


def outputs(text: str, size: int, factor: float, kind: str = "int8") -> tuple[Any, Any, int, dict[str, Pair]]:
    """The graph's output before and after, how many were folded, and the pairs."""
    global RANDOM
    x = np.random.default_rng(1).normal(size=(2, 5, 2 * size)).astype(np.float32)
    found, folded, pairs = [], 0, {}
    for fold in (False, True):
        RANDOM = np.random.default_rng(0)
        model, lowered = made(text, size, factor, kind)
        if fold:
            folded = fold_score_factors(model.graph, lowered)
            pairs = {pair.site.name: pair for pair in lowered}
        found.append(compute(model, x=x)[0])
    return found[0], found[1], folded, pairs


@pytest.mark.parametrize("kind", ["int8", "uint8"])
@pytest.mark.parametrize("operator", ["Mul", "Div"])
def test_a_power_of_two_changes_no_bit(operator: str, kind: str) -> None:
    factor = 0.25 if operator == "Mul" else 4.0
    before, after, folded, pairs = outputs(ATTENTION.replace("Mul(s0", f"{operator}(s0"), 16, factor, kind)
    assert folded == 1
    assert np.array_equal(before, after)
    assert {name: pair.site.factor for name, pair in pairs.items()} == {
        "query._input_quantizer": 1.0,
        "query._weight_quantizer": 0.25,
        "matmul_q_input_quantizer": 0.25,
        "matmul_k_input_quantizer": 1.0,
    }


@pytest.mark.parametrize("size", [4, 8, 12, 20])
def test_another_head_size_changes_roundings_only(size: int) -> None:
    before, after, folded, _ = outputs(ATTENTION, size, size**-0.5)
    assert folded == 1
    # Probabilities of 5 keys. Where a query lies half-way between two steps it may go either way; here none does.
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-6)


def test_the_factor_may_stand_first() -> None:
    before, after, folded, _ = outputs(ATTENTION.replace("Mul(s0, a)", "Mul(a, s0)"), 16, 0.25)
    assert folded == 1
    assert np.array_equal(before, after)


def test_what_the_graph_is_afterwards() -> None:
    model, pairs = made()
    before = operators(model.graph)
    scales = {pair.site.name: pair.dequantize.inputs[1].const_value.numpy() for pair in pairs}
    integers = pairs[1].dequantize.inputs[0].const_value.numpy().copy()
    bias = model.graph.initializers["b1"].const_value.numpy().copy()
    assert fold_score_factors(model.graph, pairs) == 1
    assert operators(model.graph) == [operator for operator in before if operator != "Mul"]
    for pair in pairs:
        factor = 0.25 if pair.site.name in (QUERY, WEIGHT) else 1.0
        assert np.array_equal(pair.dequantize.inputs[1].const_value.numpy(), scales[pair.site.name] * factor)
        if pair.quantize is not None:  # both of a pair have one scale
            assert pair.quantize.inputs[1] is pair.dequantize.inputs[1]
    assert np.array_equal(pairs[1].dequantize.inputs[0].const_value.numpy(), integers)
    add = next(node for node in model.graph if node.op_type == "Add")
    assert np.array_equal(add.inputs[1].const_value.numpy(), bias * 0.25)


def test_a_linear_without_a_bias() -> None:
    text = ATTENTION.replace("q1 = Add(q0, b1)", "").replace("Reshape(q1", "Reshape(q0")
    before, after, folded, pairs = outputs(text, 16, 0.25)
    assert folded == 1
    assert pairs[WEIGHT].site.factor == 0.25
    assert np.array_equal(before, after)


NOT_INTO_THE_LINEAR = {
    "its output is read elsewhere": ("q2 = Reshape(q1, split)", "q2 = Reshape(q1, split)\n  z = Relu(q1)"),
    "something else stands between": ("q3 = Transpose<perm = [0, 2, 1, 3]>(q2)",
                                      "q9 = Relu(q2)\n  q3 = Transpose<perm = [0, 2, 1, 3]>(q9)"),
    "its product is read elsewhere": ("q1 = Add(q0, b1)", "q1 = Add(q0, b1)\n  z = Relu(q0)"),
    "its weight is read elsewhere": ("q0 = MatMul(xq, wqt)", "q0 = MatMul(xq, wqt)\n  z = MatMul(x, wqt)"),
    "the bias is no constant": ("q1 = Add(q0, b1)", "q1 = Add(q0, x)"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_INTO_THE_LINEAR)
def test_where_the_linear_cannot_take_it_a_multiplication_does(case: str) -> None:
    old, new = NOT_INTO_THE_LINEAR[case]
    text = ATTENTION.replace(old, new)
    assert text != ATTENTION
    if "z = " in new:
        text = text.replace("y = Softmax(scores)", "y0 = Softmax(scores)\n  z0 = ReduceSum(z)\n  y = Add(y0, z0)")
    before, after, folded, pairs = outputs(text, 16, 0.25)
    assert folded == 1
    assert np.array_equal(before, after)
    assert pairs[QUERY].site.factor == 0.25
    assert pairs[WEIGHT].site.factor == 1.0
    assert pairs[QUERY].quantize is not None
    moved = pairs[QUERY].quantize.inputs[0].producer()
    assert (moved.op_type, moved.name) == ("Mul", "matmul_q_input_quantizer/Mul")


NOT_AT_ALL = {
    "the scores are read twice": ("y = Softmax(scores)", "z = Relu(s0)\n  y0 = Softmax(scores)\n  y = Add(y0, z)"),
    "the queries are read twice": ("y = Softmax(scores)",
                                   "z = ReduceSum(q)\n  y0 = Softmax(scores)\n  y = Add(y0, z)"),
    "there is no factor": ("scores = Mul(s0, a)", "scores = Identity(s0)"),
    "it is added": ("scores = Mul(s0, a)", "scores = Add(s0, a)"),
    "it is divided by the scores": ("scores = Mul(s0, a)", "scores = Div(a, s0)"),
    "it is no constant": ("scores = Mul(s0, a)", "r = ReduceMean(x)\n  scores = Mul(s0, r)"),
    "the scores are squared": ("scores = Mul(s0, a)", "scores = Mul(s0, s0)"),
    "the queries are in float": ('q = qdq_surgery.FakeQuant<quantizer = "matmul_q_input_quantizer">(q3)',
                                 "q = Identity(q3)"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_AT_ALL)
def test_where_it_stays(case: str) -> None:
    text = ATTENTION.replace(*NOT_AT_ALL[case])
    assert text != ATTENTION
    before, after, folded, pairs = outputs(text, 16, 0.25)
    assert folded == 0
    assert np.array_equal(before, after)
    assert all(pair.site.factor == 1.0 for pair in pairs.values())


@pytest.mark.parametrize("factor", [0.0, -0.5, np.inf, np.nan])
def test_a_factor_that_no_scale_can_take(factor: float) -> None:
    model, pairs = made(factor=factor)
    assert fold_score_factors(model.graph, pairs) == 0


def test_a_factor_of_several_numbers() -> None:
    model, pairs = made()
    values = np.asarray([[[0.25]], [[0.5]]], np.float32)
    model.graph.initializers["a"].const_value = ir.tensor(values)
    assert fold_score_factors(model.graph, pairs) == 0


def test_scores_that_are_an_output() -> None:
    text = ATTENTION.replace("y = Softmax(scores)", "").replace("scores = Mul(s0, a)", "y = Mul(s0, a)")
    before, after, folded, _ = outputs(text, 16, 0.25)
    assert folded == 0
    assert np.array_equal(before, after)


TWICE = """
twice (float[b,s,32] x) => (float[b,2,s,t] y, float[b,2,s,u] z) {
  wq = qdq_surgery.FakeQuant<quantizer = "query._weight_quantizer">(w1)
  wqt = Transpose<perm = [1, 0]>(wq)
  q0 = MatMul(x, wqt)
  q1 = Add(q0, b1)
  q2 = Reshape(q1, split)
  q = qdq_surgery.FakeQuant<quantizer = "matmul_q_input_quantizer">(q2)
  k2 = Reshape(x, split)
  k3 = Transpose<perm = [0, 1, 3, 2]>(k2)
  k = qdq_surgery.FakeQuant<quantizer = "matmul_k_input_quantizer">(k3)
  s0 = MatMul(q, k)
  y = Mul(s0, a)
  y1 = Relu(y)
  wq_ = qdq_surgery.FakeQuant<quantizer = "query._weight_quantizer">(w1)
  wqt_ = Transpose<perm = [1, 0]>(wq_)
  h = Relu(x)
  q0_ = MatMul(h, wqt_)
  q1_ = Add(q0_, b1)
  q2_ = Reshape(q1_, split)
  q_ = qdq_surgery.FakeQuant<quantizer = "matmul_q_input_quantizer">(q2_)
  k2_ = Reshape(h, split)
  k3_ = Transpose<perm = [0, 1, 3, 2]>(k2_)
  k_ = qdq_surgery.FakeQuant<quantizer = "matmul_k_input_quantizer">(k3_)
  s0_ = MatMul(q_, k_)
  z = Mul(s0_, a)
}""".replace("y = Mul(s0, a)\n  y1 = Relu(y)", "y1 = Mul(s0, a)\n  y = Relu(y1)").replace(
    "z = Mul(s0_, a)", "z1 = Mul(s0_, a)\n  z = Relu(z1)"
)


def test_a_layer_that_runs_twice_is_scaled_once() -> None:
    """ALBERT's: both runs read one bias and one scale."""
    before, after, folded, pairs = outputs(TWICE, 16, 0.25)
    assert folded == 2
    assert np.array_equal(before, after)
    assert pairs[WEIGHT].site.factor == 0.25
