"""The TensorRT profile, checked over the graph: no engine can be built here.

First the exported files by themselves, without the linter: what TensorRT's guides ask of Q/DQ, attention, residual adds
and types. Then the linter's rules on small graphs. Then half precision. Then the script for a machine with TensorRT.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import BY_TYPE, batch_for, build
from kept import kept
from repository import SCRIPTS
from tiny_checkpoint import save_tiny_bert
from torch import Tensor
from transformers import PreTrainedModel

import benchmark_tensorrt
import qdq_surgery as qs
from qdq_surgery.errors import ExportError
from qdq_surgery.export.half_copy import half_copy
from qdq_surgery.hf.example_inputs import sample_inputs
from qdq_surgery.onnx_export import Export, export_onnx
from qdq_surgery.onnx_graph.findings import Findings
from qdq_surgery.prove.lint import lint

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")

import onnx_ir as ir  # noqa: E402
from exported import calibrated  # noqa: E402
from graphs import S8, U8, Graph, attention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

#: DistilBERT's layers are BERT's under other names.
ARCHITECTURES = ("bert", "albert", "mpnet", "deberta-v2", "modernbert", "roberta-prelayernorm")

#: Where a layer reads another one, or the second is not like the first; the others have one layer.
DEPTH = {"albert": 2, "modernbert": 2}

PRECISIONS = {"float16": ir.DataType.FLOAT16, "float32": ir.DataType.FLOAT}

MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")


def quantized(model_type: str, rules: str) -> PreTrainedModel:
    """Its heads have 16 values each, the fewest that INT8 fused attention takes."""
    head = next(head for head in BY_TYPE[model_type].heads() if head.endswith("ForSequenceClassification"))
    return calibrated(model_type, head, rules, num_hidden_layers=DEPTH.get(model_type, 1), num_attention_heads=2)


class File:
    """An exported file, read without the linter's help."""

    def __init__(self, path: Path, precision: str, model_type: str = "bert", rules: str = "tensorrt") -> None:
        self.path, self.type, self.model_type, self.rules = path, PRECISIONS[precision], model_type, rules
        proto = onnx.load(path)
        onnx.checker.check_model(proto, full_check=True)
        # Types as ONNX infers them, not as they were noted.
        del proto.graph.value_info[:]
        self.model = ir.from_proto(onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True))
        self.nodes = list(self.model.graph)

    def of(self, *kinds: str) -> list[ir.Node]:
        return [node for node in self.nodes if node.op_type in kinds]

    def in_layers(self, *kinds: str) -> list[ir.Node]:
        return [node for node in self.of(*kinds) if node.name and "layer" in node.name]


CASES = [
    *((model_type, "tensorrt") for model_type in ARCHITECTURES),
    ("bert", "tensorrt-both"),
    ("roberta-prelayernorm", "tensorrt-none"),
]


def array(value: ir.Value | None) -> Any:
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def kind_above(value: ir.Value | None) -> str:
    node = producer(value)
    return "" if node is None else node.op_type


def readers(node: ir.Node) -> list[ir.Node]:
    return [use.node for value in node.outputs for use in value.uses()]


def moved(value: ir.Value | None, back: bool) -> ir.Value | None:
    """Through nodes that only move values, up or down."""
    while value is not None:
        node = producer(value) if back else next((use.node for use in value.uses()), None)
        if node is None or node.op_type not in MOVES:
            break
        value = node.inputs[0] if back else node.outputs[0]
    return value


def grids_are_symmetric_int8_with_one_scale_for_activations(file: File) -> None:
    assert file.model.opset_imports[""] >= 19
    pairs = file.of("QuantizeLinear", "DequantizeLinear")
    assert pairs
    for node in pairs:
        scale, zero = array(node.inputs[1]), array(node.inputs[2])
        assert zero.dtype == np.int8, node.name
        assert not zero.any(), node.name
        assert (scale > 0).all(), node.name
        assert scale.dtype == file.type.numpy(), node.name
        stored = node.inputs[0].const_value if node.inputs[0] is not None else None
        if stored is None:
            assert scale.ndim == 0, node.name
        else:
            assert stored.dtype == ir.DataType.INT8
            # [in, out], as MatMul takes them: one scale for each output.
            assert scale.ndim == 0 or (node.attributes.get_int("axis", 0) == 1 and scale.size == stored.shape[1])


def every_gemm_of_the_layers_has_both_inputs_straight_from_a_dequantizelinear(file: File) -> None:
    gemms = file.in_layers("MatMul", "Gemm", "Conv", "Einsum")
    assert gemms
    for node in gemms:
        assert [kind_above(value) for value in node.inputs] == ["DequantizeLinear"] * 2, node.name


def attentions(file: File) -> Iterator[tuple[ir.Node, list[ir.Node], ir.Node]]:
    """Scores, what is between, softmax."""
    for softmax in file.of("Softmax"):
        between: list[ir.Node] = []
        value = softmax.inputs[0]
        while kind_above(value) != "MatMul":
            node = producer(value)
            assert node is not None
            assert node.op_type in ("Add", "Where", "Reshape"), f"{node.op_type} between scores and softmax"
            between.append(node)
            # Towards the product of queries and keys: DeBERTa adds gathered products, all add masks.
            upper = [each for each in node.inputs if kind_above(each) in ("Add", "MatMul", "Reshape")]
            assert upper, node.name
            value = upper[0]
        scores = producer(value)
        assert scores is not None
        yield scores, between, softmax


def attention_meets_the_conditions_of_int8_fusion(file: File) -> None:
    found = list(attentions(file))
    assert len(found) == DEPTH.get(file.model_type, 1)
    for scores, between, softmax in found:
        # Q/DQ before the first product; no factor behind it (it is in the queries).
        assert [kind_above(value) for value in scores.inputs] == ["DequantizeLinear"] * 2
        assert not [node for node in between if node.op_type in ("Mul", "Div")]
        # Behind the softmax, with nothing between, and on the values.
        probabilities = moved(softmax.outputs[0], back=False)
        assert probabilities is not None
        (quantize,) = [use.node for use in probabilities.uses()]
        assert quantize.op_type == "QuantizeLinear"
        (dequantize,) = readers(quantize)
        (context,) = readers(dequantize)
        assert context.op_type == "MatMul"
        assert kind_above(context.inputs[1]) == "DequantizeLinear"
        # Behind the second product, moved about: the input of the output projection.
        last = moved(context.outputs[0], back=False)
        assert last is not None
        (behind,) = [use.node for use in last.uses()]
        assert behind.op_type == "QuantizeLinear"
        # Size of a head, from the values.
        assert context.outputs[0].shape is not None
        assert context.outputs[0].shape[-1] == 16


def residuals(file: File) -> Iterator[tuple[ir.Value, ir.Value]]:
    """Local and residual input of every add that takes a linear's output back."""
    for node in file.in_layers("Add"):
        sides = [local_of(value) for value in node.inputs]
        if any(sides) and not any(value.const_value is not None for value in node.inputs if value is not None):
            local = sides.index(True)
            assert node.inputs[local] is not None
            assert node.inputs[1 - local] is not None
            yield node.inputs[local], node.inputs[1 - local]  # type: ignore[misc]


def local_of(value: ir.Value | None) -> bool:
    """Whether a value is a linear's output, quantized or not, that nothing else reads."""
    value = None if value is None else unscaled(value)
    if kind_above(value) == "DequantizeLinear":
        value = producer(producer(value).inputs[0]).inputs[0]  # type: ignore[union-attr]
        value = None if value is None else unscaled(value)
    node = producer(value)
    if node is not None and node.op_type == "Add" and any(each.is_initializer() for each in node.inputs if each):
        if len(readers(node)) != 1:  # the GELU of ALBERT adds to it what it makes of it
            return False
        node = next((above for above in map(producer, node.inputs) if above is not None), None)
    weight = None if node is None or node.op_type != "MatMul" else producer(node.inputs[1])
    return weight is not None and weight.inputs[0] is not None and weight.inputs[0].is_initializer()


def unscaled(value: ir.Value) -> ir.Value:
    """What a product with a scale for each channel was made from."""
    above = producer(value)
    if above is None or above.op_type != "Mul" or above.inputs[1] is None or not above.inputs[1].is_initializer():
        return value
    assert above.inputs[0] is not None
    return above.inputs[0]


def residual_adds_are_quantized_as_the_rules_say(file: File) -> None:
    found = list(residuals(file))
    # An add behind the attention and one behind the feed-forward part, in each layer.
    assert len(found) == 2 * DEPTH.get(file.model_type, 1)
    for local, residual in found:
        assert (kind_above(unscaled(local)) == "DequantizeLinear") == (file.rules == "tensorrt-both")
        assert (kind_above(unscaled(residual)) == "DequantizeLinear") == (file.rules != "tensorrt-none")


def one_tensor_has_one_scale(file: File) -> None:
    sources = [node.inputs[0] for node in file.of("QuantizeLinear")]
    assert len(sources) == len(set(sources))


def outputs_of_gemms_are_quantized_only_for_other_gemms(file: File) -> None:
    if file.rules == "tensorrt-both":  # quantizes the local input of residual adds, which is such an output
        return
    for node in file.of("QuantizeLinear"):
        source = producer(moved(node.inputs[0], back=True))
        from_gemm = source is not None and (
            source.op_type == "MatMul" or (source.op_type == "Add" and local_of(source.outputs[0]))
        )
        if from_gemm:
            assert {each.op_type for below in readers(node) for each in readers(below)} == {"MatMul"}, node.name


def floats_are_of_one_type_where_it_counts(file: File) -> None:
    """Strongly typed: the file's types are the kernels'. Positions and rotations stay float32, as in the models."""
    other = ir.DataType.FLOAT if file.type is ir.DataType.FLOAT16 else ir.DataType.FLOAT16
    allowed = {"modernbert": ("rotary_emb", ".attn"), "deberta-v2": (".encoder",), "mpnet": (".encoder",)}
    strange = set()
    for node in file.nodes:
        assert all(value.dtype is not None for value in node.outputs), node.name
        if any(value.dtype is other for value in (*node.inputs, *node.outputs) if value is not None):
            assert node.op_type not in ("MatMul", "Gemm", "Softmax", "LayerNormalization", "Erf", "Tanh"), node.name
            strange.add((node.name or "").rpartition("/")[0])
    if file.type is ir.DataType.FLOAT16:
        assert all(place.endswith(allowed.get(file.model_type, ())) or not place for place in strange), strange
    else:
        assert not strange
    for node in file.of("QuantizeLinear", "DequantizeLinear"):
        assert kind_above(node.inputs[0]) != "Cast", node.name
        assert "Cast" not in {each.op_type for each in readers(node)}, node.name
    assert {value.dtype for value in file.model.graph.inputs} == {ir.DataType.INT64}
    assert {value.dtype for value in file.model.graph.outputs} == {file.type}


def no_operator_that_tensorrt_does_not_read(file: File) -> None:
    assert set(file.model.opset_imports) == {""}
    assert not [node for node in file.nodes if node.op_type.startswith("QLinear") or "Integer" in node.op_type]
    assert not file.of("DynamicQuantizeLinear", "Einsum", "If", "Loop", "Scan", "NonZero")


def the_linter_says_the_same(file: File) -> None:
    findings = lint(file.path)
    blocked = {finding.fusion for finding in findings.with_verdict("blocks")}
    assert blocked == ({"residual add fused into the GEMM before it"} if file.rules == "tensorrt-both" else set())
    enabled = {node: finding.fusion for finding in findings.with_verdict("enables") for node in finding.nodes}
    for scores, _, _ in attentions(file):
        assert enabled[scores.name or ""] == "INT8 fused attention"
    told = [each for each in findings.with_verdict("note") if "a product with a scale for each channel" in each.reason]
    # Without outlier channels there is no product.
    adds = sum(len(each.nodes) for each in told) + sum(each.startswith("residual add") for each in enabled.values())
    assert adds == (len(list(residuals(file))) if file.rules == "tensorrt" else 0)
    half = [finding for finding in findings.with_verdict("note") if finding.fusion == "half precision"]
    assert bool(half) == (file.type is ir.DataType.FLOAT)


CHECKS = (
    grids_are_symmetric_int8_with_one_scale_for_activations,
    every_gemm_of_the_layers_has_both_inputs_straight_from_a_dequantizelinear,
    attention_meets_the_conditions_of_int8_fusion,
    residual_adds_are_quantized_as_the_rules_say,
    one_tensor_has_one_scale,
    outputs_of_gemms_are_quantized_only_for_other_gemms,
    floats_are_of_one_type_where_it_counts,
    no_operator_that_tensorrt_does_not_read,
    the_linter_says_the_same,
)


#: Traced with fixed shapes, in half the time, but for one; where the pairs stand is the same.
OPEN = ("bert", "tensorrt")

#: Their files are compared with the models, too.
COMPARED = ("bert", "modernbert")


@functools.cache
def _written(model_type: str, rules: str) -> tuple[PreTrainedModel, dict[str, Any], Export]:
    model, dynamic = quantized(model_type, rules), (model_type, rules) == OPEN

    def make(folder: Path) -> tuple[dict[str, Tensor], Export]:
        parity = rules == "tensorrt" and model_type in COMPARED
        how: dict[str, Any] = {"precision": "float16", "parity": parity, "dynamic": dynamic}
        return model.state_dict(), export_onnx(model, folder / "m.onnx", target="tensorrt", **how)

    state, file = kept(make, "half precision", model_type, rules)
    model.load_state_dict(state)
    return model, sample_inputs(model, None, dynamic), file


@pytest.mark.parametrize(("model_type", "rules"), CASES)
def test_the_file_is_as_tensorrt_wants_it(model_type: str, rules: str) -> None:
    *_, made = _written(model_type, rules)
    file = File(made.path, "float16", model_type, rules)
    for check in CHECKS:
        check(file)


# --- the linter's rules on small graphs ---------------------------------------------------------------------------

GEMM, FUSED = "INT8 GEMM", "INT8 fused attention"
ADD = "residual add fused into the GEMM before it"


def said(make: Callable[[Graph], None], opset: int = 19, kind: Any = np.float16) -> Findings:
    graph = Graph(opset, kind)
    make(graph)
    return lint(graph.model(), "tensorrt")


def gemm(zero: Any = S8, scale: Any = 0.02, axis: int | None = None, **weight: Any) -> Callable[[Graph], None]:
    def make(g: Graph) -> None:
        g.end(g.op("MatMul", g.pair(g.input(), "x", scale, zero, axis), g.weight(**weight)))

    return make


def through(kind: str, *more: Any, **options: Any) -> Callable[[Graph], None]:
    def make(g: Graph) -> None:
        between = g.op(kind, g.pair(g.input(), "x"), *map(g.const, more), **options)
        g.end(g.op("MatMul", between, g.weight(), name="gemm"))

    return make


def behind_a_gemm(kind: str) -> Callable[[Graph], None]:
    def make(g: Graph) -> None:
        product = g.pair(g.op("MatMul", g.pair(g.input(), "x"), g.weight()), "y")
        g.end(g.op(kind, product, *([g.ones(8)] if kind == "Add" else [])))

    return make


def weight_alone(g: Graph) -> None:
    g.end(g.op("MatMul", g.input(), g.weight("x")))


def einsum(g: Graph) -> None:
    g.end(g.op("Einsum", g.pair(g.input(), "x"), g.weight(), equation="bik,kn->bin"))


def residual_add(local: bool, residual: bool) -> Callable[[Graph], None]:
    def make(g: Graph) -> None:
        stream = g.input("stream")
        product = g.op("Add", g.op("MatMul", g.pair(g.input(), "x"), g.weight()), g.ones(8))
        left = g.pair(product, "local") if local else product
        right = g.pair(stream, "residual") if residual else stream
        g.end(g.op("LayerNormalization", g.op("Add", left, right, name="add"), g.ones(8), g.ones(8)))

    return make


def two_scales(g: Graph) -> None:
    x = g.input()
    products = [
        g.op("MatMul", g.pair(x, name, scale), g.weight(f"w{name}")) for name, scale in (("q", 0.02), ("k", 0.03))
    ]
    g.end(g.op("Add", *products))


@pytest.mark.parametrize(
    ("make", "site", "verdict", "fusion", "reason"),
    [
        (gemm(), "x", "enables", GEMM, "both inputs have Q/DQ"),
        (gemm(), "w", "enables", GEMM, "both inputs have Q/DQ"),
        (gemm(U8), "x", "blocks", "any INT8 kernel", "uint8 with a zero point other than 0"),
        (gemm(np.uint8(0)), "x", "blocks", "any INT8 kernel", "the grid is uint8"),
        (gemm(np.int8(3)), "x", "blocks", "any INT8 kernel", "int8 with a zero point other than 0"),
        (gemm(scale=0.0), "x", "blocks", "any INT8 kernel", "a scale is 0 or less"),
        (gemm(scale=np.full(8, 0.02), axis=2), "x", "blocks", "any INT8 kernel", "one scale for each channel"),
        (gemm(axis=None, shape=(8, 8)), "w", "enables", GEMM, ""),
        (through("Transpose", perm=[0, 1, 2]), "x", "enables", GEMM, ""),
        (through("Mul", np.float16(0.5)), "w", "blocks", GEMM, "its first input comes through a Mul"),
        (through("Cast", to=10), "w", "blocks", GEMM, "its first input comes through a Cast"),
        (weight_alone, "x", "blocks", GEMM, "its first input has none"),
        (einsum, "x", "blocks", GEMM, "Einsum"),
        (behind_a_gemm("Add"), "y", "blocks", "bias fused into the GEMM before it", "right on a GEMM's output"),
        (behind_a_gemm("Gelu"), "y", "blocks", "activation fused into the GEMM before it", "right on a GEMM's output"),
        (residual_add(False, True), "residual", "enables", ADD, "the GEMM's own output is not rounded"),
        (residual_add(True, True), "local", "blocks", ADD, "splits the kernel"),
        (residual_add(True, True), "residual", "idle", ADD, "no use while the other input"),
        (residual_add(False, False), "add", "note", ADD, "the residual input is float"),
        (two_scales, "q", "blocks", "one Q for all readers", "different scales"),
    ],
)
def test_rules(make: Callable[[Graph], None], site: str, verdict: str, fusion: str, reason: str) -> None:
    findings = [each for each in said(make, 20).of(site) if (each.verdict, each.fusion) == (verdict, fusion)]
    assert len(findings) == 1, said(make, 20).to_text()
    assert reason in findings[0].reason
    assert findings[0].remedy or verdict == "enables"


def test_scales_along_what_is_summed_over() -> None:
    findings = said(lambda g: g.end(g.op("MatMul", g.pair(g.input(), "x"), g.weight(axis=0))))
    assert [(each.verdict, each.remedy) for each in findings.of("w")] == [("blocks", "axis: 0 in the weights' spec")]
    assert [each.verdict for each in findings.of("x")] == ["idle"]
    # Turned behind the DequantizeLinear, axis 0 is the outputs' axis, as PyTorch stores weights.
    turned = said(
        lambda g: g.end(g.op("MatMul", g.pair(g.input(), "x"), g.op("Transpose", g.weight(axis=0), perm=[1, 0])))
    )
    assert [each.verdict for each in turned.of("w")] == ["enables"]


def attended(**options: Any) -> Callable[[Graph], None]:
    return lambda g: attention(g, **options)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"head": 8}, "heads have 8 values; 16, 32 or 64 are taken"),
        ({"head": 128}, "heads have 128 values"),
        ({"tokens": 600}, "600 tokens; up to 512 are taken"),
        ({"scaled": True}, "scaled behind the first product"),
        ({"zeros": (S8, S8, ..., S8)}, "no Q/DQ behind the softmax and on the values"),
        ({"zeros": (..., ..., S8, S8)}, "no Q/DQ before the first product"),
        ({"output": False}, "no Q/DQ behind the second product"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_conditions_of_int8_fused_attention(options: dict[str, Any], reason: str) -> None:
    findings = [each for each in said(attended(**options)).with_verdict("blocks") if each.fusion == FUSED]
    assert len(findings) == 1
    assert reason in findings[0].reason
    assert set(findings[0].nodes) == {"scores", "context"}


@pytest.mark.parametrize("head", [16, 32, 64])
def test_attention_that_meets_them(head: int) -> None:
    findings = said(attended(head=head, tokens=512))
    assert not findings.with_verdict("blocks")
    for site in ("q_pair", "k_pair", "a", "v_pair"):
        assert [(each.verdict, each.fusion) for each in findings.of(site)] == [("enables", FUSED)]


def test_attention_without_pairs_is_a_matter_of_taste() -> None:
    findings = said(attended(zeros=(..., ..., ..., ...)))
    assert not findings.with_verdict("blocks")
    assert any(each.fusion == FUSED and "half precision" in each.reason for each in findings.with_verdict("note"))


def test_long_sequences_are_told() -> None:
    graph = Graph(19, np.float16)
    attended()(graph)
    model = graph.model()
    for key, value in (("target", "tensorrt"), ("config", '{"max_position_embeddings": 8192}')):
        model.metadata_props.append(onnx.StringStringEntryProto(key=f"qdq_surgery.{key}", value=value))
    notes = [each for each in lint(model).with_verdict("note") if each.fusion == FUSED]
    assert len(notes) == 1
    assert "up to 512 tokens, and the model takes 8192" in notes[0].reason


def test_whole_files() -> None:
    assert "opset 19 on" in next(each for each in said(gemm(), opset=18).with_verdict("blocks")).reason
    notes = {each.fusion: each for each in said(gemm(), kind=np.float32).with_verdict("note")}
    assert "precision='float16'" in notes["half precision"].remedy
    assert not said(gemm()).with_verdict("note")

    def with_qlinear(g: Graph) -> None:
        gemm()(g)
        integers = g.const(np.ones((8, 8), np.int8))
        grid = g.const(np.float16(1)), g.const(np.int8(0))
        g.op("QLinearMatMul", integers, *grid, integers, *grid, *grid, name="made_by_onnx_runtime")

    graph = Graph(21, np.float16)
    with_qlinear(graph)
    (found,) = [each for each in lint(graph.model(), "tensorrt").with_verdict("blocks") if each.fusion == "the model"]
    assert found.nodes == ("made_by_onnx_runtime",)


# --- half precision -----------------------------------------------------------------------------------------------


def tiny_bert() -> PreTrainedModel:
    return qs.convert(build("bert", "BertForSequenceClassification", num_hidden_layers=1), "tensorrt", inplace=True)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", COMPARED)
def test_half_precision_agrees_with_the_model_on_onnx_runtime(model_type: str) -> None:
    model, batch, made = _written(model_type, "tensorrt")
    assert made.parity is not None
    assert made.parity.agrees
    # The model given stays as it was.
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    # What half precision costs, against what quantization does to the same batch.
    with torch.no_grad():
        wanted = model(**batch).logits
        with qs.quantization_disabled(model):
            unrounded = model(**batch).logits
    session = onnxruntime.InferenceSession(made.path, providers=["CPUExecutionProvider"])
    found = torch.from_numpy(
        session.run(None, {each.name: batch[each.name].numpy() for each in session.get_inputs()})[0]
    )
    assert found.dtype == torch.float16
    assert torch.linalg.norm(found.float() - wanted) < torch.linalg.norm(unrounded - wanted)


@pytest.mark.slow
def test_ranges_of_zero_have_a_scale_above_zero(tmp_path: Path) -> None:
    model = tiny_bert()
    first = model.bert.encoder.layer[0]
    with torch.no_grad():
        first.attention.self.query.weight[3] = 0  # its scale is multiplied by the attention's factor, too
        first.attention.self.query.weight[4] *= 1e-7
        first.output.dense.weight[:] = 0
    qs.calibrate(model, [batch_for(model, (3, 12))])
    for precision in PRECISIONS:
        parity = precision == "float16"
        file = tmp_path / f"{precision}.onnx"
        export_onnx(model, file, target="tensorrt", precision=precision, parity=parity, dynamic=False)
        found = File(file, precision)
        smallest = min(float(array(node.inputs[1]).min()) for node in found.of("QuantizeLinear", "DequantizeLinear"))
        assert smallest > 0
        assert not [each for each in lint(found.path).with_verdict("blocks") if "scale" in each.reason]


def test_frequencies_of_rotary_positions_keep_their_precision() -> None:
    model = quantized("modernbert", "tensorrt")
    made = half_copy(model, {})
    kept = {name: value for name, value in made.named_buffers() if "inv_freq" in name}
    assert kept
    for name, value in kept.items():
        assert torch.equal(value, dict(model.named_buffers())[name])
    assert {value.dtype for value in made.parameters()} == {torch.float16}
    assert {value.dtype for value in model.parameters()} == {torch.float32}


def test_what_half_precision_cannot_hold_is_named(tmp_path: Path) -> None:
    model = tiny_bert()
    qs.calibrate(model, [batch_for(model, (3, 12))])
    name = "bert.encoder.layer.0.output.add_residual_input_quantizer"
    ranges = qs.quantizers(model)[name]
    assert ranges.amax is not None
    before = ranges.amax.clone()
    ranges.amax = before.index_fill(0, torch.tensor([3]), 70000.0)  # one channel
    with pytest.raises(ExportError, match=rf"ranges of the quantizers {name} exceed 65504.*precision='float32'"):
        export_onnx(model, tmp_path / "m.onnx", target="tensorrt", precision="float16", parity=False)
    ranges.amax = before
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e5
    with pytest.raises(ExportError, match=r"weights classifier\.weight exceed 65504"):
        export_onnx(model, tmp_path / "m.onnx", target="tensorrt", precision="float16", parity=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_float_inputs_become_half(tmp_path: Path) -> None:
    model = tiny_bert()
    batch: dict[str, Tensor] = batch_for(model, (2, 9), embeds=True)
    qs.calibrate(model, [batch])
    export_onnx(model, tmp_path / "m.onnx", batch, "tensorrt", precision="float16", parity=False, dynamic=False)
    inputs = {value.name: value.dtype for value in File(tmp_path / "m.onnx", "float16").model.graph.inputs}
    assert inputs == {"inputs_embeds": ir.DataType.FLOAT16, "attention_mask": ir.DataType.INT64}


# --- the script for a machine that has TensorRT -------------------------------------------------------------------

SCRIPT = SCRIPTS / "benchmark_tensorrt.sh"


def shell(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = f"{folder}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        cwd=folder,
        env={"PATH": path, "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_the_script_is_bash() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True, timeout=60)
    assert os.access(SCRIPT, os.X_OK)


def test_the_script_prints_its_commands(tmp_path: Path) -> None:
    done = shell("--dry-run", "--shapes", "1x128 8x64", "--model", "my model", "--output", "out", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())
    first, *builds, last = done.stdout.splitlines()
    model = rf"{tmp_path}/my\ model"
    assert first.split("files ")[1].strip() == f"{tmp_path}/out --shapes 1x128 8x64 --model {model}"
    assert last.split("report ")[1].strip() == f"{tmp_path}/out --shapes 1x128 8x64"
    assert len(builds) == 2 * (1 + len(benchmark_tensorrt.RULES))
    for shape in ("1x128", "8x64"):
        for file in (benchmark_tensorrt.FLOAT, *benchmark_tensorrt.RULES):
            (command,) = [line for line in builds if f"/{file}.onnx " in line and f".{shape}.times.json" in line]
            words = shlex.split(command)
            assert words[0].endswith("trtexec")
            assert f"--onnx={tmp_path}/out/{file}.onnx" in words
            assert {"--stronglyTyped", "--profilingVerbosity=detailed"} <= set(words)
            assert f"--exportLayerInfo={tmp_path}/out/{file}.{shape}.layers.json" in words
            for option in ("--minShapes", "--optShapes", "--maxShapes"):
                assert f"{option}=input_ids:{shape},attention_mask:{shape}" in words
            # TensorRT 11 has no flags of precision any more.
            assert not {"--int8", "--fp16", "--best"} & set(words)


@pytest.mark.parametrize(
    ("arguments", "environment", "code", "message"),
    [
        ((), {}, 1, "trtexec is not here. It comes with TensorRT"),
        ((), {"TRTEXEC": "/nowhere/trtexec"}, 1, "trtexec is not here (/nowhere/trtexec)"),
        (("--shapes", "8"), {}, 2, "'8' is no shape; write batch and tokens, such as 8x128"),
        (("--shapes",), {}, 2, "--shapes needs a value"),
        (("--texts", "t.txt"), {}, 2, "--texts needs --model"),
        (("--fast",), {}, 2, "unknown option --fast"),
    ],
)
@pytest.mark.skipif(Path("/usr/src/tensorrt/bin/trtexec").exists(), reason="here is a trtexec")
def test_the_script_says_what_is_wrong(
    arguments: tuple[str, ...], environment: dict[str, str], code: int, message: str, tmp_path: Path
) -> None:
    done = shell(*arguments, folder=tmp_path, **environment)
    assert done.returncode == code
    assert message in done.stderr
    assert not done.stdout


def test_the_script_explains_itself(tmp_path: Path) -> None:
    done = shell("--help", folder=tmp_path)
    assert done.returncode == 0
    assert "TensorRT 10.8 or later" in done.stdout
    assert "set -euo" not in done.stdout


@pytest.mark.slow
def test_files_and_report(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert benchmark_tensorrt.RULES == ("tensorrt", "tensorrt-both", "tensorrt-none")
    monkeypatch.setattr(benchmark_tensorrt, "RULES", benchmark_tensorrt.RULES[:1])  # the others are traced like it
    texts = ["the cat sat on the mat", "a dog ran to the bird"]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    output = str(tmp_path / "out")
    more = ["--model", str(save_tiny_bert(tmp_path / "model", texts)), "--texts", str(tmp_path / "texts.txt")]
    benchmark_tensorrt.main(["files", output, "--shapes", "1x8", "2x16", *more])
    made = capsys.readouterr().out
    names = [benchmark_tensorrt.FLOAT, *benchmark_tensorrt.RULES]
    for name in names:
        file = File(tmp_path / "out" / f"{name}.onnx", "float16")
        assert {value.name for value in file.model.graph.inputs} == {"input_ids", "attention_mask"}
        assert {value.dtype for value in file.model.graph.outputs} == {ir.DataType.FLOAT16}
        assert bool(file.of("QuantizeLinear")) == (name != benchmark_tensorrt.FLOAT)
    assert "INT8 fused attention: all of its conditions hold" in made
    ids = np.fromfile(tmp_path / "out" / "input_ids.2x16.bin", np.int64)
    assert ids.shape == (32,)
    assert 0 <= ids.min() <= ids.max() < 60 * 10

    # What trtexec would have written: all engines but that of a further file.
    monkeypatch.setattr(benchmark_tensorrt, "RULES", ("tensorrt", "tensorrt-both"))
    for at, name in enumerate(names):
        times = [{"computeMs": value / (at + 1)} for value in (3.0, 2.0, 9.0)]
        for shape in ("1x8", "2x16"):
            (tmp_path / "out" / f"{name}.{shape}.times.json").write_text(json.dumps(times))
    nodes = [node.name or "" for node in File(tmp_path / "out" / "tensorrt.onnx", "float16").of("MatMul", "Gemm")]
    layers = [
        {
            "Name": node,
            "LayerType": "gemm",
            "Inputs": [{"Name": "x", "Format/Datatype": "Int8"}],
            "Outputs": [{"Name": "y", "Format/Datatype": "Half"}],
            "TacticName": "sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize128x128x64",
            "Metadata": f"[ONNX Layer: {node}]",
        }
        for node in nodes
    ]
    (tmp_path / "out" / "tensorrt.2x16.layers.json").write_text(json.dumps({"Layers": layers}))
    benchmark_tensorrt.main(["report", output, "--shapes", "1x8", "2x16"])
    said = capsys.readouterr().out
    assert "3.000 (1.00 x)" in said
    assert "1.500 (2.00 x)" in said
    assert "not built" in said
    receipt = json.loads((tmp_path / "out" / "tensorrt.2x16.receipt.json").read_text())
    assert receipt["runtime"] == "tensorrt"
    assert not (tmp_path / "out" / "tensorrt.1x8.receipt.json").exists()
