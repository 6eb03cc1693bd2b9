"""The placement linter: its rules on small graphs, held against what ONNX Runtime and OpenVINO make of them."""

from __future__ import annotations

import json
import platform
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import WIDTHS

import qdq_surgery as qs
from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_export import export_onnx
from qdq_surgery.onnx_graph.findings import Finding, Findings
from qdq_surgery.prove.lint import lint

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
openvino = pytest.importorskip("openvino")

from exported import calibrated  # noqa: E402
from graphs import S8, U8, Graph, attention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

on_x86 = pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="kernels of x86")

#: Fusions of ONNX Runtime that end in a node of the same name.
INTEGER_OPS = ("MatMulIntegerToFloat", "QGemm")


def said(findings: Findings, site: str) -> set[tuple[str, str]]:
    return {(finding.verdict, finding.fusion) for finding in findings.of(site)}


def one(findings: Findings, site: str, verdict: str) -> Finding:
    found = [finding for finding in findings.of(site) if finding.verdict == verdict]
    assert len(found) == 1, found
    return found[0]


# --- ONNX Runtime -------------------------------------------------------------------------------------------------


def plain(g: Graph) -> None:
    g.end(g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.weight()))


def output_of_the_model(g: Graph) -> None:
    g.output(g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.weight()))


def weight_dequantized_then_turned(g: Graph) -> None:
    g.end(g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.op("Transpose", g.weight(axis=0), perm=[1, 0])))


def weight_turned_then_dequantized(g: Graph) -> None:
    g.end(g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.weight(turned=True)))


def weight_times_two(g: Graph) -> None:
    g.end(g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.op("Mul", g.weight(), g.const(np.float32(2)))))


def activation_halved(g: Graph) -> None:
    g.end(g.op("MatMul", g.op("Mul", g.pair(g.input(), "x", zero=U8), g.const(np.float32(0.5))), g.weight()))


def activation_moved(g: Graph) -> None:
    moved = g.op("Transpose", g.pair(g.input(shape=("b", 8, 4)), "x", zero=U8), perm=[0, 2, 1])
    g.end(g.op("MatMul", moved, g.weight()))


def activation_gathered(g: Graph) -> None:
    taken = g.op("Gather", g.pair(g.input(), "x", zero=U8), g.const(np.array([0, 1])), axis=1)
    g.end(g.op("MatMul", taken, g.weight()))


def activation_alone(g: Graph) -> None:
    g.end(g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.ones(8, 8)))


def weight_alone(g: Graph) -> None:
    g.end(g.op("MatMul", g.input("y"), g.weight("x")))


def shared_by_two(g: Graph, zero: Any = U8) -> None:
    x = g.pair(g.input(), "x", zero=zero)
    g.end(g.op("Add", g.op("MatMul", x, g.weight("w")), g.op("MatMul", x, g.weight("v"))))


def signed(g: Graph) -> None:
    g.end(g.op("MatMul", g.pair(g.input(), "x"), g.weight()))


def signed_and_shared(g: Graph) -> None:
    shared_by_two(g, S8)


def signed_and_stored(g: Graph) -> None:
    stored = g.const(np.arange(32, dtype=np.int8).reshape(1, 4, 8))
    x = g.op("DequantizeLinear", stored, g.const(np.float32(0.02)), g.const(S8), name="x")
    g.end(g.op("Add", g.op("MatMul", x, g.weight()), g.input("y")))


def without_zero_point(g: Graph) -> None:
    g.end(g.op("MatMul", g.pair(g.input(), "x", zero=None), g.weight()))


def quantized_behind(g: Graph) -> None:
    g.end(g.pair(g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.weight()), "y", zero=U8))


def quantized_behind_a_transpose(g: Graph) -> None:
    product = g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.weight())
    g.end(g.pair(g.op("Transpose", product, perm=[0, 2, 1]), "y", zero=U8))


def quantized_behind_the_bias(g: Graph) -> None:
    product = g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.weight())
    g.end(g.pair(g.op("Add", product, g.ones(8)), "y", zero=U8))


def quantized_behind_and_read(g: Graph) -> None:
    product = g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.weight())
    g.end(g.op("Add", g.pair(product, "y", zero=U8), product))


def quantized_behind_and_returned(g: Graph) -> None:
    product = g.op("MatMul", g.pair(g.input(), "x", zero=U8), g.weight())
    g.output(product)
    g.end(g.pair(product, "y", zero=U8))


def products_of_activations(g: Graph) -> None:
    turned = g.op("Transpose", g.pair(g.input("y"), "k", zero=U8), perm=[0, 2, 1])
    g.end(g.op("MatMul", g.pair(g.input(), "x", zero=U8), turned))


def gemm(g: Graph, bias: str = "") -> None:
    g.end(g.op("Gemm", g.pair(g.input(shape=("b", 8)), "x", zero=U8), g.weight(), *([bias] if bias else [])))


def gemm_with_float_bias(g: Graph) -> None:
    gemm(g, g.ones(8))


def gemm_with_int32_bias(g: Graph) -> None:
    parameters = [g.const(np.ones(8, np.int32)), g.const(np.full(8, 2e-4, np.float32)), g.const(np.zeros(8, np.int32))]
    gemm(g, g.op("DequantizeLinear", *parameters, name="bias", axis=0))


def einsum(g: Graph) -> None:
    g.end(g.op("Einsum", g.pair(g.input(), "x", zero=U8), g.weight(), equation="bik,kn->bin"))


def convolution(g: Graph) -> None:
    g.end(g.op("Conv", g.pair(g.input(shape=("b", 8, 4)), "x", zero=U8), g.weight(shape=(8, 8, 1), axis=0)))


def add(g: Graph) -> None:
    g.end(g.op("Add", g.pair(g.input(), "x", zero=U8), g.pair(g.input("y"), "y", zero=U8)))


def add_with_one(g: Graph) -> None:
    total = g.op("Add", g.pair(g.input(), "x", zero=U8), g.input("y"))
    g.end(g.pair(total, "z", zero=U8))


def add_quantized_behind(g: Graph, kind: str = "Add") -> None:
    total = g.op(kind, g.pair(g.input(), "x", zero=U8), g.pair(g.input("y"), "y", zero=U8))
    g.end(g.pair(total, "z", zero=U8))


def sum_quantized_behind(g: Graph) -> None:
    add_quantized_behind(g, "Sum")


def residual_add(g: Graph) -> None:
    x = g.pair(g.input(), "x", zero=U8)
    local = g.op("Add", g.op("MatMul", x, g.weight()), g.ones(8))
    total = g.op("Add", g.pair(local, "local", zero=U8), g.pair(g.input("y"), "y", zero=U8))
    g.end(g.op("LayerNormalization", total, g.ones(8), g.ones(8)))


def softmax(g: Graph) -> None:
    g.end(g.op("Softmax", g.pair(g.input(), "x", zero=U8)))


def gelu(g: Graph) -> None:
    g.end(g.op("Gelu", g.pair(g.input(), "x", zero=U8)))


def embedding(g: Graph) -> None:
    g.end(g.op("Gather", g.weight("x", (20, 8), axis=0), g.input("i", ("b", 4), integers=True)))


def passed_on(g: Graph, scale: float = 0.02) -> None:
    moved = g.op("Transpose", g.pair(g.input(), "x", zero=U8), perm=[0, 2, 1])
    g.end(g.pair(moved, "y", scale, zero=U8))


def passed_on_with_another_scale(g: Graph) -> None:
    passed_on(g, 0.03)


TO_FLOAT, Q_LINEAR = "MatMulIntegerToFloat", "QLinearMatMul"

ON_ONNX_RUNTIME: list[tuple[Callable[[Graph], None], set[tuple[str, str]], str]] = [
    (plain, {("enables", TO_FLOAT)}, "both of its inputs come straight from a DequantizeLinear"),
    (output_of_the_model, {("enables", TO_FLOAT)}, ""),
    (weight_dequantized_then_turned, {("enables", TO_FLOAT)}, ""),
    (weight_turned_then_dequantized, {("enables", TO_FLOAT)}, ""),
    (weight_times_two, {("blocks", TO_FLOAT)}, "a Mul stands between its second input and the DequantizeLinear"),
    (activation_halved, {("idle", "QLinearMul")}, "another input of the Mul"),
    (activation_moved, {("enables", TO_FLOAT)}, ""),
    (activation_gathered, {("idle", "nothing")}, "read by Gather"),
    (activation_alone, {("blocks", TO_FLOAT)}, "its second input comes from no DequantizeLinear"),
    (weight_alone, {("blocks", TO_FLOAT)}, "MatMulNBits"),
    (shared_by_two, {("enables", TO_FLOAT)}, ""),
    (without_zero_point, {("enables", TO_FLOAT)}, ""),  # left out, it is uint8
    (quantized_behind, {("enables", Q_LINEAR)}, "and its output is quantized"),
    (quantized_behind_a_transpose, {("enables", Q_LINEAR)}, ""),
    (quantized_behind_the_bias, {("enables", TO_FLOAT)}, ""),
    (quantized_behind_and_read, {("idle", Q_LINEAR)}, "others read it, too"),
    (quantized_behind_and_returned, {("idle", Q_LINEAR)}, "it is an output of the model, too"),
    (products_of_activations, {("enables", TO_FLOAT)}, ""),
    (gemm, {("enables", "QGemm")}, ""),
    (gemm_with_float_bias, {("blocks", "QGemm")}, "bias of the Gemm is float"),
    (gemm_with_int32_bias, {("enables", "QGemm")}, ""),
    (einsum, {("blocks", "integer GEMM")}, "Einsum has no integer kernel"),
    (convolution, {("blocks", "QLinearConv")}, "needs a Q behind"),
    (add, {("idle", "QLinearAdd")}, "the output of the Add is not quantized"),
    (add_with_one, {("idle", "QLinearAdd")}, "another input of the Add"),
    (add_quantized_behind, {("enables", "QLinearAdd")}, ""),
    (sum_quantized_behind, {("idle", "nothing")}, "read by Sum"),
    (residual_add, {("enables", TO_FLOAT)}, ""),
    (softmax, {("idle", "QLinearSoftmax")}, ""),
    (gelu, {("idle", "nothing")}, "read by Gelu"),
    (embedding, {("idle", "nothing")}, "read by Gather"),
    (passed_on, {("enables", "integers passed on")}, ""),
    (passed_on_with_another_scale, {("idle", "integers passed on")}, "another scale"),
]

ON_X86: list[tuple[Callable[[Graph], None], set[tuple[str, str]], str]] = [
    (signed, {("enables", TO_FLOAT)}, ""),
    (signed_and_shared, {("blocks", TO_FLOAT)}, "only where one node reads the pair, and 2 do"),
    (signed_and_stored, {("blocks", TO_FLOAT)}, "stored as int8"),
]


def name_of(case: Any) -> str:
    return case.__name__ if callable(case) else ""


@pytest.mark.parametrize(("make", "verdicts", "reason"), ON_ONNX_RUNTIME, ids=name_of)
def test_rules_of_onnx_runtime(make: Callable[[Graph], None], verdicts: set[tuple[str, str]], reason: str) -> None:
    graph = Graph()
    make(graph)
    findings = lint(graph.model(), "onnxruntime")
    assert said(findings, "x") == verdicts
    assert any(reason in finding.reason for finding in findings.of("x"))
    assert all(finding.remedy for finding in findings.with_verdict("blocks"))


@on_x86
@pytest.mark.parametrize(("make", "verdicts", "reason"), ON_X86, ids=name_of)
def test_rules_of_onnx_runtime_on_x86(
    make: Callable[[Graph], None], verdicts: set[tuple[str, str]], reason: str
) -> None:
    test_rules_of_onnx_runtime(make, verdicts, reason)


@on_x86
@pytest.mark.parametrize("make", [case[0] for case in (*ON_ONNX_RUNTIME, *ON_X86)], ids=name_of)
def test_onnx_runtime_does_as_the_linter_says(make: Callable[[Graph], None], tmp_path: Path) -> None:
    graph = Graph()
    make(graph)
    assert fused_by_onnx_runtime(graph.model().SerializeToString(), tmp_path) == foretold(graph.model())


@pytest.mark.parametrize("kind", ["Add", "Mul", "Concat"])
def test_onnx_runtime_takes_elementwise_operators_between_pairs(kind: str, tmp_path: Path) -> None:
    graph = Graph()
    options = {"axis": 1} if kind == "Concat" else {}
    made = graph.op(
        kind, graph.pair(graph.input(), "x", zero=U8), graph.pair(graph.input("y"), "y", zero=U8), **options
    )
    graph.end(graph.pair(made, "z", zero=U8))
    assert said(lint(graph.model(), "onnxruntime"), "x") == {("enables", f"QLinear{kind}")}
    assert Counter(optimized(graph.model().SerializeToString(), tmp_path).values())[f"QLinear{kind}"] == 1


@pytest.mark.parametrize("kind", ["Softmax", "Sigmoid", "LeakyRelu"])
def test_onnx_runtime_takes_functions_between_pairs(kind: str, tmp_path: Path) -> None:
    graph = Graph()
    graph.end(graph.pair(graph.op(kind, graph.pair(graph.input(), "x", zero=U8)), "z", zero=U8))
    assert said(lint(graph.model(), "onnxruntime"), "x") == {("enables", f"QLinear{kind}")}
    assert Counter(optimized(graph.model().SerializeToString(), tmp_path).values())[f"QLinear{kind}"] == 1


@on_x86
def test_scales_along_the_rows_of_a_weight_give_wrong_values() -> None:
    """The reason for the rule: ONNX Runtime fuses it, and multiplies by the scales as if they were the columns'."""
    graph = Graph()
    scale = graph.const(np.linspace(0.1, 1, 8, dtype=np.float32))
    stored = graph.const(np.random.default_rng(0).integers(-127, 128, (8, 8)).astype(np.int8))
    weight = graph.op("DequantizeLinear", stored, scale, graph.const(np.zeros(8, np.int8)), name="w", axis=0)
    graph.output(graph.op("MatMul", graph.pair(graph.input(), "x", zero=U8), weight))
    findings = lint(graph.model(), "onnxruntime")
    assert "wrong values" in one(findings, "w", "blocks").reason
    assert one(findings, "x", "idle").reason.startswith("the site of its other input stands in the way")

    x = {"x": np.random.default_rng(1).standard_normal((2, 4, 8)).astype(np.float32)}
    results = []
    for level in ("ORT_DISABLE_ALL", "ORT_ENABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        session = onnxruntime.InferenceSession(
            graph.model().SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        results.append(session.run(None, x)[0])
    if np.allclose(*results):
        pytest.fail("ONNX Runtime computes this rightly now: let the rule go")


def test_scales_for_each_channel_of_an_activation_block() -> None:
    graph = Graph()
    x = graph.pair(graph.input(), "x", np.full(8, 0.02), U8, axis=2)
    graph.end(graph.op("MatMul", x, graph.weight()))
    assert one(lint(graph.model(), "onnxruntime"), "x", "blocks").remedy.startswith("axis: null for activations")


def test_residual_adds_are_only_work_on_onnx_runtime() -> None:
    graph = Graph()
    residual_add(graph)
    findings = lint(graph.model(), "onnxruntime")
    for site in ("local", "y"):
        assert said(findings, site) == {("idle", "QLinearAdd")}
        assert 'sites: "add_*"' in one(findings, site, "idle").remedy


def test_on_arm_signed_activations_are_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    graph = Graph()
    signed_and_shared(graph)
    assert said(lint(graph.model(), "onnxruntime"), "x") == {("enables", TO_FLOAT)}
    graph = Graph()
    graph.end(
        graph.op("MatMul", graph.pair(graph.input(), "x"), graph.pair(graph.input("y", ("b", 8, 4)), "y", zero=U8))
    )
    findings = lint(graph.model(), "onnxruntime")
    assert said(findings, "y") == {("blocks", TO_FLOAT)}
    assert said(findings, "x") == {("idle", TO_FLOAT)}


@on_x86
def test_what_holds_for_the_whole_file_on_onnx_runtime() -> None:
    graph = Graph()
    plain(graph)
    notes = {finding.fusion: finding for finding in lint(graph.model(), "onnxruntime").with_verdict("note")}
    assert set(notes) == {"uint8 times int8 on x86", "CUDA"}
    assert "x64quantprecision" in notes["uint8 times int8 on x86"].remedy
    graph = Graph()
    signed(graph)
    graph.end(graph.op("MatMul", graph.input("y"), graph.ones(8, 8), name="head"))
    notes = {finding.fusion: finding for finding in lint(graph.model(), "onnxruntime").with_verdict("note")}
    assert set(notes) == {"GEMMs without Q/DQ", "CUDA"}
    assert notes["GEMMs without Q/DQ"].nodes == ("head",)


def optimized(file: str | bytes, folder: Path) -> dict[str, str]:
    """Operators by node's name, of the graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return {node.name: node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node}


def fused_by_onnx_runtime(file: str | bytes, folder: Path) -> dict[str, str]:
    found = optimized(file, folder)
    return {name: kind for name, kind in found.items() if kind in INTEGER_OPS or kind.startswith("QLinear")}


def foretold(file: Any, target: str = "onnxruntime") -> dict[str, str]:
    enabled = lint(file, target).with_verdict("enables")
    return {node: each.fusion for each in enabled for node in each.nodes if each.fusion != "integers passed on"}


# --- OpenVINO -----------------------------------------------------------------------------------------------------

FULL, FUSED = "INT8 FullyConnected", "INT8 fused attention"


def linear(zero: Any = S8, **options: Any) -> Callable[[Graph], None]:
    def make(g: Graph) -> None:
        g.end(g.op("MatMul", g.pair(g.input(), "x", zero=zero), g.weight(**options)))

    return make


def linear_moved(g: Graph) -> None:
    g.end(g.op("MatMul", g.pair(g.input(), "x"), g.op("Transpose", g.weight(axis=0), perm=[1, 0])))


def linear_halved(g: Graph) -> None:
    g.end(g.op("MatMul", g.op("Mul", g.pair(g.input(), "x"), g.const(np.float32(0.5))), g.weight()))


def linear_without_weights(g: Graph) -> None:
    g.end(g.op("MatMul", g.pair(g.input(), "x"), g.ones(8, 8)))


def attended(**options: Any) -> Callable[[Graph], None]:
    return lambda g: attention(g, output=False, **options)


ON_OPENVINO: dict[str, tuple[Callable[[Graph], None], dict[str, set[tuple[str, str]]], str]] = {
    "linear": (linear(), {"x": {("enables", FULL)}, "w": {("enables", FULL)}}, ""),
    "unsigned": (linear(U8), {"x": {("enables", FULL)}}, "a zero point other than 0 is one more pass"),
    "turned, then dequantized": (
        linear(turned=True),
        {"w": {("blocks", FULL)}, "x": {("idle", FULL)}},
        "a Transpose stands between the stored integers and their DequantizeLinear",
    ),
    "dequantized, then turned": (linear_moved, {"x": {("enables", FULL)}, "w": {("enables", FULL)}}, ""),
    "a factor between": (linear_halved, {"x": {("enables", FULL)}}, ""),
    "float weights": (linear_without_weights, {"x": {("blocks", FULL)}}, "its second input"),
    "attention": (attended(), {"q_pair": {("enables", FUSED)}, "a": {("enables", FUSED)}}, ""),
    "attention, scaled": (attended(scaled=True), {"q_pair": {("enables", FUSED)}}, ""),
    "attention, unsigned queries": (
        attended(zeros=(U8, S8, S8, S8)),
        {"q_pair": {("blocks", FUSED)}, "v_pair": {("idle", FUSED)}},
        "the zero point of the queries is not 0",
    ),
    "attention, unsigned probabilities": (
        attended(zeros=(S8, S8, U8, S8)),
        {"a": {("blocks", FUSED)}, "q_pair": {("idle", FUSED)}},
        "the zero point of the probabilities is not 0",
    ),
    "attention, queries and keys": (
        attended(zeros=(S8, S8, ..., ...)),
        {"q_pair": {("enables", FUSED)}},
        "stays float",
    ),
    "attention, keys alone": (
        attended(zeros=(..., S8, S8, S8)),
        {"k_pair": {("blocks", FUSED)}, "v_pair": {("enables", FUSED)}},
        "the queries of the same product have no Q/DQ",
    ),
    "attention, masked by Where": (attended(between="Where"), {"q_pair": {("enables", FUSED)}}, ""),
    "attention, reshaped between": (
        attended(between="Reshape"),
        {"q_pair": {("enables", "INT8 MatMul")}},
        "a Reshape is between scores and softmax",
    ),
    "gelu": (gelu, {"x": {("idle", "nothing")}}, "computed in float"),
    "residual add": (residual_add, {"local": {("idle", "nothing")}}, "saves nothing"),
}


@pytest.mark.parametrize("case", ON_OPENVINO)
def test_rules_of_openvino(case: str) -> None:
    make, wanted, reason = ON_OPENVINO[case]
    graph = Graph()
    make(graph)
    findings = lint(graph.model(), "openvino")
    for site, verdicts in wanted.items():
        assert said(findings, site) == verdicts, site
    assert any(reason in finding.reason for finding in findings.of(next(iter(wanted))))
    assert all(finding.remedy for finding in findings.with_verdict("blocks"))


@on_x86
@pytest.mark.parametrize("case", [case for case in ON_OPENVINO if "attention" not in case and "residual" not in case])
def test_openvino_runs_the_linears_as_the_linter_says(case: str, tmp_path: Path) -> None:
    make, wanted, _ = ON_OPENVINO[case]
    graph = Graph()
    make(graph)
    onnx.save(graph.model(), tmp_path / "m.onnx")
    enabled = any(("enables", FULL) in verdicts for verdicts in wanted.values())
    assert layers_of_openvino(tmp_path / "m.onnx")["FullyConnected", True] == enabled


@on_x86
@pytest.mark.parametrize("case", [case for case in ON_OPENVINO if case.startswith("attention")])
def test_openvino_fuses_the_attention_as_the_linter_says(case: str, tmp_path: Path) -> None:
    make, _, _ = ON_OPENVINO[case]
    graph = Graph()
    make(graph)
    onnx.save(graph.model(), tmp_path / "m.onnx")
    layers = layers_of_openvino(tmp_path / "m.onnx")
    fused = FUSED in foretold(graph.model(), "openvino").values()
    if "unsigned queries" in case:
        # One product of two: the linter says that the whole has no use, OpenVINO keeps the second on integers.
        assert layers["FakeQuantize", False] > 0
    else:
        assert layers["Subgraph", True] == fused


def layers_of_openvino(path: Path) -> Counter[tuple[str, bool]]:
    """(type of layer, whether on integers), of the model as OpenVINO runs it."""
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(str(path)), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found: Counter[tuple[str, bool]] = Counter()
    for node in compiled.get_runtime_model().get_ordered_ops():
        about = node.get_rt_info()
        integers = about["runtimePrecision"].astype(str).lower() in ("i8", "u8")
        found[about["layerType"].astype(str), integers] += 1
    return found


# --- exported models ----------------------------------------------------------------------------------------------

#: A layer that runs twice, products of constants, queries, keys and values from one GEMM, and quantized residual adds.
#: By their rules and sizes they are those of tests/test_onnx_export.py, and traced there or here.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("onnxruntime", WIDTHS["albert"]),
    "deberta-v2": ("onnxruntime", WIDTHS["deberta-v2"]),
    "modernbert": ("onnxruntime", WIDTHS["modernbert"]),
    "bert": ("qdqbert", {"num_hidden_layers": 1}),
}


@pytest.mark.slow
@on_x86
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_exported_models_fuse_as_the_linter_says(model_type: str, tmp_path: Path) -> None:
    rules, sizes = ARCHITECTURES[model_type]
    model, path = calibrated(model_type, rules=rules, **sizes), tmp_path / "m.onnx"
    for activations in ("uint8", "int8"):
        export_onnx(model, path, activations=activations, parity=False, overwrite=True)
        assert fused_by_onnx_runtime(str(path), tmp_path) == foretold(path), activations
    export_onnx(model, path, target="openvino", parity=False, overwrite=True)
    layers, enabled = layers_of_openvino(path), Counter(foretold(path, "openvino").values())
    assert layers["FullyConnected", True] == enabled[FULL]
    assert layers["MatMul", True] == enabled["INT8 MatMul"]
    assert 2 * layers["Subgraph", True] == enabled[FUSED]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_shipped_rules_block_nothing_on_their_target(target: str, tmp_path: Path) -> None:
    model = calibrated("bert", "BertForQuestionAnswering", target, **WIDTHS["bert"])  # as in test_receipt.py
    export_onnx(model, tmp_path / "m.onnx", target=target, parity=False)
    findings = lint(tmp_path / "m.onnx")
    assert findings.target == target
    assert findings.model == "BertForQuestionAnswering"
    acting = {name for name, each in qs.quantizers(model).items() if each.enabled}
    assert {name for finding in findings.with_verdict("enables") for name in finding.sites} == acting
    assert not findings.with_verdict("idle")
    if target == "openvino" or platform.machine().lower() in ("x86_64", "amd64"):
        assert not findings.with_verdict("blocks")


# --- the report ---------------------------------------------------------------------------------------------------


def report() -> Findings:
    findings = [
        Finding(
            "blocks", "A", "reason [of 1]", "do.1.this", (f"m.layer.{at}.x", f"m.layer.{at}.y"), (f"m.layer.{at}/n",)
        )
        for at in range(12)
    ]
    return Findings("Model", "tensorrt", 24, (*findings, Finding("note", "B", "why")))


def test_text_counts_layers_and_fits_the_width() -> None:
    text = report().to_text(60)
    assert "12 x m.layer.*.x (and y)" in text
    assert "reason [of 1]" in text
    assert "-> do.*.this" in text
    assert "12 findings block a fusion" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 60
    assert "\x1b" not in text
    assert report().to_text(200).count("\n") == 5


def test_json_holds_everything() -> None:
    data = json.loads(json.dumps(report().to_json()))
    assert data["counts"] == {"blocks": 12, "idle": 0, "enables": 0, "note": 1}
    assert data["sites"] == 24
    assert data["findings"][0]["sites"] == ["m.layer.0.x", "m.layer.0.y"]
    assert {"verdict", "fusion", "reason", "remedy", "nodes"} < set(data["findings"][0])


def test_findings_of_a_quantizer_and_of_a_node() -> None:
    assert len(report().of("m.layer.3.y")) == 1
    assert len(report().of("m.layer.3/n")) == 1
    assert not report().of("m.layer.3")


def test_blocks_come_first() -> None:
    graph = Graph()
    x = graph.pair(graph.input(), "x", zero=U8)
    graph.end(graph.op("Add", graph.op("MatMul", x, graph.weight()), graph.op("MatMul", x, graph.ones(8, 8))))
    verdicts = [finding.verdict for finding in lint(graph.model(), "onnxruntime").findings]
    assert verdicts == sorted(verdicts, key=["blocks", "idle", "enables", "note"].index)
    assert verdicts[0] == "blocks"


def test_what_cannot_be_linted(tmp_path: Path) -> None:
    graph = Graph()
    plain(graph)
    with pytest.raises(ExportError, match="does not tell what it was exported for; give target="):
        lint(graph.model())
    with pytest.raises(ExportError, match="there is no target 'tflite'"):
        lint(graph.model(), "tflite")
    with pytest.raises(ExportError, match=r"there is no file .*nothing\.onnx"):
        lint(tmp_path / "nothing.onnx")
    (tmp_path / "text.onnx").write_text("no protobuf at all")
    with pytest.raises(ExportError, match="is no ONNX file"):
        lint(str(tmp_path / "text.onnx"), "onnxruntime")
