"""What keeps ONNX Runtime from its slow fusions: the graph computes the same, and the fused nodes are not there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import T5Config, T5EncoderModel

ir = pytest.importorskip("onnx_ir")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from exported import compute, graph, operators  # noqa: E402

import qdq_surgery as qs  # noqa: E402
from qdq_surgery.export.passes.prevent_ort_fusions import plain_bias, plain_relu, plain_skip_norm  # noqa: E402
from qdq_surgery.hf.example_inputs import make_examples  # noqa: E402

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 3, 8)).astype(np.float32)
B = RANDOM.normal(size=8).astype(np.float32)
ONES, ZEROS = np.ones(8, np.float32), np.zeros(8, np.float32)

GELU = """
gelu (float[b,s,8] x) => (float[b,s,8] y) {
  m = MatMul(x, w)
  a = Add(m, c)
  y = Gelu(a)
}"""

NORM = """
norm (float[b,s,8] x) => (float[b,s,8] y) {
  m = MatMul(x, w)
  a = Add(m, x)
  n = LayerNormalization<axis = -1>(a, g, c)
  y = Relu(n)
}"""


def optimised(model: Any, folder: Path) -> list[str]:
    """Operators of what ONNX Runtime makes of a graph."""
    ir.save(model, folder / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(folder / "optimised.onnx").graph.node]


def square() -> NDArray[np.float32]:
    return np.random.default_rng(1).normal(size=(8, 8)).astype(np.float32)


def gelu(text: str = GELU, bias: NDArray[Any] = B) -> Any:
    return graph(text, w=square(), c=bias)


def norm(text: str = NORM) -> Any:
    return graph(text, w=square(), g=ONES, c=ZEROS)


def test_a_bias_before_a_gelu(tmp_path: Path) -> None:
    assert "BiasGelu" in optimised(gelu(), tmp_path)  # otherwise there is nothing to keep it from
    model = gelu()
    assert plain_bias(model.graph) == 1
    add = model.graph[1]
    assert add.inputs[1].const_value.shape == (1, 1, 8)
    assert np.array_equal(compute(model, x=X)[0], compute(gelu(), x=X)[0])
    assert "BiasGelu" not in optimised(model, tmp_path)


def test_the_bias_may_stand_first() -> None:
    model = gelu(GELU.replace("Add(m, c)", "Add(c, m)"))
    assert plain_bias(model.graph) == 1
    assert model.graph[1].inputs[0].const_value.shape == (1, 1, 8)


@pytest.mark.parametrize(
    ("text", "bias"),
    [
        (GELU.replace("MatMul(x, w)", "Add(x, w)"), B),
        (GELU, B.reshape(1, 8)),  # no bias to ONNX Runtime either
        (GELU.replace("c)", "x)"), B),
    ],
    ids=["no product", "two axes already", "no constant"],
)
def test_what_is_no_bias_behind_a_product(text: str, bias: NDArray[Any]) -> None:
    model = gelu(text, bias)
    before = operators(model.graph)
    assert plain_bias(model.graph) == 0
    assert operators(model.graph) == before


def test_one_bias_before_two_gelus() -> None:
    """A layer that runs twice: each node has a constant of its own."""
    text = GELU.replace("y = Gelu(a)", "g = Gelu(a)\n  m2 = MatMul(g, w)\n  a2 = Add(m2, c)\n  y = Gelu(a2)")
    model = gelu(text)
    assert plain_bias(model.graph) == 2
    assert np.array_equal(compute(model, x=X)[0], compute(gelu(text), x=X)[0])


def test_an_add_before_a_layer_norm(tmp_path: Path) -> None:
    assert "SkipLayerNormalization" in optimised(norm(), tmp_path)
    model = norm()
    assert plain_skip_norm(model.graph) == 1
    assert operators(model.graph) == ["MatMul", "Sum", "LayerNormalization", "Relu"]
    assert np.array_equal(compute(model, x=X)[0], compute(norm(), x=X)[0])
    assert "SkipLayerNormalization" not in optimised(model, tmp_path)


def test_what_the_sum_takes_over() -> None:
    model = norm()
    add = model.graph[1]
    add.metadata_props["pkg.torch.onnx.name_scopes"] = "['', 'layer', 'add']"
    shape, name = add.outputs[0].shape, add.outputs[0].name
    plain_skip_norm(model.graph)
    total = model.graph[1]
    assert total.metadata_props["pkg.torch.onnx.name_scopes"] == "['', 'layer', 'add']"
    assert (total.outputs[0].shape, total.outputs[0].name) == (shape, name)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("Add(m, x)", "Add(m, g)"),
        ("Add(m, x)", "Mul(m, x)"),
        ("n = LayerNormalization<axis = -1>(a, g, c)", "n = Relu(a)"),
    ],
    ids=["a bias", "no add", "no norm"],
)
def test_what_is_no_add_before_a_layer_norm(old: str, new: str) -> None:
    model = norm(NORM.replace(old, new))
    before = operators(model.graph)
    assert plain_skip_norm(model.graph) == 0
    assert operators(model.graph) == before


def test_an_add_that_is_also_an_output() -> None:
    """Of a model that gives its hidden states."""
    text = NORM.replace("(float[b,s,8] y)", "(float[b,s,8] y, float[b,s,8] a)")
    model = norm(text)
    assert plain_skip_norm(model.graph) == 1
    assert [value.name for value in model.graph.outputs] == ["y", "a"]
    assert all(np.array_equal(*each) for each in zip(compute(model, x=X), compute(norm(text), x=X), strict=True))


RELU = """
relu (float[b,s,8] x) => (float[b,s,8] y) {
  m = MatMul(x, w)
  r = Relu(m)
  y = Add(r, r)
}"""


def test_a_relu_behind_a_product_is_the_larger_of_it_and_zero() -> None:
    model = graph(RELU, w=square())
    before = compute(model, x=X)
    assert plain_relu(model.graph) == 1
    assert operators(model.graph) == ["MatMul", "Max", "Add"]
    assert np.array_equal(compute(model, x=X)[0], before[0])


@pytest.mark.parametrize("text", [NORM, RELU.replace("m = MatMul(x, w)", "m = Tanh(x)")], ids=["norm", "tanh"])
def test_a_relu_behind_anything_else_stays(text: str) -> None:
    model = norm(text) if text is NORM else graph(text)
    assert plain_relu(model.graph) == 0
    assert "Relu" in operators(model.graph)


@pytest.mark.slow
def test_products_without_a_bias_in_front_of_a_relu_run_in_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_heads": 4, "num_layers": 1, "vocab_size": 60}
    model = T5EncoderModel._from_config(T5Config(**sizes), attn_implementation="eager").eval()
    qmodel = qs.convert(model, "onnxruntime", inplace=True)
    batch = make_examples(qmodel, (2, 9))
    qs.calibrate(qmodel, [batch])
    file = qs.export_onnx(qmodel, tmp_path / "t5.onnx", target="onnxruntime", example_inputs=batch, dynamic=False)
    assert qs.receipt(file.path).linear == 1.0
