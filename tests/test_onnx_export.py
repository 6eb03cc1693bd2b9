"""export_onnx: every architecture, target and head computes in the file what it does in PyTorch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import BY_TYPE, WIDTHS
from transformers import (
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    LayoutLMConfig,
    LayoutLMModel,
    PreTrainedModel,
)

import qdq_surgery as qs
from qdq_surgery.export.qparams import read_qparams
from qdq_surgery.hf.example_inputs import make_examples, sample_inputs
from qdq_surgery.onnx_export import Export, export_onnx
from qdq_surgery.onnx_file import opened
from qdq_surgery.onnx_file.opened import open_exported
from qdq_surgery.onnx_file.writer import LARGEST
from qdq_surgery.targets.registry import TARGETS

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from exported import (  # noqa: E402
    assert_parity,
    calibrated,
    encoder_decoder,
    exported,
    inputs_for,
    listing,
    outputs_of,
    run,
    traced_once,
)

from qdq_surgery.export.pipeline import build as build_graph  # noqa: E402

#: Values half-way between two steps may go either way, which moves what comes after; more than this on average is more.
TIES = 0.02

#: Float32 arithmetic of a few layers of width 32, of outputs of size 1.
FLOAT = 2e-5

#: Other shapes than the one that is traced, one of them a single row.
SHAPES = ((3, 17), (1, 5))

#: Their files for the other targets are compared below, and in tests/targets, tests/prove and tests/serve. Those with a
#: size in WIDTHS are what tests/prove looks at, too.
EVERY_ARCHITECTURE = {
    "bert": "onnxruntime",
    "roberta": "openvino",
    "electra": "openvino",
    "distilbert": "openvino",
    "albert": "onnxruntime",
    "mobilebert": "openvino",
    "mpnet": "tensorrt",
    "deberta-v2": "onnxruntime",
    "roberta-prelayernorm": "tensorrt",
    "modernbert": "onnxruntime",
}

#: Whose code is RoBERTa's in transformers, to the names of its classes.
TWINS = ("xlm-roberta", "camembert")


def assert_same(qmodel: PreTrainedModel, file: Export, inputs: Mapping[str, Any]) -> None:
    """The certificate, and without it: the outputs by name, nearly equal."""
    assert_parity(qmodel, file.path, inputs)
    wanted, found = outputs_of(qmodel, inputs), run(file.path, inputs)
    assert list(found) == list(wanted)
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert np.abs(found[name] - value).mean() < TIES * max(1.0, float(np.abs(value).mean()))


def graph_of(path: Path) -> Any:
    return ir.load(path).graph


# --- every architecture, target and head --------------------------------------------------------------------------


#: BERT in two layers of the smallest size, as in other tests.
SIZES: dict[str, dict[str, Any]] = {"bert": {"num_hidden_layers": 2}, "albert": WIDTHS["albert"]}

#: Their files have fixed shapes, traced in half the time: but for other embeddings, or norms in another place, they are
#: another one's.
COPIES = ("electra", "mpnet", "roberta-prelayernorm")


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "target"), EVERY_ARCHITECTURE.items())
def test_every_architecture(model_type: str, target: str) -> None:
    sizes = SIZES.get(model_type) or WIDTHS.get(model_type, {"num_hidden_layers": 1})
    dynamic = model_type not in COPIES
    qmodel, file = exported(model_type, target=target, dynamic=dynamic, **sizes)
    assert file.parity is not None
    assert file.parity.agrees
    if dynamic:
        for shape in SHAPES if model_type == "bert" else SHAPES[1:]:
            assert_same(qmodel, file, inputs_for(qmodel, shape))
    else:
        assert_same(qmodel, file, sample_inputs(qmodel, None, False))
    graph = graph_of(file.path)
    assert {node.domain for node in graph} == {""}
    counts = Counter(node.op_type for node in graph)
    weights = sum(site.role == "weight" for site in file.sites)
    assert counts["QuantizeLinear"] == len(file.sites) - weights
    assert counts["DequantizeLinear"] == len(file.sites)
    # Every quantizer is in the file.
    assert {name for site in file.sites for name in site.quantizers} == set(qs.quantizers(qmodel))
    assert len({node.name for node in graph}) == len(graph)
    zeros = {
        (node.inputs[2].dtype, int(node.inputs[2].const_value.numpy()))
        for node in graph
        if node.op_type == "QuantizeLinear"
    }
    # What is never negative, and what hardly is, behind a GELU, has an unsigned grid there.
    signed = {"uint8": (ir.DataType.UINT8, 128), "int8": (ir.DataType.INT8, 0)}[TARGETS[target].activations[0]]
    unsigned = {(ir.DataType.UINT8, 0), (ir.DataType.UINT8, 32)} if target != "tensorrt" else set()
    assert signed in zeros
    assert zeros <= {signed, *unsigned}


def test_every_architecture_is_there() -> None:
    assert {*EVERY_ARCHITECTURE, *TWINS} == set(BY_TYPE)
    assert set(EVERY_ARCHITECTURE.values()) == set(TARGETS)


@pytest.mark.parametrize("model_type", SIZES)
def test_each_weight_stands_as_integers_in_front_of_its_product(model_type: str) -> None:
    _, file = exported(model_type, **SIZES[model_type])
    graph = graph_of(file.path)
    nodes = {node.name: node for node in graph}
    weights = [site for site in file.sites if site.role == "weight"]
    assert weights
    for site in weights:
        dequantize = nodes[site.dequantize]
        integers, scale, zero = (value.const_value for value in dequantize.inputs)
        assert integers.dtype == zero.dtype == ir.DataType.INT8
        assert integers.shape[1] == scale.shape[0] == zero.shape[0]
        assert dequantize.attributes.get_int("axis") == 1
        assert site.transposed
        uses = list(dequantize.outputs[0].uses())
        assert {(use.node.op_type, use.idx) for use in uses} == {("MatMul", 1)}
        assert len(uses) == (2 if model_type == "albert" else 1)  # one layer's modules for both layers
        readers = [use.node for use in uses]
        # Its other operand comes from a pair of its own.
        source = readers[0].inputs[0].producer()
        assert source.op_type == "DequantizeLinear"
        assert source.inputs[0].producer().op_type == "QuantizeLinear"
        assert readers[0].name.startswith(site.name.removesuffix("._weight_quantizer"))
    # No float copy is left.
    sizes = {tuple(nodes[site.dequantize].inputs[0].const_value.shape) for site in weights}
    for name, value in graph.initializers.items():
        if value.dtype == ir.DataType.FLOAT and "embed" not in name and "pooler" not in name:
            assert tuple(value.shape) not in sizes | {size[::-1] for size in sizes}, name


HEADS: list[tuple[str, str, dict[str, Any]]] = [
    # BERT's other heads are exported, and compared, in tests/serve/test_served_model.py.
    ("bert", "BertForNextSentencePrediction", {"dynamic": False}),
    # With open shapes: its chunks are one then.
    ("bert", "BertModel", {"rules": "qdqbert", "chunk_size_feed_forward": 3}),
]


@pytest.mark.parametrize(("model_type", "head", "options"), HEADS)
def test_every_head(model_type: str, head: str, options: dict[str, Any]) -> None:
    qmodel, file = exported(model_type, head, num_hidden_layers=1, **options)
    inputs = sample_inputs(qmodel, None, False)
    assert_same(qmodel, file, inputs)
    metadata = open_exported(file.path).metadata
    assert metadata["class"] == head
    with torch.no_grad():
        returned = type(qmodel(**inputs))
    assert metadata["outputs"] == f"{returned.__module__}.{returned.__qualname__}"


@pytest.mark.slow
def test_a_decoder_takes_what_an_encoder_gives(tmp_path: Path) -> None:
    model = calibrated("bert", "BertLMHeadModel", num_hidden_layers=1, is_decoder=True, add_cross_attention=True)
    inputs = {**inputs_for(model, (2, 9)), "encoder_attention_mask": torch.ones(2, 6, dtype=torch.long)}
    assert_same(model, export_onnx(model, tmp_path / "model.onnx", inputs, parity=False), inputs)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [19, 23])
def test_the_first_and_the_last_opset(opset: int) -> None:
    pytest.importorskip("openvino")
    # Open shapes in opset 19 are those of a file for TensorRT (tests/targets/test_tensorrt.py).
    dynamic = opset != 19
    qmodel, file = exported("bert", target="openvino", opset=opset, num_hidden_layers=1, dynamic=dynamic)
    assert file.opset == opset
    assert ir.load(file.path).opset_imports == {"": opset}
    inputs = inputs_for(qmodel, SHAPES[0]) if dynamic else sample_inputs(qmodel, None, False)
    assert_parity(qmodel, file.path, inputs, "onnxruntime", "openvino")


def test_closed_shapes(tmp_path: Path) -> None:
    qmodel = calibrated(num_hidden_layers=1)
    inputs = inputs_for(qmodel, (1, 9))
    file = export_onnx(qmodel, tmp_path / "model.onnx", inputs, dynamic=False)
    assert {str(value.shape) for value in graph_of(file.path).inputs} == {"[1,9]"}
    assert_parity(qmodel, file.path, inputs)
    with pytest.raises(Exception, match=r"Got: 10 Expected: 9"):
        run(file.path, inputs_for(qmodel, (1, 10)))


def test_signed_and_unsigned_activations_give_the_same(tiny: PreTrainedModel, tmp_path: Path) -> None:
    file, other = (
        export_onnx(tiny, tmp_path / f"{kind}.onnx", activations=kind, parity=False) for kind in ("uint8", "int8")
    )
    inputs = inputs_for(tiny, SHAPES[0])
    one, two = run(file.path, inputs), run(other.path, inputs)
    assert all(np.array_equal(one[name], two[name]) for name in one)
    kinds = [
        {node.inputs[2].dtype for node in graph_of(each.path) if node.op_type == "QuantizeLinear"}
        for each in (file, other)
    ]
    assert kinds == [{ir.DataType.UINT8}, {ir.DataType.INT8}]


# --- what becomes of the quantizers -------------------------------------------------------------------------------


def test_one_pair_in_front_of_queries_keys_and_values(tiny: PreTrainedModel) -> None:
    _, file = exported("bert", **SIZES["bert"])
    for layer in range(2):
        names = [f"encoder.layer.{layer}.attention.self.{part}._input_quantizer" for part in ("query", "key", "value")]
        sites = [site for site in file.sites if set(names) & set(site.quantizers)]
        assert [site.quantizers for site in sites] == [names]
        assert sites[0].quantize == f"{names[0]}/QuantizeLinear"
    # With another range for one of them it is another pair.
    before = len(_pairs(tiny))
    key = qs.quantizers(tiny)["encoder.layer.0.attention.self.key._input_quantizer"]
    assert key.amax is not None
    key.amax = key.amax * 0.5
    assert len(_pairs(tiny)) == before + 1


def _pairs(qmodel: PreTrainedModel) -> list[Any]:
    """The pairs of activations, from the passes alone."""
    target = TARGETS["onnxruntime"]
    traced = traced_once(qmodel, sample_inputs(qmodel, None, True), target.opset, True)
    built = build_graph(traced, qmodel, read_qparams(qmodel, target), target, "int8", {})
    return [site for site in built.sites if site.role != "weight"]


def test_layers_that_are_one() -> None:
    """ALBERT has one layer's modules for all layers: one copy of each weight, a pair for each run."""
    qmodel, file = exported("albert", **SIZES["albert"])
    graph = graph_of(file.path)
    quantizers = qs.quantizers(qmodel)
    weights = [name for name in quantizers if name.endswith("weight_quantizer")]
    runs = Counter(name for site in file.sites for name in site.quantizers)
    assert runs == {name: 1 if name in weights else 2 for name in quantizers}
    assert set(runs) == set(quantizers)
    stored = {value.name for value in graph.initializers.values() if value.dtype == ir.DataType.INT8 and value.shape}
    assert sum(name.endswith("/weight") for name in stored) == len(weights) == 6
    assert len({site.value for site in file.sites}) == len(file.sites)


@pytest.mark.parametrize("model_type", SIZES)
def test_the_scores_factor_is_in_the_queries(model_type: str) -> None:
    _, file = exported(model_type, **SIZES[model_type])
    size = {"bert": 8.0, "albert": 16.0}[model_type]  # of a head
    folded = {site.name: site.factor for site in file.sites if site.factor != 1.0}
    if model_type == "bert":
        parts = ("matmul_q_input_quantizer", "query._weight_quantizer")
        assert set(folded) == {f"encoder.layer.{layer}.attention.self.{part}" for layer in (0, 1) for part in parts}
    assert all(value == pytest.approx(size**-0.5, rel=1e-6) for value in folded.values())
    nodes = {node.name: node for node in graph_of(file.path)}
    queries = [site for site in file.sites if "matmul_q" in site.name]
    assert len(queries) == 2
    for site in queries:
        assert site.factor != 1.0
        if site.factor != 1.0:
            (use,) = nodes[site.dequantize].outputs[0].uses()
            (after,) = use.node.outputs[0].uses()
            assert (use.node.op_type, after.node.op_type) in (("MatMul", "Add"), ("MatMul", "Softmax"))


def stored_as(qmodel: PreTrainedModel, file: Export) -> dict[str, tuple[Any, Any]]:
    """For each weight: what the file holds, and what PyTorch's quantizer gives."""
    weights, found = open_exported(file.path).weights, {}
    for site in open_exported(file.path).sites:
        if site.role == "weight":
            linear = qmodel.get_submodule(site.name.removesuffix("._weight_quantizer"))
            with torch.no_grad():
                wanted = linear._weight_quantizer(linear.weight).numpy()
            found[site.name] = weights[site.value].T / site.factor, wanted
    return found


#: Relative; the scale is rounded once more where a factor was folded in.
ROUNDED = 3e-7


@pytest.mark.parametrize("native", [False, True])
def test_weights_are_what_pytorch_rounds_them_to(native: bool, tiny: PreTrainedModel, tmp_path: Path) -> None:
    qmodel = tiny
    for name, each in qs.quantizers(qmodel).items():
        each.use_fb_fake_quant = native
        if name.endswith("weight_quantizer"):
            assert each.amax is not None
            each.amax = each.amax * 0.7  # clips on both sides
    file = export_onnx(qmodel, tmp_path / "model.onnx")
    found = stored_as(qmodel, file)
    assert len(found) == 6
    for name, (ours, wanted) in found.items():
        np.testing.assert_allclose(ours, wanted, rtol=ROUNDED, atol=0, err_msg=name)
    integers = [
        value.const_value.numpy()
        for name, value in graph_of(file.path).initializers.items()
        if name.endswith("_weight_quantizer/turned/weight")
    ]
    assert {int(each.min()) for each in integers} == {-128}


@pytest.mark.parametrize("native", [False, True])
def test_weights_rounded_for_their_products_are_stored_so(native: bool, tmp_path: Path) -> None:
    qmodel = calibrated(num_hidden_layers=1)
    for each in qs.quantizers(qmodel).values():
        each.use_fb_fake_quant = native
    before = export_onnx(qmodel, tmp_path / "nearest.onnx")
    qs.round_weights(qmodel, [inputs_for(qmodel, (4, 12))])
    after = export_onnx(qmodel, tmp_path / "rounded.onnx")
    stored, nearest = stored_as(qmodel, after), stored_as(qmodel, before)
    assert len(stored) == 6
    for name, (ours, wanted) in stored.items():
        np.testing.assert_allclose(ours, wanted, rtol=ROUNDED, atol=0, err_msg=name)
        assert not np.array_equal(ours, nearest[name][0]), name


@pytest.mark.slow
def test_the_certificate_of_weights_rounded_for_their_products(tmp_path: Path) -> None:
    qmodel = calibrated(rules="openvino", num_hidden_layers=1)
    qs.round_weights(qmodel, [inputs_for(qmodel, (4, 12))])
    batch = inputs_for(qmodel, (2, 5))
    made = qs.export_onnx(qmodel, tmp_path / "model.onnx", target="openvino")
    assert made.parity is not None
    assert made.parity.agrees
    for each in qs.quantizers(qmodel).values():
        each.set_rounding(None)
    assert not qs.certify(qmodel, tmp_path / "model.onnx", batch).agrees


def odd() -> PreTrainedModel:
    """One of everything that is not usual."""
    qmodel = calibrated(rules="qdqbert", num_hidden_layers=1)
    quantizers = qs.quantizers(qmodel)
    layer = "encoder.layer.0"
    with torch.no_grad():
        qmodel.get_submodule(f"{layer}.attention.self.query").weight[3] = 0
        qmodel.get_submodule(f"{layer}.output.dense").weight[:, :] *= torch.linspace(0, 1, 32)[:, None]
    qs.recalibrate_weights(qmodel)
    qs.learn_ranges(qmodel)
    quantizers[f"{layer}.attention.self.key._input_quantizer"].disable()
    quantizers[f"{layer}.attention.self.value._weight_quantizer"].disable()
    quantizers[f"{layer}.intermediate.dense._input_quantizer"].disable_quant()
    quantizers[f"{layer}.intermediate.dense._weight_quantizer"].reset_amax()
    quantizers[f"{layer}.output.dense._weight_quantizer"]._narrow_range = True
    probabilities = quantizers[f"{layer}.attention.self.matmul_a_input_quantizer"]
    probabilities._unsigned = True
    empty = quantizers[f"{layer}.attention.self.matmul_k_input_quantizer"]
    empty.learn_amax(False)
    empty.amax = torch.tensor(0.0)
    quantizers[f"{layer}.output.add_local_input_quantizer"].use_fb_fake_quant = True
    return qmodel


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_quantizers_of_every_kind(target: str, tmp_path: Path) -> None:
    qmodel = odd()
    if target == "onnxruntime":  # no kernel of OpenVINO for a CPU has these
        residual = qs.quantizers(qmodel)["encoder.layer.0.output.add_residual_input_quantizer"]
        residual.reset_amax()
        residual.amax = torch.linspace(0.5, 3.0, 32)[None, None]
    inputs = inputs_for(qmodel, SHAPES[0])
    file = export_onnx(qmodel, tmp_path / "model.onnx", inputs, target=target, dynamic=False)
    assert_same(qmodel, file, inputs)
    named = {name for site in file.sites for name in site.quantizers}
    off = {name for name, each in qs.quantizers(qmodel).items() if not (each.enabled and each._if_quant)}
    assert len(off) == 3
    assert named == set(qs.quantizers(qmodel)) - off
    graph = graph_of(file.path)
    assert not [node.name for node in graph if any(node.name.startswith(f"{name}/") for name in off)]
    for name, value in graph.initializers.items():
        if "_quantizer" in name and "/scale" in name:
            assert value.const_value.numpy().min() > 0, name
    nodes = {node.name: node for node in graph}
    probabilities = nodes["encoder.layer.0.attention.self.matmul_a_input_quantizer/QuantizeLinear"]
    assert probabilities.inputs[2].dtype == ir.DataType.UINT8
    assert probabilities.inputs[2].const_value.numpy() == 0
    residual = nodes["encoder.layer.0.output.add_residual_input_quantizer/QuantizeLinear"]
    assert residual.attributes.get_int("axis", 0) == (2 if target == "onnxruntime" else 0)


def test_weights_with_the_scales_of_inputs_that_are_off(tmp_path: Path) -> None:
    """Their columns are multiplied by scales that nothing divides the activation by."""
    qmodel = calibrated(rules="onnxruntime", num_hidden_layers=1)
    for name in ("attention.self.key", "intermediate.dense", "output.dense"):
        linear = qmodel.get_submodule(f"encoder.layer.0.{name}")
        linear._input_quantizer.set_range(torch.linspace(2.0, 8.0, linear.in_features))
        linear._input_quantizer.disable()
    inputs = inputs_for(qmodel, SHAPES[0])
    assert_same(qmodel, export_onnx(qmodel, tmp_path / "model.onnx", inputs, dynamic=False), inputs)


@pytest.mark.slow
def test_without_a_single_quantizer(tmp_path: Path) -> None:
    """The float model, to float precision."""
    qmodel = calibrated("distilbert", rules="openvino", **WIDTHS["distilbert"])  # as in tests/prove/test_receipt.py
    for each in qs.quantizers(qmodel).values():
        each.disable()
    file = export_onnx(qmodel, tmp_path / "model.onnx")
    assert file.sites == ()
    assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in graph_of(file.path)}
    for shape in SHAPES:
        inputs = inputs_for(qmodel, shape)
        wanted = outputs_of(qmodel, inputs)["last_hidden_state"]
        np.testing.assert_allclose(run(file.path, inputs)["last_hidden_state"], wanted, rtol=0, atol=FLOAT)


HEAD_TOO = """
schema: 1
name: head-too
why: every linear, also the one whose weight is the embeddings'
specs:
  activation: {num_bits: 8, calibrator: max}
  weight: {num_bits: 8, axis: 0}
rules:
  - name: linear
    why: all of them
    match: {pattern: "linear(x, w)"}
    quantize: {x: activation, w: weight}
"""


def test_a_tied_embedding_is_looked_up_in_float(tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(HEAD_TOO)
    qmodel = calibrated("bert", "BertForMaskedLM", str(tmp_path / "rules.yaml"), num_hidden_layers=1)
    assert qmodel.cls.predictions.decoder.weight is qmodel.bert.embeddings.word_embeddings.weight
    inputs = inputs_for(qmodel, SHAPES[0])
    file = export_onnx(qmodel, tmp_path / "model.onnx", inputs, dynamic=False)
    assert_same(qmodel, file, inputs)
    site = next(site for site in file.sites if site.name == "cls.predictions.decoder._weight_quantizer")
    assert site.transposed
    tables = [value for value in graph_of(file.path).initializers.values() if tuple(value.shape) == (60, 32)]
    assert [(table.dtype, [use.node.op_type for use in table.uses()]) for table in tables] == [
        (ir.DataType.FLOAT, ["Gather"])
    ]


def test_shared_ranges(tmp_path: Path) -> None:
    qmodel = calibrated(rules="fuse-qkv", num_hidden_layers=1)
    file = export_onnx(qmodel, tmp_path / "model.onnx", target="tensorrt", opset=20)  # in which ``tiny`` is traced
    assert_same(qmodel, file, inputs_for(qmodel, SHAPES[0]))
    weights = {name: value for name, value in open_exported(file.path).weights.items() if "self" in name}
    assert len(weights) == 3


# --- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_the_file_says_of_itself(tmp_path: Path) -> None:
    qmodel = calibrated("bert", "BertForQuestionAnswering", "onnxruntime", num_hidden_layers=1)
    qmodel.config._name_or_path = "/home/someone/secret/place"
    qmodel.name_or_path = "/home/someone/secret/place"
    file = export_onnx(qmodel, tmp_path / "model.onnx", dynamic=False)
    data = file.path.read_bytes()
    for text in ("/home/someone", "_name_or_path", str(Path(qs.__file__).parent), "site-packages", str(tmp_path)):
        assert text.encode() not in data, text
    model = onnx.load(file.path)
    assert not any(node.doc_string or node.metadata_props for node in model.graph.node)
    assert not any(value.doc_string or value.metadata_props for value in (*model.graph.input, *model.graph.output))
    assert not model.graph.metadata_props
    assert not model.functions
    assert model.producer_name == "qdq_surgery"
    assert model.graph.name == "BertForQuestionAnswering"
    metadata = open_exported(file.path).metadata
    assert {name: metadata[name] for name in ("version", "target", "rules", "class", "outputs")} == {
        "version": qs.__version__,
        "target": "onnxruntime",
        "rules": "onnxruntime",
        "class": "BertForQuestionAnswering",
        "outputs": "transformers.modeling_outputs.QuestionAnsweringModelOutput",
    }
    config = json.loads(metadata["config"])
    assert config["model_type"] == "bert"
    assert config["num_hidden_layers"] == 1
    assert "_name_or_path" not in config
    assert tuple(open_exported(file.path).sites) == file.sites
    onnx.checker.check_model(model, full_check=True)


def test_what_the_export_says() -> None:
    _, file = exported("bert", **SIZES["bert"])
    text = file.to_text(100)
    assert max(len(line) for line in text.splitlines()) <= 100
    first = text.splitlines()[0]
    assert first.startswith("model.onnx for onnxruntime, opset 20, ")
    assert "12 weights in int8, 16 Q/DQ pairs for 20 quantizers of activations" in text.replace("\n", " ")
    assert json.loads(json.dumps(file.to_json()))["sites"][0]["quantizers"] == file.sites[0].quantizers


@pytest.fixture
def tiny() -> PreTrainedModel:
    return calibrated(num_hidden_layers=1)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if protobuf ended early."""
    monkeypatch.setattr(opened, "LARGEST", 1000)


@pytest.mark.usefixtures("large")
def test_weights_beside_the_file(tiny: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "model.onnx.data").write_bytes(b"of a file that is gone")
    with pytest.raises(qs.ExportError, match=r"model\.onnx\.data exists; pass overwrite=True"):
        export_onnx(tiny, folder / "model.onnx")
    (folder / "model.onnx.data").unlink()
    file = export_onnx(tiny, folder / "model.onnx")
    assert sorted(listing(folder)) == ["model.onnx", "model.onnx.data"]
    assert len(listing(folder)["model.onnx.data"]) > len(listing(folder)["model.onnx"]) / 2
    inputs = inputs_for(tiny, SHAPES[0])
    assert_parity(tiny, file.path, inputs)
    wanted = run(file.path, inputs)
    # Both may move together: the one knows the other by its name alone.
    moved = tmp_path / "two"
    folder.rename(moved)
    assert_parity(tiny, moved / "model.onnx", inputs)
    # A second export replaces both.
    quantizer = qs.quantizers(tiny)["encoder.layer.0.output.dense._input_quantizer"]
    assert quantizer.amax is not None
    quantizer.amax = quantizer.amax / 4
    export_onnx(tiny, moved / "model.onnx", overwrite=True)
    assert len(listing(moved)) == 2
    assert "model.onnx.data" not in listing(moved)  # the old file's, whose name was taken until the new one was there
    again = run(moved / "model.onnx", inputs)
    assert not np.allclose(again["last_hidden_state"], wanted["last_hidden_state"])
    assert_parity(tiny, moved / "model.onnx", inputs)
    # A small one needs no second file.
    monkeypatch.setattr(opened, "LARGEST", LARGEST)
    export_onnx(tiny, moved / "model.onnx", overwrite=True)
    assert sorted(listing(moved)) == ["model.onnx"]
    assert np.array_equal(run(moved / "model.onnx", inputs)["last_hidden_state"], again["last_hidden_state"])


# --- outputs and inputs beyond the usual ----------------------------------------------------------------------------


@pytest.mark.slow
def test_names_of_inputs_and_outputs(tmp_path: Path) -> None:
    """Of what the config asks for, and of what the example does."""
    model = calibrated(num_hidden_layers=1, output_hidden_states=True)
    inputs = {**inputs_for(model, (2, 9)), "output_attentions": True}
    file = export_onnx(model, tmp_path / "model.onnx", inputs)
    assert file.parity is not None
    graph = graph_of(file.path)
    assert [value.name for value in graph.outputs] == [
        "last_hidden_state", "pooler_output", "hidden_states.0", "hidden_states.1", "attentions.0"
    ]  # fmt: skip
    assert [value.name for value in graph.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert {value.dtype for value in graph.inputs} == {ir.DataType.INT64}
    assert {str(value.shape) for value in graph.inputs} == {"[batch,sequence]"}
    others = inputs_for(model, (3, 12), mask=False)
    with torch.no_grad():
        wanted = model(**others, output_attentions=True)
    found = qs.load_onnx(file.path)(**others, output_attentions=True)
    assert len(found.attentions) == len(wanted.attentions) > 0
    for mine, theirs in zip(found.attentions, wanted.attentions, strict=True):
        # A tie may be rounded the other way: one step of the probabilities' grid and what follows from it.
        torch.testing.assert_close(mine, theirs, rtol=0, atol=2e-2)


def layoutlm() -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = LayoutLMConfig(vocab_size=120, max_position_embeddings=64, max_2d_position_embeddings=200, **sizes)
    torch.manual_seed(0)
    return qs.convert(LayoutLMModel(config).eval())


@pytest.mark.slow
def test_a_model_of_pages_takes_boxes(tmp_path: Path) -> None:
    model = layoutlm()
    example = sample_inputs(model, None, True)
    boxes = example["bbox"]
    assert boxes.shape == (*example["input_ids"].shape, 4)
    assert 0 <= boxes.min() <= boxes.max() < 200
    assert (boxes[..., 2:] >= boxes[..., :2]).all()
    qs.calibrate(model, [example])
    file = export_onnx(model, tmp_path / "model.onnx")
    taken = {value.name: [str(size) for size in value.shape or ()] for value in graph_of(file.path).inputs}
    assert taken["bbox"] == ["batch", "sequence", "4"]
    others = make_examples(model, (3, 12))
    assert_parity(model, file.path, {**others, "token_type_ids": torch.zeros_like(others["input_ids"])})


def bert2bert() -> PreTrainedModel:
    sizes = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    sides = BertConfig(**sizes), BertConfig(**sizes, is_decoder=True, add_cross_attention=True)
    config = EncoderDecoderConfig.from_encoder_decoder_configs(*sides)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return EncoderDecoderModel(config).eval()


def test_an_example_of_both_texts() -> None:
    """Of two models in one; such a file is written in tests/ecosystem/test_released_configurations.py."""
    torch.manual_seed(0)
    model = qs.convert(bert2bert())
    example = make_examples(model, (4, 9))
    assert example["decoder_input_ids"].shape == (4, 8)
    assert example["use_cache"] is False
    qs.calibrate(model, [{name: value for name, value in example.items() if "mask" not in name}])


@pytest.mark.slow
def test_an_encoder_decoder_takes_both_texts(tmp_path: Path) -> None:
    model, example = encoder_decoder()
    file = export_onnx(model, tmp_path / "model.onnx", example)
    assert {"input_ids", "decoder_input_ids"} <= {str(value.name) for value in graph_of(file.path).inputs}
    assert_parity(model, file.path, make_examples(model, (3, 12)))
