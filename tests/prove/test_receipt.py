"""Receipts: what of a file runs in INT8, against counts that take another way; and what is told when it does not."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import WIDTHS, batch_for, build
from kept import kept
from torch.utils.flop_counter import FlopCounterMode

import qdq_surgery as qs
from qdq_surgery.errors import ExportError, ReceiptError
from qdq_surgery.onnx_export import export_onnx
from qdq_surgery.onnx_file.opened import open_exported
from qdq_surgery.onnx_graph.executed import Leftover
from qdq_surgery.onnx_graph.graph import OnnxGraph
from qdq_surgery.prove.multiply_adds import count_multiply_adds
from qdq_surgery.prove.receipt import Gemm, Receipt, receipt
from qdq_surgery.targets.onnxruntime import engine_graph as optimized_onnxruntime

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from exported import calibrated, exported, two_towers  # noqa: E402

#: Batch and tokens of all receipts here.
SHAPE = (2, 24)

HEADS = {
    "bert": "BertForQuestionAnswering",
    "distilbert": "DistilBertModel",
    "albert": "AlbertModel",
    "deberta-v2": "DebertaV2Model",
    "modernbert": "ModernBertModel",
    "mobilebert": "MobileBertModel",
}

CPUS = ("onnxruntime", "openvino")

#: The architectures in turn for each.
TARGETS = dict(zip(HEADS, itertools.cycle(CPUS)))


class Files:
    """Exported files, made when they are first asked for; those with all of their quantizers other tests use, too."""

    def get(self, model_type: str, head: str, target: str, off: tuple[str, ...] = (), **sizes: Any) -> Path:
        """A file.

        Args:
            off: Ends of names of quantizers to switch off; ``""`` for all.
            sizes: Other ones than in WIDTHS; ``rules``; ``dynamic``.
        """
        options = sizes or WIDTHS[model_type]
        if not off:
            return exported(model_type, head, target, **options)[1].path

        def make(folder: Path) -> Path:
            qmodel = calibrated(model_type, head, target, **options)
            for name, quantizer in qs.quantizers(qmodel).items():
                if name.endswith(off):
                    quantizer.disable()
            return export_onnx(qmodel, folder / f"{head}.onnx", target=target, parity=False).path

        return kept(make, "receipt", head, target, off, *options.items())

    def bert(self, target: str, off: tuple[str, ...] = (), **sizes: Any) -> Path:
        return self.get("bert", HEADS["bert"], target, off, **sizes)


#: The full recipe, which is no target's own, in one layer: traced for tests/serve.
FULL = {"rules": "qdqbert", "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def files() -> Files:
    return Files()


def by_name(found: Receipt) -> dict[str, Gemm]:
    return {gemm.name: gemm for gemm in found.gemms}


def names(found: Sequence[Leftover]) -> list[str]:
    return sorted(name for each in found for name in each.quantizers)


def integer_products(path: Path) -> int:
    """How many products ONNX Runtime runs on integers, without a look at names."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.parent / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    kernels = ("MatMulIntegerToFloat", "QLinearMatMul")
    return sum(node.op_type in kernels for node in onnx.load(options.optimized_model_filepath).graph.node)


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "target"), [*TARGETS.items(), ("bert", CPUS[1])])
def test_the_encoder_runs_in_int8(model_type: str, target: str, files: Files) -> None:
    path = files.get(model_type, HEADS[model_type], target)
    found = receipt(path, shape=SHAPE)
    assert (found.runtime, found.shape) == (target, SHAPE)
    assert found.attention == 1.0
    assert not found.unclaimed
    assert {gemm.kind for gemm in found.exceptions} <= {"linear", "head", "other"}
    slow = {gemm.module.rpartition(".")[2] for gemm in found.exceptions if gemm.kind == "linear"}
    if (model_type, target) == ("deberta-v2", "onnxruntime"):
        # Their inputs are constants, which no QuantizeLinear of the file makes unsigned.
        assert slow <= {"pos_key_proj", "pos_query_proj"}
    else:
        assert found.linear == 1.0
        found.require()
    if target == "onnxruntime":
        assert sum(gemm.int8 for gemm in found.gemms) == integer_products(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("head", "target", "outside"),
    [
        ("BertForSequenceClassification", "onnxruntime", {"bert.pooler.dense", "classifier"}),
        ("BertForMaskedLM", "onnxruntime", {"cls.predictions.transform.dense", "cls.predictions.decoder"}),
        # OpenVINO knows the decoder by the name of the output alone.
        ("BertForMaskedLM", "openvino", {"cls.predictions.transform.dense", "cls.predictions.decoder"}),
        ("BertForMultipleChoice", "onnxruntime", {"bert.pooler.dense", "classifier"}),
    ],
)
def test_heads_are_named_as_exceptions(head: str, target: str, outside: set[str], files: Files) -> None:
    found = receipt(files.get("bert", head, target, **FULL), shape=SHAPE)
    assert {gemm.module for gemm in found.exceptions} == outside
    for gemm in found.exceptions:
        assert (gemm.kind, gemm.int8) == ("head", False)
        assert gemm.reason == "not quantized: no quantizer on its inputs"
        assert gemm.executed != "not found"
    assert found.total is not None
    assert 0.5 < found.total < 1.0


@pytest.mark.slow
@pytest.mark.parametrize("model_type", HEADS)
def test_multiply_adds_are_those_of_pytorch(model_type: str, files: Files) -> None:
    """Against PyTorch's own counter, over the model as it was."""
    head = HEADS[model_type]
    # The counter hooks into the graph of gradients, where there is one.
    path = files.get(model_type, head, TARGETS[model_type])
    model = build(model_type, head, **WIDTHS[model_type]).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(**batch_for(model, SHAPE))
    found = receipt(path, "onnxruntime", shape=SHAPE)
    assert 2 * sum(gemm.macs for gemm in found.gemms) == counter.get_total_flops()


def test_what_is_constant_is_no_work(files: Files) -> None:
    """DeBERTa's projections of positions: OpenVINO computes them when it opens the file."""
    found = receipt(files.get("deberta-v2", HEADS["deberta-v2"], "openvino"), shape=SHAPE)
    fixed = [gemm for gemm in found.gemms if gemm.module.endswith(("pos_key_proj", "pos_query_proj"))]
    assert len(fixed) == 2
    assert {(gemm.macs, gemm.int8, gemm.reason) for gemm in fixed} == {(0, False, None)}
    assert "2 of the products are computed once" in found.to_text()


@pytest.mark.slow
def test_residual_pairs_are_left_over_on_onnxruntime(files: Files) -> None:
    found = receipt(files.bert("onnxruntime", **FULL), shape=SHAPE)
    assert found.linear == found.attention == 1.0
    expected = [
        f"bert.encoder.layer.0.{block}.add_{branch}_input_quantizer"
        for block in ("attention.output", "output")
        for branch in ("local", "residual")
    ]
    assert names(found.leftover) == expected
    assert all("Sum bert.encoder.layer." in each.why for each in found.leftover)
    # The residual branch's rounding is shared with the linear that reads the same tensor.
    shared = {each.quantizers[0].rpartition(".")[2]: "same integers" in each.why for each in found.leftover}
    assert shared == {"add_local_input_quantizer": False, "add_residual_input_quantizer": True}
    with pytest.raises(ReceiptError) as caught:
        found.require()
    assert all(name in str(caught.value) for name in expected)
    found.require(leftover=4)
    found.require(leftover=None)


@pytest.mark.slow
def test_openvino_merges_the_residual_branch(files: Files) -> None:
    found = receipt(files.bert("openvino", **FULL), shape=SHAPE)
    assert found.linear == found.attention == 1.0
    assert names(found.leftover) == [
        f"bert.encoder.layer.0.{block}.add_local_input_quantizer" for block in ("attention.output", "output")
    ]
    assert all("at the end of FullyConnected" in each.why for each in found.leftover)


def spoilt(path: Path, folder: Path, module: str) -> Path:
    """The file with a float weight in place of an integer one and its DequantizeLinear."""
    model = onnx.load(str(path))
    name = f"{module}._weight_quantizer/DequantizeLinear"
    (pair,) = (node for node in model.graph.node if node.name == name)
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weight = (stored[pair.input[0]] * stored[pair.input[1]]).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, pair.output[0]))
    model.graph.node.remove(pair)
    made = folder / "spoilt.onnx"
    onnx.save(model, str(made))
    return made


@pytest.mark.slow
@pytest.mark.parametrize("target", CPUS)
def test_a_spoilt_weight_is_reported(target: str, files: Files, tmp_path: Path) -> None:
    module = "bert.encoder.layer.1.intermediate.dense"
    found = receipt(spoilt(files.bert(target), tmp_path, module), shape=SHAPE)
    gemm = by_name(found)[f"{module}/MatMul"]
    assert (gemm.kind, gemm.int8) == ("linear", False)
    assert gemm.reason == f"not quantized: the pair of {module}._weight_quantizer is listed, and is not in the file"
    assert found.linear == 0.875  # one of two linears that are twice as wide as the other eight
    assert names(found.leftover) == [f"{module}._input_quantizer"]
    with pytest.raises(ReceiptError) as caught:
        found.require()
    text = str(caught.value)
    assert "of the encoder's linear multiply-adds 87.5000 % run in INT8, and 100.0000 % are asked for" in text
    assert f"  {module}/MatMul: {gemm.reason}" in text
    assert f"  {module}._input_quantizer: " in text
    assert "qa_outputs" not in text
    found.require(linear=0.875, leftover=1)


#: Quantizers that are switched off in one file, of one layer: of one input of both products, and of one linear.
OFF = (
    "layer.0.attention.self.matmul_a_input_quantizer",
    "layer.0.attention.self.matmul_q_input_quantizer",
    "layer.0.intermediate.dense._input_quantizer",
)
ONE_LAYER = {**WIDTHS["bert"], "num_hidden_layers": 1}


@pytest.mark.slow
@pytest.mark.parametrize("target", CPUS)
def test_a_product_with_one_quantizer_is_float(target: str, files: Files) -> None:
    found = receipt(files.bert(target, OFF, **ONE_LAYER), shape=SHAPE)
    assert found.attention == 0.0
    slow = {gemm.name: gemm.reason for gemm in found.exceptions if gemm.kind == "attention"}
    attention = "bert.encoder.layer.0.attention.self"
    remaining = {
        f"{attention}/{product}": f"{attention}.{left}_input_quantizer"
        for product, left in {"MatMul": "matmul_k", "MatMul_2": "matmul_v"}.items()
    }
    assert slow == {name: f"not quantized: of its inputs only {left} is" for name, left in remaining.items()}
    assert names(found.leftover) == sorted(remaining.values())


@pytest.mark.parametrize(
    ("target", "kernel"), [("onnxruntime", "MatMulNBits"), ("openvino", "f32 x i8 in FullyConnected")]
)
def test_an_integer_weight_alone_is_not_int8(target: str, kernel: str, files: Files) -> None:
    """OpenVINO's own word for such a node, runtimePrecision, is i8."""
    path = files.bert(target, OFF, **ONE_LAYER)
    found = receipt(path, shape=SHAPE, precision="f32" if target == "openvino" else None)
    (gemm,) = (gemm for gemm in found.exceptions if gemm.kind == "linear")
    module = "bert.encoder.layer.0.intermediate.dense"
    assert (gemm.module, gemm.executed, gemm.int8) == (module, kernel, False)
    assert gemm.reason == f"not quantized: of its inputs only {module}._weight_quantizer is"
    assert found.linear == 0.75


@pytest.mark.slow
@pytest.mark.parametrize("runtime", CPUS)
def test_a_float_file_has_nothing_in_int8(runtime: str, files: Files) -> None:
    """The float model that tests/test_onnx_export.py traces, too."""
    found = receipt(files.get("distilbert", "DistilBertModel", "openvino", off=("",)), runtime, shape=SHAPE)
    assert found.linear == found.attention == found.total == 0.0
    assert not found.leftover
    assert not found.steps
    assert [gemm.kind for gemm in found.gemms] == ["linear"] * 3 + ["attention"] * 2 + ["linear"] * 3
    assert len(found.exceptions) == len(found.gemms)


def test_a_file_for_another_runtime(files: Files) -> None:
    """Signed activations that three linears read become no integer kernels on x86; the attention's become some."""
    found = receipt(files.bert("openvino"), "onnxruntime", shape=SHAPE)
    assert found.runtime == "onnxruntime"
    slow = [gemm for gemm in found.exceptions if gemm.kind == "linear"]
    assert {gemm.reason for gemm in slow} <= {"quantized, but float in onnxruntime"}
    assert sum(gemm.int8 for gemm in found.gemms) == integer_products(files.bert("openvino"))
    assert {module for each in found.leftover for module in each.quantizers} >= {
        f"{gemm.module}._weight_quantizer" for gemm in slow
    }


@pytest.mark.parametrize("target", CPUS)
def test_steps_are_quantizers(target: str, files: Files) -> None:
    path = files.bert(target)
    found = receipt(path, shape=SHAPE)
    sites = {name for site in open_exported(path).sites for name in site.quantizers}
    assert found.steps
    assert set(found.steps) <= sites


def test_weights_beside_the_graph(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = onnx.load(str(files.bert("onnxruntime")))
    onnx.save(model, str(tmp_path / "large.onnx"), save_as_external_data=True, location="large.data", size_threshold=64)
    assert (tmp_path / "large.data").stat().st_size > 90_000
    monkeypatch.chdir(tmp_path.parent)  # what stands beside the graph is not looked for beside the process
    for runtime in CPUS:
        assert receipt(tmp_path / "large.onnx", runtime, shape=SHAPE).linear == 1.0


@pytest.mark.parametrize(
    ("model_type", "head", "target"),
    [("bert", "BertForNextSentencePrediction", "onnxruntime"), ("electra", "ElectraModel", "openvino")],
)
def test_a_file_with_fixed_axes_is_counted_as_it_is(model_type: str, head: str, target: str, files: Files) -> None:
    """Of tests/test_onnx_export.py. A runtime that knows the shapes fuses otherwise."""
    path = files.get(model_type, head, target, num_hidden_layers=1, dynamic=False)
    axes = onnx.load(str(path)).graph.input[0].type.tensor_type.shape.dim
    found = receipt(path, shape=(1, 5))
    assert found.shape == (axes[0].dim_value, axes[1].dim_value)
    assert found.linear == 1.0


# What cannot be told does not count.


def renamed(edit: Callable[[Any], None]) -> Callable[[Path], Any]:
    optimize = optimized_onnxruntime._optimize

    def changed(path: Path) -> Any:
        model = optimize(path)
        for node in model.graph:
            edit(node)
        return model

    return changed


def test_a_kernel_that_cannot_be_told_is_unknown(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(node: Any) -> None:
        if node.name.endswith("layer.0.output.dense/MatMul"):
            node.name, node.outputs[0].name = "another", "value"

    monkeypatch.setattr(optimized_onnxruntime, "_optimize", renamed(edit))
    found = receipt(files.bert("onnxruntime"), shape=SHAPE)
    gemm = by_name(found)["bert.encoder.layer.0.output.dense/MatMul"]
    assert (gemm.int8, gemm.executed) == (False, "not found")
    assert gemm.reason is not None
    assert gemm.reason.startswith("cannot be told, so it does not count: ")
    assert found.linear == 0.875
    assert found.unclaimed == ("MatMulIntegerToFloat another",)
    assert "not in the file, but run: MatMulIntegerToFloat another" in found.to_text()


def test_a_name_that_two_kernels_have_is_none(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(node: Any) -> None:
        if node.name.endswith(("layer.0.attention.self.key/MatMul", "layer.0.attention.self.query/MatMul")):
            node.name, node.outputs[0].name = node.name.replace("key", "query"), f"of {node.name}"

    monkeypatch.setattr(optimized_onnxruntime, "_optimize", renamed(edit))
    found = receipt(files.bert("onnxruntime"), shape=SHAPE)
    slow = {gemm.module.rpartition(".")[2]: gemm.executed for gemm in found.exceptions if gemm.kind == "linear"}
    assert slow == {"query": "not found", "key": "not found"}
    assert len(found.unclaimed) == 2


def test_a_kernel_without_a_name_is_known_by_its_value(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    def edit(node: Any) -> None:
        if "MatMul" in node.op_type:
            node.name = ""

    monkeypatch.setattr(optimized_onnxruntime, "_optimize", renamed(edit))
    found = receipt(files.bert("onnxruntime"), shape=SHAPE)
    assert found.linear == 1.0
    # These give integers, a value that the file does not have.
    assert found.unclaimed == ("QLinearMatMul ", "QLinearMatMul ")
    assert found.attention == 0.5


# TensorRT: from listings, without TensorRT.


def layer(name: str, kind: str, types: Sequence[str], nodes: Sequence[str], tactic: str = "", between: str = "") -> Any:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": f"in{at}", "Dimensions": [1], "Format/Datatype": each} for at, each in enumerate(types)],
        "Outputs": [{"Name": "out", "Dimensions": [1], "Format/Datatype": "Half"}],
        "TacticName": tactic,
        "StreamId": 0,
        "Metadata": between.join(f"[ONNX Layer: {node}]" for node in nodes),
    }


#: Its layers' names are all that is asked for.
FOR_TENSORRT = {"num_hidden_layers": 1, "dynamic": False}

ENCODER = "bert.encoder.layer.0."
SELF = f"{ENCODER}attention.self"


def engine() -> dict[str, Any]:
    """An engine without the head as TensorRT 10 lists one: merged, fused, split, and some of it not in INT8."""
    linears = [f"{SELF}.{name}/MatMul" for name in ("query", "key", "value")]
    attention = [f"{SELF}/{name}" for name in ("MatMul", "Add", "Softmax", "MatMul_2")]
    dense = {name: f"{ENCODER}{name}.dense" for name in ("attention.output", "intermediate", "output")}
    rounding = f"{SELF}.query._input_quantizer/QuantizeLinear"
    return {
        "Layers": [
            layer("__myl_Move_myl0_0", "kgen", ["Int64"], []),
            layer(
                "__myl_MeanSubMulQuan_myl0_1",
                "kgen",
                ["Half"],
                ["bert.embeddings.LayerNorm/LayerNormalization", rounding],
            ),
            layer(
                "+".join(linears).replace(".", "_") + "_myl0_2",
                "gemm",
                ["Int8"],
                linears,
                "sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_tilesize64x64x64",
                between="\x1f",
            ),
            layer("_gemm_mha_v2_myl0_3", "kgen", ["Int8", "Int8", "Half", "Int8"], attention, between="\x1e"),
            # The residual comes in as Half, and no tactic tells which of the two is multiplied.
            layer("__myl_FcMulAdd_myl0_4", "fusion", ["Int8", "Half"], [f"{dense['attention.output']}/MatMul"]),
            layer("x_myl0_5", "gemm", ["Row major Int8 format"], [f"{dense['intermediate']}/MatMul"]),
            layer(
                "y_myl0_6",
                "gemm",
                ["Half"],
                [f"{dense['output']}/MatMul"],
                "sm80_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize",
            ),
            # Reads what the product gives; multiplies nothing.
            layer("__myl_AddCast_myl0_7", "kgen", ["Half"], [f"{dense['output']}/MatMul", f"{dense['output']}/Add"]),
            layer("q", "Scale", ["Half"], [f"{dense['output']}._input_quantizer/QuantizeLinear"]),
            layer("dq", "Scale", ["Int8"], [f"{dense['intermediate']}._input_quantizer/DequantizeLinear"]),
        ],
        "Bindings": ["input_ids", "attention_mask"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("form", ["path", "data"])
def test_layers_of_tensorrt(form: str, files: Files, tmp_path: Path) -> None:
    given: Any = engine()
    if form == "path":
        given = tmp_path / "layers.json"
        given.write_text(json.dumps(engine()))
    found = receipt(files.bert("tensorrt", **FOR_TENSORRT), layers=given, shape=SHAPE)
    assert (found.runtime, found.version) == ("tensorrt", "")
    first = {name.removeprefix(ENCODER): gemm for name, gemm in by_name(found).items() if name.startswith(ENCODER)}
    assert {name for name, gemm in first.items() if gemm.int8} == {
        "attention.self.query/MatMul",
        "attention.self.key/MatMul",
        "attention.self.value/MatMul",
        "attention.self/MatMul",
        "attention.self/MatMul_2",
        "intermediate.dense/MatMul",
    }
    assert first["output.dense/MatMul"].reason == "quantized, but float in tensorrt"
    assert first["output.dense/MatMul"].executed == "Half in gemm y_myl0_6"
    told = first["attention.output.dense/MatMul"].reason
    assert told is not None
    assert told.startswith("cannot be told, so it does not count: Int8 and other types go in, and no tactic tells")
    lost = by_name(found)["qa_outputs/MatMul"]
    assert lost.reason == "cannot be told, so it does not count: no layer has it in its Metadata"
    # One pair for both, since they read one tensor with one scale.
    pair = [f"{ENCODER}intermediate.dense._input_quantizer", f"{ENCODER}output.add_residual_input_quantizer"]
    assert names(found.leftover) == pair
    assert found.steps == (f"{ENCODER}output.dense._input_quantizer",)


def test_what_tensorrt_8_hides_is_not_counted(files: Files) -> None:
    path = files.bert("tensorrt", **FOR_TENSORRT)
    nodes = [gemm.name for gemm in OnnxGraph(open_exported(path)).products]
    found = receipt(path, layers={"Layers": [layer("{ForeignNode[a...b]}", "Myelin", ["Int8"], nodes)]}, shape=SHAPE)
    assert found.total == 0.0
    assert all("build with 10 or later" in (gemm.reason or "") for gemm in found.gemms)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("{", "is no JSON: "),
        ("[]", "has no list 'Layers'"),
        ('{"Bindings": ["input_ids"]}', "has no list 'Layers'"),
        (
            '{"Layers": ["a + b", "c"]}',
            "holds the names of the layers only; build the engine with --profilingVerbosity=detailed",
        ),
        ('{"Layers": [{"LayerType": "gemm"}]}', "has something else than a layer as number 0"),
        ('{"Layers": [{"Name": "a", "Inputs": [{"Name": "x"}]}]}', "does not tell the type of an input of layer 'a'"),
        ('{"Layers": [{"Name": "a", "Inputs": [{"Format/Datatype": "Int9"}]}]}', "has the type 'Int9' in layer 'a'"),
        ('{"Layers": [{"Name": "a", "Inputs": []}]}', "has no layer with '[ONNX Layer: ...]' in its Metadata"),
        ('{"Layers": [{"Name": "a", "Inputs": [], "Metadata": "[ONNX Layer: a]"}]}', "the layers are not of "),
    ],
)
def test_other_json_is_refused(layers: str, message: str, files: Files, tmp_path: Path) -> None:
    path = tmp_path / "layers.json"
    path.write_text(layers)
    with pytest.raises(ExportError) as caught:
        receipt(files.bert("tensorrt", **FOR_TENSORRT), layers=path, shape=SHAPE)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runtime": "tensorrt"}, "needs layers=: the JSON of trtexec --exportLayerInfo=layers.json"),
        ({"runtime": "openvino", "layers": {"Layers": []}}, "layers are of TensorRT; openvino opens the file itself"),
        ({"runtime": "tvm"}, "there is no runtime 'tvm'; use 'onnxruntime', 'openvino', 'tensorrt'"),
        ({"runtime": "onnxruntime", "precision": "bf16"}, "precision is for openvino"),
        ({"shape": (0, 8)}, "shape is (0, 8); give batch and tokens"),
        ({"shape": (1, 4000)}, "cannot be run with 1 x 4000 tokens, to count its multiply-adds: "),
    ],
)
def test_what_cannot_be_asked_for(options: dict[str, Any], message: str, files: Files) -> None:
    with pytest.raises(qs.ModelError) as caught:
        receipt(files.bert("onnxruntime"), **{"shape": SHAPE, **options})
    assert message in str(caught.value)


def test_a_file_for_tensorrt_needs_its_layers(files: Files) -> None:
    with pytest.raises(qs.ModelError, match="a receipt of TensorRT"):
        receipt(files.bert("tensorrt", **FOR_TENSORRT))


def test_no_such_layers(files: Files, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read: No such file or directory"):
        receipt(files.bert("tensorrt", **FOR_TENSORRT), layers=tmp_path / "none.json")


# Files that are not ours, and products that BERT does not have.


def file_of(nodes: Sequence[Any], inputs: dict[str, list[Any]], folder: Path, opset: int = 20, **metadata: str) -> Path:
    """A small file with metadata, whose last node's result is the output."""
    helper = onnx.helper
    ports = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, axes) for name, axes in inputs.items()]
    out = helper.make_tensor_value_info(nodes[-1].output[0], onnx.TensorProto.FLOAT, None)
    model = helper.make_model(
        helper.make_graph(list(nodes), "g", ports, [out]), opset_imports=[helper.make_opsetid("", opset)]
    )
    model.ir_version = 10
    helper.set_model_props(model, {f"qdq_surgery.{key}": value for key, value in metadata.items()})
    path = folder / "small.onnx"
    onnx.save(model, str(path))
    return path


def node(op: str, inputs: Sequence[str], **attributes: Any) -> Any:
    return onnx.helper.make_node(op, inputs, ["out"], name=f"block/{op}", **attributes)


@pytest.mark.parametrize(
    ("product", "inputs", "expected"),
    [
        (node("MatMul", ["a", "b"]), {"a": [3, 4, 5], "b": [5, 7]}, 3 * 4 * 5 * 7),
        (node("MatMul", ["a", "b"]), {"a": ["batch", "sequence", 5], "b": [5, 7]}, 2 * 24 * 5 * 7),
        (node("Gemm", ["a", "b"], transB=1), {"a": [4, 5], "b": [7, 5]}, 4 * 5 * 7),
        (node("Gemm", ["a", "b"], transA=1), {"a": [5, 4], "b": [5, 7]}, 4 * 5 * 7),
        (node("Conv", ["a", "b"], group=2), {"a": [2, 6, 10], "b": [4, 3, 3]}, 2 * 4 * 8 * 3 * 3),
        (
            node("Einsum", ["a", "b"], equation="bhid,bhjd->bhij"),
            {"a": [2, 3, 4, 5], "b": [2, 3, 6, 5]},
            2 * 3 * 4 * 5 * 6,
        ),
        (node("Einsum", ["a", "b"], equation="...ij,...jk"), {"a": [2, 3, 4], "b": [2, 4, 5]}, 2 * 3 * 4 * 5),
        (
            node("Attention", ["a", "b", "c"]),
            {"a": [2, 3, 4, 8], "b": [2, 3, 6, 8], "c": [2, 3, 6, 5]},
            2 * 3 * 4 * 6 * 13,
        ),
        (
            node("Attention", ["a", "b", "c"], q_num_heads=4, kv_num_heads=2),
            {"a": [2, 3, 32], "b": [2, 6, 16], "c": [2, 6, 10]},
            2 * 3 * 6 * (32 + 20),
        ),
    ],
    ids=lambda value: value.op_type if hasattr(value, "op_type") else None,
)
def test_every_operator_is_counted(product: Any, inputs: dict[str, list[Any]], expected: int, tmp_path: Path) -> None:
    graph = OnnxGraph(open_exported(file_of([product], inputs, tmp_path, opset=23, sites="[]")))
    counts, _ = count_multiply_adds(graph, SHAPE)
    assert counts == {product.name: expected}


def test_no_linears_is_no_success(tmp_path: Path) -> None:
    path = file_of([node("MatMul", ["a", "b"])], {"a": [3, 4], "b": [4, 5]}, tmp_path, sites="[]", target="onnxruntime")
    found = receipt(path)
    assert found.linear is None
    with pytest.raises(ReceiptError, match="linear multiply-adds there are none, and 100"):
        found.require()
    found.require(linear=None, total=0.0)


def test_a_file_that_is_not_ours(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no file"):
        receipt(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(ExportError, match=r"is no ONNX file|was not written by"):
        receipt(tmp_path / "text.onnx")
    with pytest.raises(ExportError, match=r"was not written by qdq_surgery\.export_onnx"):
        receipt(file_of([node("MatMul", ["a", "b"])], {"a": [3, 4], "b": [4, 5]}, tmp_path))


def test_products_that_cannot_be_seen_are_refused(tmp_path: Path) -> None:
    helper = onnx.helper
    info = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("MatMul", ["a", "b"], ["y"], name="inside")], "g", [], [info])
    both = {"then_branch": branch, "else_branch": branch}
    check = helper.make_node("IsNaN", ["a"], ["nan"], name="check")
    choose = helper.make_node("If", ["nan"], ["out"], name="choose", **both)
    with pytest.raises(ExportError, match="has the branch or loop 'choose'"):
        receipt(file_of([check, choose], {"a": [1], "b": [1]}, tmp_path, sites="[]"))
    unnamed = helper.make_node("MatMul", ["a", "b"], ["out"])
    with pytest.raises(ExportError, match="has nodes without a name of their own"):
        receipt(file_of([unnamed], {"a": [3, 4], "b": [4, 5]}, tmp_path, sites="[]"))


# Text, JSON and the assertion.


def test_it_is_plain_data(files: Files) -> None:
    found = receipt(files.bert("onnxruntime", **FULL), shape=SHAPE)
    data = json.loads(json.dumps(found.to_json()))
    assert data["schema"] == 1
    assert (data["runtime"], data["version"], data["shape"]) == ("onnxruntime", onnxruntime.__version__, [2, 24])
    assert data["shares"]["linear"] == 1.0
    assert data["exceptions"] == ["qa_outputs/MatMul"]
    assert [Gemm(**each) for each in data["gemms"]] == list(found.gemms)
    assert len(data["leftover"]) == 4
    assert data["steps"] == list(found.steps)


@pytest.mark.parametrize("width", [80, 120])
def test_text_fits_its_width(width: int, files: Files) -> None:
    found = receipt(files.bert("onnxruntime", **FULL), shape=SHAPE)
    lines = found.to_text(width).splitlines()
    assert max(map(len, lines)) <= width
    assert "on onnxruntime" in lines[0]
    text = " ".join("".join(lines).split())
    assert "linears of the encoder 6 6" in text
    assert "qa_outputs/MatMul" in text
    assert "quantizers are a pass of their own" in text
    assert str(found)


def test_shares_are_never_rounded_up() -> None:
    made = [Gemm(str(at), "", "linear", 1, "", at > 0, "why" if not at else None) for at in range(10_000)]
    found = Receipt(Path("x.onnx"), "onnxruntime", "1", (1, 1), tuple(made), (), ())
    assert "99.9 %" in found.to_text()
    assert "100.0 %" not in found.to_text()
    with pytest.raises(ReceiptError, match=r"99\.9900 % run in INT8, and 100\.0000 % are asked for"):
        found.require()


@pytest.mark.slow
def test_of_two_towers_it_counts_as_many_tokens_as_the_texts_may_have(tmp_path: Path) -> None:
    qmodel, batch = two_towers()
    file = export_onnx(qmodel, tmp_path / "clip.onnx", batch, "onnxruntime")
    found = receipt(file.path)
    assert found.shape == (1, 40)
    assert found.linear == 1.0
