"""The certificate: it agrees where only ties differ, and finds what was put into a file that does not belong there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import WIDTHS, build
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.onnx_file.metadata import Site, dump_sites, load_sites
from qdq_surgery.onnx_file.opened import open_exported
from qdq_surgery.prove import parity
from qdq_surgery.prove.parity import Check, Parity, SiteCheck, certify
from qdq_surgery.serve.intermediates import Runtime, probe, runtimes

ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")

from exported import calibrated, exported, inputs_for, site_checks  # noqa: E402

#: Model types, and a site in the middle of each, by the ends of its activation's and its weight's names.
MODELS = {
    "bert": ("layer.0.attention.self.matmul_k_input_quantizer", "layer.0.intermediate.dense"),
    "deberta-v2": ("layer.0.attention.self.matmul_position_input_quantizer", "layer.0.output.dense"),
    "modernbert": ("layers.1.attn.matmul_a_input_quantizer", "layers.1.mlp.Wi"),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "bert": {"num_hidden_layers": 1},
    "deberta-v2": WIDTHS["deberta-v2"],
    "modernbert": WIDTHS["modernbert"],
}


def model_of(model_type: str) -> tuple[PreTrainedModel, Path]:
    qmodel, file = exported(model_type, **OPTIONS[model_type])
    return qmodel, file.path


def site_of(path: Path, ending: str) -> Site:
    return next(site for site in open_exported(path).sites if any(name.endswith(ending) for name in site.quantizers))


# --- what does not belong there -----------------------------------------------------------------------------------


def changed(node: Any, at: int, change: Callable[[Any], Any]) -> None:
    """Give a node a constant of its own."""
    array = change(node.inputs[at].const_value.numpy().copy())
    value = ir.val(f"{node.name}/changed/{at}", const_value=ir.tensor(array))
    node.graph.register_initializer(value)
    node.replace_input_with(at, value)


def larger(array: Any) -> Any:
    return (array * 1.02).astype(array.dtype)


def quantize_scale(quantize: Any, _dequantize: Any) -> None:
    changed(quantize, 1, larger)


def dequantize_scale(_quantize: Any, dequantize: Any) -> None:
    changed(dequantize, 1, larger)


def slightly(_quantize: Any, dequantize: Any) -> None:
    changed(dequantize, 1, lambda array: (array * 1.0005).astype(array.dtype))


def both_scales(quantize: Any, dequantize: Any) -> None:
    changed(quantize, 1, larger)
    changed(dequantize, 1, larger)


def zero_point(quantize: Any, _dequantize: Any) -> None:
    changed(quantize, 2, lambda array: (array + 1).astype(array.dtype))


def one_channel(_quantize: Any, dequantize: Any) -> None:
    def change(array: Any) -> Any:
        array[3] *= np.asarray(1.02, array.dtype)
        return array

    changed(dequantize, 1, change)


def one_integer(_quantize: Any, dequantize: Any) -> None:
    def change(array: Any) -> Any:
        array[5, 3] += 1 if array[5, 3] < 100 else -1
        return array

    changed(dequantize, 0, change)


def other_zero_point(_quantize: Any, dequantize: Any) -> None:
    changed(dequantize, 2, lambda array: (array + 1).astype(array.dtype))


def weight_zero_point(_quantize: Any, dequantize: Any) -> None:
    def change(array: Any) -> Any:
        array[0] = 1
        return array

    changed(dequantize, 2, change)


ACTIVATION = [quantize_scale, dequantize_scale, slightly, both_scales, zero_point, other_zero_point]
WEIGHT = [one_channel, one_integer, weight_zero_point]


def corrupted(path: Path, site: Site, change: Callable[[Any, Any], None], folder: Path) -> Path:
    model = ir.load(path)
    nodes = {node.name: node for node in model.graph}
    change(nodes[site.quantize] if site.quantize is not None else None, nodes[site.dequantize])
    ir.save(model, folder / "corrupted.onnx")
    return folder / "corrupted.onnx"


#: Every change to one model's file; to the others', whose sites lie elsewhere, one to each kind of site.
SPOILT = [
    *(("bert", change) for change in (*ACTIVATION, *WEIGHT)),
    ("deberta-v2", quantize_scale),
    ("deberta-v2", one_integer),
    ("modernbert", other_zero_point),
    ("modernbert", one_channel),
]


@pytest.mark.parametrize(("model_type", "change"), SPOILT)
def test_it_names_the_site(model_type: str, change: Callable[[Any, Any], None], tmp_path: Path) -> None:
    qmodel, path = model_of(model_type)
    activation, weight = MODELS[model_type]
    site = site_of(path, activation if change in ACTIVATION else f"{weight}._weight_quantizer")
    inputs = inputs_for(qmodel, (3, 17))
    certificate = certify(qmodel, corrupted(path, site, change, tmp_path), inputs)
    check = next(check for check in certificate.checks if check.sites)
    assert not check.agrees
    assert check.first is not None
    assert check.first.quantizer == site.name
    # That one alone: the others are given what the runtime has.
    assert {each.quantizer for each in check.sites if each.wrong} == set(site.quantizers)
    if change in (one_channel, one_integer):
        channels = 1 if change is one_integer else inputs_weight(qmodel, site).shape[1]
        assert check.first.wrong <= channels
        assert check.first.worst == pytest.approx(1.0 if change is one_integer else 127 * 0.02, rel=0.2)
    with pytest.raises(qs.ParityError) as caught:
        certificate.require()
    assert str(caught.value).startswith(
        f"{type(qmodel).__name__} on onnxruntime, optimisations off is not the PyTorch model: diverges first at "
        f"{site.name}: {check.first.wrong} of {check.first.elements} values differ, by up to "
    )


def inputs_weight(qmodel: PreTrainedModel, site: Site) -> Any:
    return qmodel.get_submodule(site.name.rpartition(".")[0]).weight


@pytest.mark.parametrize("change", [dequantize_scale, both_scales, one_channel, one_integer])
def test_it_names_the_site_on_openvino(change: Callable[[Any, Any], None], tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    qmodel, path = model_of("bert")
    site = site_of(path, MODELS["bert"][0] if change in ACTIVATION else f"{MODELS['bert'][1]}._weight_quantizer")
    check = site_checks(qmodel, corrupted(path, site, change, tmp_path), inputs_for(qmodel, (3, 17)), "openvino")
    assert check.runtime == "openvino, site by site"
    assert check.first is not None
    assert check.first.quantizer == site.name
    assert not check.agrees


def test_a_pair_of_several_quantizers_is_named_by_its_first(tmp_path: Path) -> None:
    qmodel, path = model_of("bert")
    site = site_of(path, "layer.0.attention.self.value._input_quantizer")
    assert len(site.quantizers) == 3
    check = site_checks(
        qmodel, corrupted(path, site, both_scales, tmp_path), inputs_for(qmodel, (3, 17)), "onnxruntime"
    )
    assert [each.quantizer for each in check.sites if each.wrong] == site.quantizers


def test_the_second_run_of_a_layer(tmp_path: Path) -> None:
    """ALBERT's: the pair of the second run is held against the second call."""
    qmodel, file = exported("albert", **WIDTHS["albert"])
    first, second = (site for site in file.sites if site.name.endswith("attention.matmul_k_input_quantizer"))
    for site, wrong in ((first, 0), (second, 1)):
        check = site_checks(
            qmodel, corrupted(file.path, site, both_scales, tmp_path), inputs_for(qmodel, (3, 17)), "onnxruntime"
        )
        calls = [each for each in check.sites if each.quantizer == site.name]
        assert len(calls) == 2
        assert [bool(each.wrong) for each in calls] == [at == wrong for at in range(2)]
        assert {each.quantizer for each in check.sites if each.wrong} == {site.name}


def test_a_folded_scale(tmp_path: Path) -> None:
    """The queries' pair has another scale than PyTorch's, and is held against it all the same."""
    qmodel, path = model_of("bert")
    site = site_of(path, "layer.0.attention.self.matmul_q_input_quantizer")
    assert site.factor == pytest.approx(8**-0.5)
    inputs = inputs_for(qmodel, (3, 17))
    assert site_checks(qmodel, path, inputs, "onnxruntime").agrees
    check = site_checks(qmodel, corrupted(path, site, slightly, tmp_path), inputs, "onnxruntime")
    assert {each.quantizer for each in check.sites if each.wrong} == {site.name}


def bias(model: Any) -> None:
    """Of a LayerNorm, which no quantizer is between."""
    node = next(node for node in reversed(list(model.graph)) if node.op_type == "LayerNormalization")
    changed(node, 2, lambda array: array + np.float32(0.01))


def test_what_lies_behind_the_last_site(tmp_path: Path) -> None:
    qmodel, path = model_of("bert")
    model = ir.load(path)
    bias(model)
    ir.save(model, tmp_path / "model.onnx")
    check = site_checks(qmodel, tmp_path / "model.onnx", inputs_for(qmodel, (3, 17)), "onnxruntime")
    assert check.first is None
    assert not check.agrees
    assert min(check.outputs.values()) > 1e-3
    assert check.words().startswith("every site agrees, and the output 'pooler_output' differs by ")


def test_a_model_whose_weights_went_on() -> None:
    """Trained after the export: the file is of before."""
    qmodel, path = model_of("bert")
    later = calibrated("bert", rules="onnxruntime", num_hidden_layers=1)
    with torch.no_grad():
        later.encoder.layer[0].attention.output.dense.weight[2, 3] += 0.5
    check = site_checks(later, path, inputs_for(qmodel, (3, 17)), "onnxruntime")
    assert check.first is not None
    assert check.first.quantizer == "encoder.layer.0.attention.output.dense._weight_quantizer"


# --- ties ---------------------------------------------------------------------------------------------------------


#: Many values, of sums of many products: some lie half-way.
MANY = (6, 64)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Path]:
    options = {"hidden_size": 256, "intermediate_size": 1024, "max_position_embeddings": 80}
    qmodel = calibrated(rules="onnxruntime", num_hidden_layers=1, **options)
    path = tmp_path_factory.mktemp("wide") / "model.onnx"
    return qmodel, qs.export_onnx(qmodel, path, inputs_for(qmodel, MANY), dynamic=False, parity=False).path


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_ties_are_no_differences(runtime: str, wide: tuple[PreTrainedModel, Path]) -> None:
    pytest.importorskip(runtime)
    qmodel, path = wide
    certificate = certify(qmodel, path, inputs_for(qmodel, MANY), (runtime,))
    assert certificate.agrees, certificate.to_text()
    (check,) = (check for check in certificate.checks if check.sites)
    ties, elements = (sum(getattr(site, name) for site in check.sites) for name in ("ties", "elements"))
    assert 0 < ties < 1e-4 * elements
    assert max(site.worst for site in check.sites) == pytest.approx(1.0, abs=1e-3)
    assert max(check.outputs.values()) < parity._OUTPUT[torch.float32]


def test_half_a_step_off_is_no_tie(wide: tuple[PreTrainedModel, Path], tmp_path: Path) -> None:
    """All values moved by less than a step: most are not half-way."""
    qmodel, path = wide
    site = site_of(path, "layer.0.output.dense._input_quantizer")
    check = site_checks(
        qmodel, corrupted(path, site, quantize_scale, tmp_path), inputs_for(qmodel, MANY), "onnxruntime"
    )
    assert check.first is not None
    assert check.first.quantizer == site.name
    assert check.first.wrong > check.first.ties


# --- what it says -------------------------------------------------------------------------------------------------


def site_check(name: str, wrong: int = 0, ties: int = 0) -> SiteCheck:
    return SiteCheck(name, 1_234_567, ties, wrong, 3.5 if wrong else float(ties > 0))


OFF = "onnxruntime, optimisations off"
FINE = (site_check("a.b"), site_check("a.c", ties=7))
GOOD = Check(OFF, "1.2.3", FINE, {"logits": 1e-7}, None, None, True)
WRONG = (site_check("a.b"), site_check("encoder.layer.0.attention.self.c", 5), site_check("a.d", 6))
BAD = Check(OFF, "1.2.3", WRONG, {"logits": 0.1}, None, None, False)
FUSED = Check("onnxruntime", "1.2.3", (), {"logits": 0.25}, 0.75, 1.25, False)
BEHIND = Check(
    "openvino, site by site", "1.2.3", (site_check("a.b"),), {"logits": 0.5, "other": 0.1}, None, None, False
)


def test_words() -> None:
    assert GOOD.words() == "agrees"
    assert GOOD.first is None
    assert BAD.words() == (
        "diverges first at encoder.layer.0.attention.self.c: 5 of 1234567 values differ, by up to 3.5 steps"
    )
    assert FUSED.words() == (
        "differs from PyTorch by 75% of what quantization changes, and from the float model by 1.25 x what PyTorch does"
    )
    assert BEHIND.words() == "every site agrees, and the output 'logits' differs by 5.0e-01 of its magnitude"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_text_fits(width: int) -> None:
    certificate = Parity("BertModel", (GOOD, BAD, FUSED, BEHIND), ("TensorRT, which needs an engine",))
    text = certificate.to_text(width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "parity of BertModel with PyTorch" in text
    assert "not checked: TensorRT, which needs an engine" in " ".join(text.split())
    assert "1.25 x" in text


def test_it_agrees_if_all_do() -> None:
    assert Parity("BertModel", (GOOD,)).agrees
    Parity("BertModel", (GOOD,)).require()
    certificate = Parity("BertModel", (GOOD, BEHIND))
    assert not certificate.agrees
    with pytest.raises(qs.ExportError, match=r"^BertModel on openvino, site by site is not the PyTorch model: every "):
        certificate.require()


def test_json_there_and_back() -> None:
    _, file = exported("bert", num_hidden_layers=1)
    assert file.parity is not None
    found = json.loads(json.dumps(file.parity.to_json()))
    assert found["model"] == "BertModel"
    checks = tuple(
        Check(**{**entry, "sites": tuple(SiteCheck(**site) for site in entry["sites"])}) for entry in found["checks"]
    )
    assert Parity(found["model"], checks, tuple(found["left_out"])) == file.parity
    assert {check.runtime for check in checks} == {"onnxruntime, optimisations off", "onnxruntime"}
    assert len(checks[0].sites) == 16  # the recipe's 20 without the residual adds


# --- sites and files ----------------------------------------------------------------------------------------------


def test_sites_there_and_back() -> None:
    sites = [
        Site(["a", "b"], "input", "a/QuantizeLinear", "a/DequantizeLinear", "a/value", 0.125),
        Site(["w"], "weight", None, "w/DequantizeLinear", "w/value", transposed=True),
    ]
    assert load_sites(dump_sites(sites)) == sites
    assert sites[0].name == "a"


def test_files_of_others(tmp_path: Path) -> None:
    with pytest.raises(qs.ExportError, match=r"^there is no file "):
        open_exported(tmp_path / "nowhere.onnx")
    (tmp_path / "text.onnx").write_text("this is no graph")
    with pytest.raises(qs.ExportError, match=r"text\.onnx is no ONNX file that can be opened: "):
        open_exported(tmp_path / "text.onnx")
    _, path = model_of("bert")
    model = ir.load(path)
    model.metadata_props.clear()
    ir.save(model, tmp_path / "plain.onnx")
    with pytest.raises(qs.ExportError, match=r"plain\.onnx was not written by qdq_surgery\.export_onnx"):
        open_exported(tmp_path / "plain.onnx")


def test_a_file_of_another_model() -> None:
    _, path = model_of("bert")
    other = calibrated("distilbert")
    with pytest.raises(qs.ExportError, match="is of another model: this DistilBertModel has no quantizer encoder"):
        certify(other, path, inputs_for(other, (2, 9)))


@pytest.mark.parametrize(
    ("head", "options", "words"),
    [
        ("BertModel", {"intermediate_size": 32}, r"has \d+ values at .*dense._weight_quantizer, and this model \d+"),
        ("BertModel", {"num_attention_heads": 2}, r"has \d+ values at .*matmul_a_input_quantizer, and this model \d+"),
        ("BertForPreTraining", {}, r"has no quantizer encoder"),
    ],
    ids=["width", "heads", "head"],
)
def test_a_file_of_a_model_with_other_sizes(head: str, options: dict[str, Any], words: str) -> None:
    _, path = model_of("bert")
    other = calibrated("bert", head, "onnxruntime", **{**OPTIONS["bert"], **options})
    with pytest.raises(qs.ExportError, match=f"is of another model: .*{words}"):
        certify(other, path, inputs_for(other, (2, 9)))


def test_outputs_of_another_shape_are_another_models() -> None:
    """Subtracted, they might be spread over each other."""
    wanted, found = {"logits": np.zeros((2, 3), np.float32)}, {"logits": np.zeros((2, 1), np.float32)}
    with pytest.raises(qs.ExportError, match=r"it gives logits of the shape \(2, 1\), and this model \(2, 3\)"):
        parity._differences(wanted, found)
    with pytest.raises(qs.ExportError, match="it gives logits of the shape none"):
        parity._differences(wanted, {})


def test_a_float_model_is_told_that_it_is_not_converted() -> None:
    qmodel, path = model_of("bert")
    with pytest.raises(qs.ModelError, match="is not converted"):
        certify(build("bert", "BertModel"), path, inputs_for(qmodel, (2, 9)))


def test_an_input_that_is_missing() -> None:
    qmodel, path = model_of("bert")
    inputs = inputs_for(qmodel, (2, 9))
    del inputs["token_type_ids"]
    with pytest.raises(
        qs.ExportError, match=r"takes token_type_ids, which the inputs lack \(input_ids, attention_mask\)"
    ):
        certify(qmodel, path, inputs)


def test_stored_weights() -> None:
    qmodel, path = model_of("bert")
    found = open_exported(path).weights
    weights = [site for site in open_exported(path).sites if site.role == "weight"]
    assert set(found) == {site.value for site in weights}
    for site in weights:
        linear = qmodel.get_submodule(site.name.removesuffix("._weight_quantizer"))
        with torch.no_grad():
            wanted = (linear.quantized_weight() * (1 if linear.channel_scale is None else linear.channel_scale)).numpy()
        np.testing.assert_allclose(found[site.value].T / site.factor, wanted, rtol=3e-7, atol=0)


# --- runtimes -----------------------------------------------------------------------------------------------------


def arrays(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.numpy() for name, value in inputs.items()}


def test_modes() -> None:
    assert [mode.words for mode in runtimes("onnxruntime")] == ["onnxruntime, optimisations off", "onnxruntime"]
    assert [mode.words for mode in runtimes("openvino")] == ["openvino"]


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_values_inside(name: str) -> None:
    pytest.importorskip(name)
    qmodel, path = model_of("bert")
    values = [site.value for site in open_exported(path).sites if site.role != "weight"]
    for mode in runtimes(name):
        found = probe(open_exported(path), arrays(inputs_for(qmodel, (3, 17))), values, mode)
        assert set(found) == {*values, "last_hidden_state", "pooler_output"}
        assert mode.version.count(".") >= 1
    before = path.read_bytes()
    assert path.read_bytes() == before


def test_a_file_that_a_runtime_cannot_run(tmp_path: Path) -> None:
    qmodel, path = model_of("bert")
    model = ir.load(path)
    next(iter(model.graph)).domain = "somewhere.else"
    ir.save(model, tmp_path / "model.onnx")
    for name in ("onnxruntime", "openvino"):
        pytest.importorskip(name)
        with pytest.raises(qs.ExportError, match=rf"^{name}.* cannot run model\.onnx: .*somewhere\.else"):
            probe(open_exported(tmp_path / "model.onnx"), arrays(inputs_for(qmodel, (2, 9))), (), Runtime(name, True))


def test_the_model_stays_as_it_is() -> None:
    qmodel, path = model_of("bert")
    inputs = inputs_for(qmodel, (3, 17))
    with torch.no_grad():
        wanted = qmodel(**inputs).last_hidden_state
    flags = {name: each.enabled for name, each in qs.quantizers(qmodel).items()}
    certify(qmodel, path, inputs)
    with torch.no_grad():
        assert torch.equal(qmodel(**inputs).last_hidden_state, wanted)
    assert flags == {name: each.enabled for name, each in qs.quantizers(qmodel).items()}
    assert not any(each._forward_hooks for each in qs.quantizers(qmodel).values())


def test_hooks_go_with_an_error() -> None:
    qmodel, path = model_of("bert")
    inputs = inputs_for(qmodel, (3, 17))
    values = open_exported(path).sites
    with pytest.raises(RuntimeError, match="in the middle"), parity._Forced(qmodel, values, {}):
        raise RuntimeError("in the middle")
    assert not any(each._forward_hooks for each in qs.quantizers(qmodel).values())
    with torch.no_grad():
        qmodel(**inputs)
