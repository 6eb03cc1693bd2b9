"""Names of nodes: where they come from in the model, and nothing of the machine that they were traced on."""

from __future__ import annotations

from typing import Any

import pytest

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from exported import graph  # noqa: E402

from qdq_surgery.export.passes.name_nodes import name_nodes  # noqa: E402

TEXT = """
some (float[b,8] x) => (float[b,8] y) {
  a = Relu(x)
  b1 = Relu(a)
  c = Relu(b1)
  y = Erf(c)
}"""

SCOPES = "pkg.torch.onnx.name_scopes"


def named(*scopes: str | None, text: str = TEXT) -> list[Any]:
    model = graph(text)
    for node, scope in zip(model.graph, scopes, strict=False):
        if scope is not None:
            node.metadata_props[SCOPES] = scope
    name_nodes(model.graph)
    return list(model.graph)


def test_the_innermost_module_and_the_operator() -> None:
    first, *_ = named("['', 'bert.encoder.layer.0', 'bert.encoder.layer.0.output.dense', 'linear']")
    assert first.name == "bert.encoder.layer.0.output.dense/Relu"


def test_what_the_exporter_made_up_is_called_by_its_operator() -> None:
    nodes = named("['relu']", "nonsense[", None, "['', 'erf']")
    assert [node.name for node in nodes] == ["Relu", "Relu_2", "Relu_3", "Erf"]


def test_repeated_names_are_numbered() -> None:
    nodes = named(*["['', 'layer', 'relu']"] * 3)
    assert [node.name for node in nodes] == ["layer/Relu", "layer/Relu_2", "layer/Relu_3", "Erf"]


def test_names_are_unique() -> None:
    nodes = named("['', 'a', 'r']", "['', 'a', 'r']", "['', 'b', 'r']", "['', 'a', 'r']")
    assert len({node.name for node in nodes}) == 4


def test_pairs_keep_their_quantizers_name() -> None:
    text = """
    pair (float[b,8] x) => (float[b,8] y) {
      q = QuantizeLinear(x, s)
      d = DequantizeLinear(q, s)
      y = Relu(d)
    }"""
    model = graph(text, s=[0.1])
    names = ["l._input_quantizer/QuantizeLinear", "l._input_quantizer/DequantizeLinear"]
    for node, name in zip(model.graph, names, strict=False):
        node.name = name
        node.metadata_props[SCOPES] = "['', 'elsewhere', 'q']"
    name_nodes(model.graph)
    assert [node.name for node in model.graph] == [*names, "Relu"]


def test_nothing_of_the_machine_is_left() -> None:
    model = graph(TEXT)
    model.graph.metadata_props["where"] = "/home/me"
    model.graph.doc_string = "/home/me"
    for node in model.graph:
        node.metadata_props["pkg.torch.onnx.stack_trace"] = 'File "/home/me/modeling.py", line 1'
        node.doc_string = "/home/me"
        node.outputs[0].metadata_props["pkg"] = "/home/me"
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.metadata_props["pkg"] = "/home/me"
        value.doc_string = "/home/me"
    name_nodes(model.graph)
    assert b"/home/me" not in ir.to_proto(model).SerializeToString()
