"""The certificate: a file that is right agrees, and a file that is spoilt is found out, at the site that is spoilt."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import qdq_surgery as qs

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from exported import exported, inputs_for, site_checks  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

RUNTIMES = ["onnxruntime"] + (["openvino"] if importlib.util.find_spec("openvino") else [])

#: A percent: less than any step is wide, so that only the largest values are a step off.
SLIGHTLY = 1.01


def _node(model: object, name: str) -> object:
    return next(node for node in model.graph if node.name == name)  # type: ignore[attr-defined]


def _change(model: object, node: object, at: int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Give the node a changed constant of its own."""
    array = node.inputs[at].const_value.numpy()  # type: ignore[attr-defined]
    value = ir.val(f"spoilt/{at}/{node.name}", const_value=ir.tensor(change(array.copy())))  # type: ignore[attr-defined]
    model.graph.register_initializer(value)  # type: ignore[attr-defined]
    node.replace_input_with(at, value)  # type: ignore[attr-defined]


def _channel(array: np.ndarray) -> np.ndarray:
    array[3] *= SLIGHTLY
    return array


def _one_integer(array: np.ndarray) -> np.ndarray:
    array[2, 5] = 90 if array[2, 5] < 0 else -90
    return array


ACTIVATION, WEIGHT = "output.dense._input_quantizer", "intermediate.dense._weight_quantizer"

SPOILT = {
    "scale of Q": (ACTIVATION, [("QuantizeLinear", 1, lambda array: array * np.float32(SLIGHTLY))]),
    "scale of DQ": (ACTIVATION, [("DequantizeLinear", 1, lambda array: array * np.float32(SLIGHTLY))]),
    "both scales": (
        ACTIVATION,
        [(kind, 1, lambda array: array * np.float32(SLIGHTLY)) for kind in ("QuantizeLinear", "DequantizeLinear")],
    ),
    "zero point of DQ": (ACTIVATION, [("DequantizeLinear", 2, lambda array: array + np.asarray(1, array.dtype))]),
    "scale of one channel": (WEIGHT, [("DequantizeLinear", 1, _channel)]),
    "one integer of a weight": (WEIGHT, [("DequantizeLinear", 0, _one_integer)]),
}


def _layer_site(model_type: str, ending: str, sites: list[str]) -> str:
    """The quantizer of the last layer that ends so, or the architecture's nearest to it."""
    endings = {
        "distilbert": {ACTIVATION: "ffn.lin2._input_quantizer", WEIGHT: "ffn.lin1._weight_quantizer"},
        "modernbert": {ACTIVATION: "mlp.Wo._input_quantizer", WEIGHT: "mlp.Wi._weight_quantizer"},
    }
    wanted = endings.get(model_type, {}).get(ending, ending)
    found = [name for name in sites if name.endswith(wanted) and ".attention." not in name]
    assert found, wanted
    return found[-1]


#: Every architecture's file is spoilt on one runtime, BERT's on all.
PLACES = [
    *(("bert", runtime) for runtime in RUNTIMES),
    *((model_type, "onnxruntime") for model_type in ("distilbert", "deberta-v2", "modernbert")),
]


@pytest.mark.parametrize("what", SPOILT)
@pytest.mark.parametrize(("model_type", "runtime"), PLACES)
def test_what_is_spoilt_is_found_and_named(model_type: str, what: str, runtime: str, tmp_path: Path) -> None:
    qmodel, export = exported(model_type, target=runtime)
    ending, changes = SPOILT[what]
    name = _layer_site(model_type, ending, [site.name for site in export.sites])
    model = ir.load(export.path)
    for kind, at, change in changes:
        _change(model, _node(model, f"{name}/{kind}"), at, change)
    path = tmp_path / "spoilt.onnx"
    ir.save(model, path)
    inputs = inputs_for(qmodel, (3, 17))
    assert site_checks(qmodel, export.path, inputs, runtime).agrees
    certificate = qs.certify(qmodel, path, inputs, (runtime,))
    check = next(check for check in certificate.checks if check.sites)
    assert not certificate.agrees
    assert check.first is not None
    assert check.first.quantizer == name
    assert [site.quantizer for site in check.sites if site.wrong] == [name], "what comes after is judged by itself"
    with pytest.raises(qs.ParityError, match=name.replace(".", r"\.")):
        certificate.require()


def test_the_words_and_the_json() -> None:
    qmodel, export = exported()
    certificate = qs.certify(qmodel, export.path, inputs_for(qmodel, (2, 9)))
    text = certificate.to_text(100)
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "onnxruntime, optimisations off" in text
    made = json.loads(json.dumps(certificate.to_json()))
    assert made["model"] == "BertModel"
    assert [len(check["sites"]) > 0 for check in made["checks"]] == [True, False]
    assert all(check["agrees"] for check in made["checks"])
    certificate.require()


def test_ties_are_no_fault() -> None:
    """Enough values that some lie half-way between two steps."""
    qmodel, export = exported("bert", hidden_size=192, intermediate_size=512, num_attention_heads=6)
    check = site_checks(qmodel, export.path, inputs_for(qmodel, (8, 39)), "onnxruntime")
    assert check.agrees, check.words()
    assert sum(site.elements for site in check.sites) > 1_000_000
    # They are rare: less than one value in ten thousand.
    assert sum(site.ties for site in check.sites) < 1e-4 * sum(site.elements for site in check.sites)


def test_a_file_of_another_model(tmp_path: Path) -> None:
    _, export = exported("bert")
    other, _ = exported("distilbert")
    with pytest.raises(qs.ExportError, match="is of another model"):
        qs.certify(other, export.path, inputs_for(other, (2, 9)))
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(qs.ExportError, match=r"text\.onnx is no ONNX file"):
        qs.certify(other, tmp_path / "text.onnx", {})
    with pytest.raises(qs.ExportError, match="there is no file"):
        qs.certify(other, tmp_path / "none.onnx", {})
