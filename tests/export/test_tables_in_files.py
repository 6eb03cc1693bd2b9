"""Tables of embeddings in files: int8 rows that are looked up, and dequantized then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from exported import calibrated, compute, graph, inputs_for  # noqa: E402

import qdq_surgery as qs  # noqa: E402
from qdq_surgery.errors import ExportError  # noqa: E402
from qdq_surgery.export.passes.lower_qdq import lower  # noqa: E402
from qdq_surgery.export.passes.widen_embedding_factor import widen_embedding_factors  # noqa: E402
from qdq_surgery.export.qparams import QParams  # noqa: E402
from qdq_surgery.numerics.grid import INT8  # noqa: E402
from qdq_surgery.onnx_file.opened import open_exported  # noqa: E402
from qdq_surgery.prove.parity import certify  # noqa: E402

TABLE = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
WORDS = "embeddings.word_embeddings._weight_quantizer"

#: Its second lookup is of one axis less.
TWICE = """
lookups (int64[b,t] ids, int64[t] row) => (float[b,t,4] y, float[t,4] z) {
  v = qdq_surgery.FakeQuant<quantizer = "e._weight_quantizer">(w)
  y = Gather(v, ids)
  z = Gather(v, row)
}"""
SCALED = """
scaled (int64[b,t] ids) => (float[b,t,4] y) {
  v = qdq_surgery.FakeQuant<quantizer = "e._weight_quantizer">(w)
  x = Gather(v, ids)
  y = Mul(x, number)
}"""


def of_table(axis: int | None) -> dict[str, QParams]:
    amax = np.abs(TABLE).max(axis=None if axis is None else 1).astype(np.float32)
    return {"e._weight_quantizer": QParams("e._weight_quantizer", "weight", amax, axis, INT8, False, table=True)}


def rounded(axis: int | None) -> Any:
    step = np.abs(TABLE).max(axis=None if axis is None else 1, keepdims=True) / 127
    return np.rint(TABLE / step) * step


@pytest.mark.parametrize("axis", [-2, None])
def test_a_lookup_is_one_of_integers(axis: int | None) -> None:
    model = graph(TWICE, w=TABLE)
    pairs = lower(model.graph, of_table(axis), "uint8", {})
    operators = [node.op_type for node in model.graph if node.op_type != "Identity"]  # (in front of outputs)
    assert operators == ["Gather", "Gather", "DequantizeLinear", "Mul"] * 2
    assert not model.graph.initializers["w"].uses()
    assert [pair.site.rows for pair in pairs] == ["e._weight_quantizer/rows", "e._weight_quantizer@2/rows"]
    ids = np.array([[0, 5, 5], [2, 1, 0]])
    found = compute(model, ids=ids, row=ids[1])
    for one, wanted in zip(found, (rounded(axis)[ids], rounded(axis)[ids[1]]), strict=True):
        np.testing.assert_allclose(one, wanted, rtol=0, atol=1e-6)  # of values of size 3, in float32


def test_one_table_is_stored_for_all_lookups() -> None:
    model = graph(TWICE, w=TABLE)
    lower(model.graph, of_table(-2), "int8", {})
    read = {node.inputs[0].name for node in model.graph if node.op_type == "Gather"}
    assert len(read) == 2  # integers, and scales


def test_another_reader_of_a_table_is_refused() -> None:
    model = graph(TWICE.replace("z = Gather(v, row)", "z = Identity(v)"), w=TABLE)
    with pytest.raises(ExportError, match=r"e\._weight_quantizer is of a table that a Identity reads"):
        lower(model.graph, of_table(-2), "int8", {})


@pytest.mark.parametrize("axis", [-2, None])
def test_a_number_behind_a_lookup_becomes_a_vector(axis: int | None) -> None:
    model = graph(SCALED, w=TABLE, number=np.float32(3.0))
    lower(model.graph, of_table(axis), "int8", {})
    ids = np.array([[0, 5], [2, 1]])
    before = compute(model, ids=ids)
    assert widen_embedding_factors(model.graph) == 1
    assert [value.const_value.numpy().tolist() for name, value in model.graph.initializers.items() if "/4" in name] == [
        [3.0] * 4
    ]
    np.testing.assert_array_equal(compute(model, ids=ids), before)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A model for OpenVINO, whose certificate asks both runtimes."""
    pytest.importorskip("openvino")
    qmodel = calibrated(rules="openvino", vocab_size=1100, num_hidden_layers=1)
    path, inputs = tmp_path_factory.mktemp("written") / "model.onnx", inputs_for(qmodel, (2, 8))
    made = qs.export_onnx(qmodel, path, inputs, target="openvino")
    return {"model": qmodel, "path": path, "inputs": inputs, "export": made}


def test_every_runtime_is_held_against_the_rows(written: dict[str, Any]) -> None:
    checks = [check for check in written["export"].parity.checks if check.sites]
    assert [check.runtime.partition(",")[0] for check in checks] == ["onnxruntime", "openvino"]
    for check in checks:
        [site] = [each for each in check.sites if each.quantizer == WORDS]
        assert (site.elements, site.wrong) == (2 * 8 * 32, 0)  # the rows that were looked up


def test_the_float_table_is_not_in_the_file(written: dict[str, Any]) -> None:
    tensors = onnx.load(written["path"]).graph.initializer
    table = {(each.name, each.data_type) for each in tensors if 1100 in each.dims}
    assert table == {(f"{WORDS}/weight", onnx.TensorProto.INT8), (f"{WORDS}/scales", onnx.TensorProto.FLOAT)}


def test_linter_and_receipt_know_the_form(written: dict[str, Any]) -> None:
    for target in ("openvino", "onnxruntime"):
        [finding] = qs.lint(written["path"], target).of(WORDS)
        assert (finding.verdict, finding.fusion) == ("enables", "int8 rows")
        assert not [left for left in qs.receipt(written["path"], target).leftover if WORDS in left.quantizers]


@pytest.mark.parametrize("part", ["weight", "scales"])
def test_a_wrong_row_is_named(written: dict[str, Any], part: str, tmp_path: Path) -> None:
    model = onnx.load(written["path"])
    [tensor] = [each for each in model.graph.initializer if each.name == f"{WORDS}/{part}"]
    values = np.array(onnx.numpy_helper.to_array(tensor))
    values[3:60] = values[3:60] * 2 if part == "scales" else np.roll(values[3:60], 1, axis=1)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    found = certify(written["model"], tmp_path / "wrong.onnx", written["inputs"], ("onnxruntime",))
    assert found.checks[0].first is not None
    assert found.checks[0].first.quantizer == WORDS


def test_a_served_file_gives_what_the_model_gives(written: dict[str, Any]) -> None:
    with torch.no_grad():
        wanted = written["model"](**written["inputs"]).last_hidden_state
    for runtime in ("onnxruntime", "openvino"):
        found = qs.load_onnx(written["path"], runtime=runtime, precision=None)(**written["inputs"]).last_hidden_state
        # Ties may go the other way: a hundredth of values of size 3.
        assert float((found - wanted).abs().max()) < 0.05


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rows", 3, "has .*3.* as 'rows'"),
        ("rows", "embeddings/Add", r"as a Mul, and it is 'Add'"),
        ("value", "other", "it makes something else"),
    ],
)
def test_a_list_of_sites_that_is_of_another_graph_is_refused(
    written: dict[str, Any], field: str, value: Any, message: str, tmp_path: Path
) -> None:
    model = onnx.load(written["path"])
    [entry] = [each for each in model.metadata_props if each.key == "qdq_surgery.sites"]
    sites = json.loads(entry.value)
    next(each for each in sites if each["quantizers"] == [WORDS])[field] = value
    entry.value = json.dumps(sites)
    onnx.save(model, tmp_path / "changed.onnx")
    with pytest.raises(ExportError, match=message):
        assert open_exported(tmp_path / "changed.onnx").sites


def test_what_has_no_form_is_refused(tmp_path: Path) -> None:
    qmodel = calibrated(rules="openvino", vocab_size=1100, num_hidden_layers=1)
    for name, each in qs.quantizers(qmodel).items():
        if name != WORDS:
            each.disable()
    with pytest.raises(ExportError, match=f"{WORDS} is of an embedding's table, and tensorrt takes tables in float"):
        qs.export_onnx(qmodel, tmp_path / "model.onnx", target="tensorrt")
    quantizer = qs.quantizers(qmodel)[WORDS]
    quantizer.reset_amax()
    quantizer._axis = (1,)
    quantizer.set_range(torch.ones(1, 32))
    with pytest.raises(ExportError, match="a range for each column of an embedding's table"):
        qs.export_onnx(qmodel, tmp_path / "model.onnx", target="openvino")
