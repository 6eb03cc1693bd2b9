"""Tagged nodes become Q/DQ pairs and stored integers: on graphs of a few nodes, written by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from exported import compute, graph, operators  # noqa: E402

from qdq_surgery.errors import ExportError  # noqa: E402
from qdq_surgery.export.passes.lower_qdq import lower, typed_scale  # noqa: E402
from qdq_surgery.export.qparams import QParams  # noqa: E402
from qdq_surgery.numerics.grid import INT8, Grid  # noqa: E402
from qdq_surgery.onnx_graph.qdq_pairs import Pair  # noqa: E402
from qdq_surgery.quantize.export_node import FAKE_QUANT_DOMAIN  # noqa: E402

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(5, 4)).astype(np.float32)
W = RANDOM.normal(size=(3, 4)).astype(np.float32)  # (out, in)
B = RANDOM.normal(size=3).astype(np.float32)

LINEAR = """
linear (float[b,4] x) => (float[b,3] y) {
  a = qdq_surgery.FakeQuant<quantizer = "l._input_quantizer">(x)
  v = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(w)
  t = Transpose<perm = [1, 0]>(v)
  y = MatMul(a, t)
}"""


def activation(name: str, amax: Any = 2.0, axis: int | None = None, unsigned: bool = False) -> QParams:
    return QParams(name, "input", np.asarray(amax, np.float32), axis, Grid(unsigned=unsigned), False)


def weight(name: str = "l._weight_quantizer", axis: int | None = 0, amax: Any = None) -> QParams:
    return QParams(name, "weight", None if amax is None else np.asarray(amax, np.float32), axis, INT8, False)


def lowered(model: ir.Model, *qparams: QParams, activations: str = "int8", **weights: Any) -> list[Pair]:
    return lower(model.graph, {each.name: each for each in qparams}, activations, weights)


def rounded(values: NDArray[Any], qparams: QParams) -> NDArray[Any]:
    """The values on the grid, in float64."""
    grid = qparams.grid
    amax = np.asarray(qparams.amax_of(values.astype(np.float32)), np.float64)
    if qparams.axis is not None:
        amax = amax.reshape([-1 if at == qparams.axis % values.ndim else 1 for at in range(values.ndim)])
    step = amax / grid.qmax
    return np.clip(np.rint(values / step), grid.qmin, grid.qmax) * step


#: Float32 arithmetic of four terms of size 1.
CLOSE = {"rtol": 1e-5, "atol": 1e-6}

A = activation("l._input_quantizer")


def test_a_linear() -> None:
    model = graph(LINEAR, w=W)
    pairs = lowered(model, A, weight())
    assert sorted(operators(model.graph)) == ["DequantizeLinear", "DequantizeLinear", "MatMul", "QuantizeLinear"]
    assert FAKE_QUANT_DOMAIN not in model.graph.opset_imports
    product = next(node for node in model.graph if node.op_type == "MatMul")
    first, second = (value.producer() for value in product.inputs)
    assert first.name == "l._input_quantizer/DequantizeLinear"
    assert first.inputs[0].producer().name == "l._input_quantizer/QuantizeLinear"
    # The weight's integers stand the way round in which MatMul takes them, with nothing in between.
    assert second.name == "l._weight_quantizer/DequantizeLinear"
    stored = second.inputs[0].const_value.numpy()
    assert stored.dtype == np.int8
    assert stored.shape == (4, 3)
    assert second.attributes.get_int("axis") == 1
    assert second.inputs[1].const_value.shape == second.inputs[2].const_value.shape == (3,)
    assert np.array_equal(stored.T, weight().integers(W))
    assert [value.name for value in (first.outputs[0], second.outputs[0])] == [
        "l._input_quantizer/value",
        "l._weight_quantizer/value",
    ]
    assert [(pair.site.quantizers, pair.site.role, pair.site.transposed, pair.site.factor) for pair in pairs] == [
        (["l._input_quantizer"], "input", False, 1.0),
        (["l._weight_quantizer"], "weight", True, 1.0),
    ]
    assert pairs[1].site.quantize is None
    (found,) = compute(model, x=X)
    np.testing.assert_allclose(found, rounded(X, A) @ rounded(W, weight()).T, **CLOSE)


@pytest.mark.parametrize(("kind", "zero", "dtype"), [("int8", 0, np.int8), ("uint8", 128, np.uint8)])
def test_zero_points_are_explicit(kind: str, zero: int, dtype: type) -> None:
    model = graph(LINEAR, w=W)
    pairs = lowered(model, A, weight(), activations=kind)
    for node in (pairs[0].quantize, pairs[0].dequantize):
        assert node is not None
        constant = node.inputs[2].const_value.numpy()
        assert constant.dtype == dtype
        assert constant == zero
        assert constant.shape == ()
    stored = pairs[1].dequantize.inputs[2].const_value.numpy()
    assert stored.dtype == np.int8
    assert not stored.any()


def test_signed_and_unsigned_integers_are_the_same_grid() -> None:
    wide = X * 4  # beyond the range on both sides
    outputs = []
    for kind in ("int8", "uint8"):
        model = graph(LINEAR, w=W)
        lowered(model, A, weight(), activations=kind)
        outputs.append(compute(model, x=wide)[0])
    assert np.array_equal(*outputs)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_an_unsigned_grid_has_zero_at_the_end(kind: str) -> None:
    model = graph(LINEAR, w=W)
    grid = activation("l._input_quantizer", unsigned=True)
    pairs = lowered(model, grid, weight(), activations=kind)
    zero = pairs[0].dequantize.inputs[2].const_value.numpy()
    assert zero.dtype == np.uint8
    assert zero == 0
    (found,) = compute(model, x=np.abs(X))
    np.testing.assert_allclose(found, rounded(np.abs(X), grid) @ rounded(W, weight()).T, **CLOSE)


THREE = """
three (float[b,4] x) => (float[b,4] y, float[b,4] z, float[b,4] u) {
  a = qdq_surgery.FakeQuant<quantizer = "query">(x)
  b1 = qdq_surgery.FakeQuant<quantizer = "key">(x)
  c = qdq_surgery.FakeQuant<quantizer = "value">(x)
  y = Relu(a)
  z = Relu(b1)
  u = Relu(c)
}"""


def test_those_that_read_one_tensor_with_one_range_are_one_pair() -> None:
    model = graph(THREE)
    pairs = lowered(model, activation("query"), activation("key"), activation("value", 1.0))
    assert operators(model.graph).count("QuantizeLinear") == 2
    assert [pair.site.quantizers for pair in pairs] == [["query", "key"], ["value"]]
    assert pairs[0].site.name == "query"
    first, second, third = compute(model, x=X)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, third)


@pytest.mark.parametrize(
    "other",
    [activation("key", 2.0 + 1e-6), activation("key", unsigned=True), activation("key", [2.0] * 4, axis=-1)],
    ids=["range", "sign", "axis"],
)
def test_those_with_another_grid_are_another_pair(other: QParams) -> None:
    model = graph(THREE)
    pairs = lowered(model, activation("query"), other, activation("value"))
    assert [pair.site.quantizers for pair in pairs] == [["query", "value"], ["key"]]


def test_a_layer_that_runs_twice() -> None:
    model = graph(
        """twice (float[b,4] x) => (float[b,3] y, float[b,3] z) {
          a = qdq_surgery.FakeQuant<quantizer = "l._input_quantizer">(x)
          v = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(w)
          t = Transpose<perm = [1, 0]>(v)
          y = MatMul(a, t)
          x2 = Relu(x)
          a2 = qdq_surgery.FakeQuant<quantizer = "l._input_quantizer">(x2)
          v2 = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(w)
          t2 = Transpose<perm = [1, 0]>(v2)
          z = MatMul(a2, t2)
        }""",
        w=W,
    )
    pairs = lowered(model, A, weight())
    assert [pair.site.quantizers for pair in pairs] == [
        ["l._input_quantizer"],
        ["l._weight_quantizer"],
        ["l._input_quantizer"],
        ["l._weight_quantizer"],
    ]
    assert [pair.dequantize.name for pair in pairs] == [
        "l._input_quantizer/DequantizeLinear",
        "l._weight_quantizer/DequantizeLinear",
        "l._input_quantizer@2/DequantizeLinear",
        "l._weight_quantizer@2/DequantizeLinear",
    ]
    # One copy of the integers.
    assert pairs[1].dequantize.inputs[0] is pairs[3].dequantize.inputs[0]
    first, second = compute(model, x=X)
    turned = rounded(W, weight()).T
    np.testing.assert_allclose(first, rounded(X, A) @ turned, **CLOSE)
    np.testing.assert_allclose(second, rounded(np.maximum(X, 0), A) @ turned, **CLOSE)


def test_one_weight_under_two_quantizers() -> None:
    model = graph(
        """tied (float[b,4] x) => (float[b,3] y, float[b,3] z) {
          v = qdq_surgery.FakeQuant<quantizer = "one._weight_quantizer">(w)
          t = Transpose<perm = [1, 0]>(v)
          y = MatMul(x, t)
          v2 = qdq_surgery.FakeQuant<quantizer = "two._weight_quantizer">(w)
          t2 = Transpose<perm = [1, 0]>(v2)
          z = MatMul(x, t2)
        }""",
        w=W,
    )
    grids = weight("one._weight_quantizer"), weight("two._weight_quantizer", None)
    pairs = lowered(model, *grids)
    assert [pair.site.quantizers for pair in pairs] == [["one._weight_quantizer"], ["two._weight_quantizer"]]
    first, second = compute(model, x=X)
    np.testing.assert_allclose(first, X @ rounded(W, grids[0]).T, **CLOSE)
    np.testing.assert_allclose(second, X @ rounded(W, grids[1]).T, **CLOSE)


def test_a_weight_that_is_also_looked_up() -> None:
    """The embedding that a language model's head is tied to: the rows that are looked up stay float."""
    model = graph(
        """tied (float[b,4] x, int64[n] ids) => (float[b,3] y, float[n,4] rows) {
          v = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(w)
          t = Transpose<perm = [1, 0]>(v)
          y = MatMul(x, t)
          rows = Gather(w, ids)
        }""",
        w=W,
    )
    lowered(model, weight())
    found, rows = compute(model, x=X, ids=np.array([2, 0]))
    np.testing.assert_allclose(found, X @ rounded(W, weight()).T, **CLOSE)
    assert np.array_equal(rows, W[[2, 0]])


@pytest.mark.parametrize("bias", [True, False])
def test_gemm_becomes_matmul_and_add(bias: bool) -> None:
    """What torch makes of a linear on two axes, a pooler's or a classifier's."""
    model = graph(
        f"""gemm (float[b,4] x) => (float[b,3] y) {{
          a = qdq_surgery.FakeQuant<quantizer = "l._input_quantizer">(x)
          v = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(w)
          y = Gemm<transB = 1>(a, v{", c" if bias else ""})
        }}""",
        w=W,
        **({"c": B} if bias else {}),
    )
    pairs = lowered(model, A, weight())
    assert "Gemm" not in operators(model.graph)
    assert [node.op_type for node in model.graph][-2:] == (
        ["MatMul", "Add"] if bias else ["DequantizeLinear", "MatMul"]
    )
    assert pairs[1].site.transposed
    assert [value.name for value in model.graph.outputs] == ["y"]
    (found,) = compute(model, x=X)
    np.testing.assert_allclose(found, rounded(X, A) @ rounded(W, weight()).T + (B if bias else 0), **CLOSE)


@pytest.mark.parametrize("attributes", ["alpha = 0.5, transB = 1", "beta = 2.0, transB = 1", "transA = 1, transB = 1"])
def test_a_gemm_that_is_no_linear_stays(attributes: str) -> None:
    square = RANDOM.normal(size=(4, 4)).astype(np.float32)
    model = graph(
        f"""gemm (float[4,4] x) => (float[4,4] y) {{
          v = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(w)
          y = Gemm<{attributes}>(x, v, c)
        }}""",
        w=square,
        c=np.ones(4, np.float32),
    )
    (pair,) = lowered(model, weight())
    assert operators(model.graph) == ["DequantizeLinear", "Gemm"]
    assert not pair.site.transposed
    assert pair.dequantize.attributes.get_int("axis") == 0
    x = RANDOM.normal(size=(4, 4)).astype(np.float32)
    (found,) = compute(model, x=x)
    alpha, beta = 0.5 if "alpha" in attributes else 1.0, 2.0 if "beta" in attributes else 1.0
    left = x.T if "transA" in attributes else x
    np.testing.assert_allclose(found, alpha * left @ rounded(square, weight()).T + beta, **CLOSE)


def test_a_gemm_without_a_transpose() -> None:
    model = graph(
        """gemm (float[b,4] x) => (float[b,3] y) {
          v = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(w)
          y = Gemm(x, v, c)
        }""",
        w=W.T.copy(),
        c=B,
    )
    grid = weight(axis=-1)
    (pair,) = lowered(model, grid)
    assert not pair.site.transposed
    assert pair.dequantize.attributes.get_int("axis") == 1
    (found,) = compute(model, x=X)
    np.testing.assert_allclose(found, X @ rounded(W.T, grid) + B, **CLOSE)


def test_a_weight_that_is_read_both_ways_round() -> None:
    model = graph(
        """both (float[b,4] x) => (float[b,3] y, float[3,4] z) {
          v = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(w)
          t = Transpose<perm = [1, 0]>(v)
          y = MatMul(x, t)
          z = Relu(v)
        }""",
        w=W,
    )
    (pair,) = lowered(model, weight())
    assert not pair.site.transposed
    assert pair.dequantize.attributes.get_int("axis") == 0
    assert "Transpose" in operators(model.graph)
    found, positive = compute(model, x=X)
    np.testing.assert_allclose(found, X @ rounded(W, weight()).T, **CLOSE)
    np.testing.assert_allclose(positive, np.maximum(rounded(W, weight()), 0), **CLOSE)


def test_a_weight_with_two_transposes() -> None:
    """A layer that runs twice and whose weight the exporter turns twice."""
    model = graph(
        """both (float[b,4] x) => (float[b,3] y, float[b,3] z) {
          v = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(w)
          t = Transpose<perm = [1, 0]>(v)
          y = MatMul(x, t)
          t2 = Transpose<perm = [1, 0]>(v)
          z = MatMul(x, t2)
        }""",
        w=W,
    )
    (pair,) = lowered(model, weight())
    assert pair.site.transposed
    assert operators(model.graph) == ["DequantizeLinear", "MatMul", "MatMul"]
    assert np.array_equal(*compute(model, x=X))


def test_a_convolution() -> None:
    kernel = RANDOM.normal(size=(3, 4, 1)).astype(np.float32)
    model = graph(
        """conv (float[b,4,7] x) => (float[b,3,7] y) {
          v = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(w)
          y = Conv(x, v)
        }""",
        w=kernel,
    )
    grid = weight(axis=-3, amax=[1.0, 2.0, 3.0])
    (pair,) = lowered(model, grid)
    assert not pair.site.transposed
    assert pair.dequantize.attributes.get_int("axis") == 0
    x = RANDOM.normal(size=(2, 4, 7)).astype(np.float32)
    (found,) = compute(model, x=x)
    np.testing.assert_allclose(found, np.einsum("oi,bin->bon", rounded(kernel, grid)[..., 0], x), **CLOSE)


def test_activations_with_a_range_for_each_channel() -> None:
    model = graph(LINEAR, w=W)
    grid = activation("l._input_quantizer", [0.5, 1.0, 1.5, 2.0], axis=-1)
    pairs = lowered(model, grid, weight())
    assert pairs[0].quantize is not None
    assert pairs[0].quantize.attributes.get_int("axis") == pairs[0].dequantize.attributes.get_int("axis") == 1
    assert pairs[0].dequantize.inputs[2].const_value.shape == (4,)
    (found,) = compute(model, x=X)
    np.testing.assert_allclose(found, rounded(X, grid) @ rounded(W, weight()).T, **CLOSE)


@pytest.mark.parametrize("taken_back", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_a_table_that_is_read_as_an_activation_is_divided_as_one(taken_back: bool, transposed: bool) -> None:
    """DeBERTa's positions: a constant in the place of an activation, with a scale for each channel."""
    turn = "t = Transpose<perm = [1, 0]>(a)" if transposed else "t = Identity(a)"
    model = graph(
        f"""table (float[b,{3 if transposed else 4}] x) => (float[b,{4 if transposed else 3}] y) {{
          a = qdq_surgery.FakeQuant<quantizer = "l._input_quantizer">(w)
          {turn}
          y = MatMul(x, {"a" if transposed else "u"})
          {"z = Neg(t)" if transposed else "u = Transpose<perm = [1, 0]>(t)"}
        }}""",
        w=W,
    )
    channels = np.array([1.0, 2.0, 4.0, 8.0], np.float32)
    grid = replace(activation("l._input_quantizer"), channels=channels, taken_back=taken_back)
    [pair] = lowered(model, grid)
    assert pair.site.scaled
    wanted = rounded(W / channels, activation("l._input_quantizer")) * (1.0 if taken_back else channels)
    x = X[:, :3] if transposed else X
    (found,) = compute(model, x=x)
    np.testing.assert_allclose(found, x @ (wanted if transposed else wanted.T), **CLOSE)


def test_channels_that_are_all_zero() -> None:
    dead = W.copy()
    dead[1] = 0
    model = graph(LINEAR, w=dead)
    lowered(model, A, weight())
    (found,) = compute(model, x=X)
    assert not found[:, 1].any()
    np.testing.assert_allclose(found, rounded(X, A) @ np.delete(rounded(W, weight()), 1, 0).T[:, [0, 0, 1]] * [1, 0, 1],
                               **CLOSE)  # fmt: skip


def test_weights_are_rounded_from_their_float32_values() -> None:
    wide = RANDOM.normal(size=(100, 4)).astype(np.float32)
    model = graph(LINEAR.replace("float[", "float16[").replace(",3]", ",100]"), w=wide.astype(np.float16))
    pairs = lowered(model, A, weight(), w=wide)
    stored = pairs[1].dequantize.inputs[0].const_value.numpy()
    assert np.array_equal(stored.T, weight().integers(wide))
    assert not np.array_equal(stored.T, weight().integers(wide.astype(np.float16).astype(np.float32)))
    for pair in pairs:
        assert pair.dequantize.inputs[1].dtype == pair.dequantize.outputs[0].dtype == ir.DataType.FLOAT16


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_scales_stay_above_zero(kind: type) -> None:
    made = typed_scale(np.asarray([1e-38, 1e-10, 0.5], np.float32), kind)
    assert made.dtype == kind
    assert (made > 0).all()
    assert made[2] == kind(0.5)


def test_a_weight_that_is_computed() -> None:
    text = """
    computed (float[b,4] x) => (float[b,3] y) {
      t = Transpose<perm = [1, 0]>(w)
      v = qdq_surgery.FakeQuant<quantizer = "l._weight_quantizer">(t)
      y = MatMul(x, v)
    }"""
    with pytest.raises(ExportError, match=r"^l\._weight_quantizer quantizes a weight that is computed in the graph"):
        lowered(graph(text, w=W), weight())
    model, grid = graph(text, w=W), weight(axis=-1, amax=[1.0, 2.0, 3.0])
    (pair,) = lowered(model, grid)
    assert pair.quantize is not None
    np.testing.assert_allclose(compute(model, x=X)[0], X @ rounded(W.T, grid), **CLOSE)


def test_a_quantizer_on_an_output() -> None:
    model = graph(
        """out (float[b,4] x) => (float[b,4] y, float[b,4] z) {
          y = qdq_surgery.FakeQuant<quantizer = "q">(x)
          z = qdq_surgery.FakeQuant<quantizer = "r">(x)
        }"""
    )
    (pair,) = lowered(model, activation("q"), activation("r"))
    assert pair.site.quantizers == ["q", "r"]
    assert pair.site.value == pair.dequantize.outputs[0].name == "q/value"
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    found = compute(model, x=X)
    np.testing.assert_allclose(found[0], rounded(X, activation("q")), **CLOSE)
    assert np.array_equal(*found)
