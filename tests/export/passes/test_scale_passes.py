"""Scales per channel in a file: where the products stand, that they cost nothing where they need not, and are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

ir = pytest.importorskip("onnx_ir")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from architectures import WIDTHS, build  # noqa: E402
from exported import calibrated as calibrated_once  # noqa: E402
from exported import compute, encoder_decoder, graph, inputs_for, operators  # noqa: E402

import qdq_surgery as qs  # noqa: E402
from qdq_surgery.export.passes.fold_channel_scales import fold_channel_scales  # noqa: E402
from qdq_surgery.export.passes.keep_scales_apart import keep_scales_apart  # noqa: E402
from qdq_surgery.export.passes.widen_embedding_factor import widen_embedding_factors  # noqa: E402
from qdq_surgery.onnx_file.metadata import Site  # noqa: E402
from qdq_surgery.onnx_graph.qdq_pairs import Pair  # noqa: E402

RANDOM = np.random.default_rng(0)
X = RANDOM.normal(size=(2, 3, 8)).astype(np.float32)
GAMMA, BETA, BY = (RANDOM.normal(size=8).astype(np.float32) for _ in range(3))

NORM = """
norm (float[b,s,8] x) => (float[b,s,8] y) {
  n = LayerNormalization<axis = -1>(x, gamma, beta)
  d = Mul(n, by)
  y = Relu(d)
}"""

#: As NORM, but something else reads what the LayerNorm gives.
READ_TWICE = NORM.replace("y = Relu(d)", "r = Relu(d)\n  y = Add(r, n)")

LINEAR = """
linear (float[b,s,8] x) => (float[b,s,8] y) {
  m = Add(x, beta)
  d = Mul(m, by)
  r = Relu(d)
  y = Add(r, m)
}"""


def divided(text: str) -> Any:
    """The graph, with its product under the name that lowering gives it."""
    model = graph(text, gamma=GAMMA, beta=BETA, by=BY)
    for node in model.graph:
        if node.op_type == "Mul":
            node.name = "m.0._input_quantizer/divided"
    return model


def test_a_product_moves_into_the_norm_in_front_of_it() -> None:
    model = divided(NORM)
    before = compute(model, x=X)
    assert fold_channel_scales(model.graph, ()) == 1
    assert operators(model.graph) == ["LayerNormalization", "Relu"]
    # The factors are rounded once more.
    np.testing.assert_allclose(compute(model, x=X)[0], before[0], rtol=1e-5, atol=1e-6)


def test_a_norm_that_something_else_reads_stays() -> None:
    model = divided(READ_TWICE)
    assert fold_channel_scales(model.graph, ()) == 0
    assert operators(model.graph) == ["LayerNormalization", "Mul", "Relu", "Add"]


WEIGHT = """
product (float[b,s,8] x) => (float[b,s,6] y) {
  w = DequantizeLinear<axis = 1>(integers, steps)
  p = MatMul(x, w)
  m = Add(ORDER)
  d = Mul(m, by)
  y = Relu(d)
}"""


def linear_in_front(text: str, steps: int = 6, kind: type[np.floating] = np.float32) -> tuple[Any, tuple[Pair, ...]]:
    """The graph of a linear with 8 inputs and 6 outputs, and the pair of its weight."""
    given = {"steps": RANDOM.uniform(0.01, 0.1, size=steps), "bias": RANDOM.normal(size=6), "by": np.abs(BY[:6])}
    integers = RANDOM.integers(-127, 127, size=(8, 6), dtype=np.int8)
    model = graph(text, integers=integers, **{name: each.astype(kind) for name, each in given.items()})
    for node in model.graph:
        if node.op_type == "Mul":
            node.name = "add@2/divided"
    weights = [each for each in model.graph if each.op_type == "DequantizeLinear"]
    return model, tuple(Pair(Site(["w"], "weight", None, "w", "w"), each) for each in weights)


@pytest.mark.parametrize("text", [WEIGHT.replace("ORDER", "p, bias"), WEIGHT.replace("ORDER", "bias, p")])
def test_a_product_moves_into_the_linear_in_front_of_it(text: str) -> None:
    model, pairs = linear_in_front(text)
    before = compute(model, x=X)
    integers = model.graph.initializers["integers"]
    assert fold_channel_scales(model.graph, pairs) == 1
    assert operators(model.graph) == ["DequantizeLinear", "MatMul", "Add", "Relu"]
    assert pairs[0].dequantize.inputs[0] is integers
    assert pairs[0].site.divided == "add"
    # The factors are rounded once more.
    np.testing.assert_allclose(compute(model, x=X)[0], before[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("y = Relu(d)", "r = Relu(d)\n  y = Add(r, m)"),
        ("y = Relu(d)", "r = Relu(d)\n  y = Add(r, p)"),
        ("p = MatMul(x, w)", "p = MatMul(x, w)\n  q = MatMul(x, w)"),
        ("w = DequantizeLinear<axis = 1>(integers, steps)", "w = Cast<to = 1>(integers)"),
        ("p = MatMul(x, w)", "p_ = MatMul(x, w)\n  p = Relu(p_)"),
    ],
)
def test_a_linear_that_something_else_reads_or_whose_weight_is_float_stays(old: str, new: str) -> None:
    model, pairs = linear_in_front(WEIGHT.replace("ORDER", "p, bias").replace(old, new))
    assert fold_channel_scales(model.graph, pairs) == 0
    assert "Mul" in operators(model.graph)


@pytest.mark.parametrize(("smallest", "folded"), [(0.5, 1), (2e-4, 0)])
def test_steps_that_half_precision_cannot_hold_stay(smallest: float, folded: int) -> None:
    model, pairs = linear_in_front(WEIGHT.replace("ORDER", "p, bias"), kind=np.float16)
    by = np.array([1, 1, 1, 1, 1, smallest], np.float16)
    model.graph.initializers["by"].const_value = ir.tensor(by, name="by")
    assert fold_channel_scales(model.graph, pairs) == folded
    assert pairs[0].site.divided == ("add" if folded else None)


def test_one_step_for_a_whole_weight_stays_one() -> None:
    model, pairs = linear_in_front(WEIGHT.replace("ORDER", "p, bias").replace("<axis = 1>", ""), steps=1)
    assert fold_channel_scales(model.graph, pairs) == 0


@pytest.mark.slow
def test_a_table_of_positions_has_scales_too(tmp_path: Path) -> None:
    """The linear that projects DeBERTa's table of positions has a constant in front of it, with outlier channels."""
    qmodel = calibrated_once("deberta-v2", rules="onnxruntime", **WIDTHS["deberta-v2"])
    inputs = qs.quantizers(qmodel)["encoder.layer.0.attention.self.pos_key_proj._input_quantizer"]
    assert inputs.channel_scale is not None
    assert bool((inputs.channel_scale > 1).any())
    certificate = qs.export_onnx(qmodel, tmp_path / "model.onnx").parity
    assert certificate is not None
    assert certificate.agrees


def test_another_product_stays() -> None:
    model = graph(NORM, gamma=GAMMA, beta=BETA, by=BY)
    assert fold_channel_scales(model.graph, ()) == keep_scales_apart(model.graph) == 0


def test_a_clip_that_cuts_nothing_off() -> None:
    model = divided(LINEAR)
    before = compute(model, x=X)
    assert keep_scales_apart(model.graph) == 1
    model.graph.sort()
    assert operators(model.graph) == ["Add", "Clip", "Mul", "Relu", "Add"]
    np.testing.assert_array_equal(compute(model, x=X)[0], before[0])


@pytest.mark.parametrize("text", [NORM, READ_TWICE, LINEAR.replace("y = Add(r, m)", "y = Relu(r)")])
def test_no_clip_where_none_is_needed(text: str) -> None:
    assert keep_scales_apart(divided(text).graph) == 0


LOOKUP = """
lookup (int64[b,s] ids) => (float[b,s,8] y) {
  e = Gather(table, ids)
  m = Mul(ORDER)
  y = Add(m, m)
}"""


@pytest.mark.parametrize("order", ["e, factor", "factor, e"])
def test_the_factor_of_an_embedding_becomes_a_vector(order: str) -> None:
    table, ids = RANDOM.normal(size=(9, 8)).astype(np.float32), np.array([[1, 8, 3]])
    model = graph(LOOKUP.replace("ORDER", order), table=table, factor=np.float32(5.7))
    before = compute(model, ids=ids)
    assert widen_embedding_factors(model.graph) == 1
    assert model.graph.initializers["factor/8"].const_value.shape == (8,)
    np.testing.assert_array_equal(compute(model, ids=ids)[0], before[0])
    assert widen_embedding_factors(model.graph) == 0


def test_a_number_behind_anything_else_stays() -> None:
    text = "scaled (float[b,s,8] x) => (float[b,s,8] y) {\n  m = Mul(x, factor)\n  y = Add(m, m)\n}"
    assert widen_embedding_factors(graph(text, factor=np.float32(2)).graph) == 0


# Whole files ---------------------------------------------------------------------------------------------------------


def calibrated(
    model_type: str = "bert", head: str = "", rules: str = "qdqbert-scaled", **sizes: Any
) -> PreTrainedModel:
    """A model with an outlier channel in front of each activation that may have scales.

    Its ranges say so, which no trace holds: so that it is traced as other tests' models are.
    """
    qmodel = calibrated_once(model_type, head, rules, **sizes)
    for each in qs.quantizers(qmodel).values():
        if each.scaled:
            assert each.amax is not None
            wide = each.amax.clone()
            wide[..., 3] *= 40.0
            each.amax = wide
    qs.recalibrate_weights(qmodel)
    return qmodel


def products(path: Path) -> list[str]:
    """Which site each product with scales belongs to, and on which side of the pair it stands."""
    model = onnx.load(str(path))
    return sorted(
        each.name.removesuffix("/scale")
        for each in model.graph.initializer
        if each.name.endswith(("/divided/scale", "/multiplied/scale"))
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_full_recipe_divides_in_its_norms(target: str, tmp_path: Path) -> None:
    pytest.importorskip(target)
    qmodel = calibrated(num_hidden_layers=1)
    file = qs.export_onnx(qmodel, tmp_path / "m.onnx", target=target)
    assert file.parity is not None
    assert file.parity.agrees
    layer = "encoder.layer.0."
    left = [name for name in products(tmp_path / "m.onnx") if name.endswith("/divided")]
    # Everything else comes from a LayerNorm, whose readers are all quantized alike, or from a linear; this from a GELU.
    assert left == [f"{layer}output.dense._input_quantizer/divided"]
    assert qs.receipt(tmp_path / "m.onnx", target).linear == 1.0


@pytest.mark.slow
def test_a_file_in_half_precision(tmp_path: Path) -> None:
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2}  # as in tests/targets/test_tensorrt.py
    qmodel = calibrated("bert", "BertForSequenceClassification", "tensorrt", **sizes)
    file = qs.export_onnx(qmodel, tmp_path / "m.onnx", target="tensorrt", precision="float16")
    assert file.parity is not None
    assert file.parity.agrees
    kinds = {each.data_type for each in onnx.load(str(file.path)).graph.initializer if "ided/scale" in each.name}
    assert kinds == {onnx.TensorProto.FLOAT16}


@pytest.mark.slow
def test_an_outlier_of_the_bias_in_half_precision(tmp_path: Path) -> None:
    """Its row of the weight has small steps, which divided by its scale would be 0 in half precision."""
    model = build("bert", "BertModel", num_hidden_layers=1)
    dense = model.encoder.layer[0].output.dense
    with torch.no_grad():
        dense.weight[3] *= 0.1
        dense.bias[3] = 50.0
    qmodel = qs.convert(model, "tensorrt-both")
    qs.calibrate(qmodel, [inputs_for(qmodel, (4, 12))])
    file = qs.export_onnx(qmodel, tmp_path / "m.onnx", target="tensorrt", precision="float16", dynamic=False)
    assert file.parity is not None
    assert file.parity.agrees


#: Where an operand comes from something else than in BERT, or something else reads that. Those with a size in WIDTHS
#: have a file with open shapes, traced for tests/test_onnx_export.py.
OUTLIERS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("qdqbert-scaled", {"num_hidden_layers": 1}),
    "albert": ("openvino", WIDTHS["albert"]),
    "mobilebert": ("openvino", WIDTHS["mobilebert"]),
    "deberta-v2": ("openvino", WIDTHS["deberta-v2"]),
    "roberta-prelayernorm": ("qdqbert-scaled", {"num_hidden_layers": 1}),
    "modernbert": ("openvino", WIDTHS["modernbert"]),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", OUTLIERS)
def test_outliers_of_every_architecture_on_openvino(model_type: str, tmp_path: Path) -> None:
    """Whatever an operand comes from, and whatever else reads that: the certificate compares every site."""
    pytest.importorskip("openvino")
    rules, sizes = OUTLIERS[model_type]
    qmodel = calibrated(model_type, rules=rules, **sizes)
    scales = [each.channel_scale for each in qs.quantizers(qmodel).values() if each.scaled]
    assert sum(scale is not None and float(scale.max()) > 1.0 for scale in scales) >= 4
    dynamic = model_type in WIDTHS
    file = qs.export_onnx(qmodel, tmp_path / "m.onnx", target="openvino", dynamic=dynamic)
    assert file.parity is not None
    assert file.parity.agrees


@pytest.mark.slow
def test_openvino_keeps_the_scales_behind_a_projection(tmp_path: Path) -> None:
    """ELECTRA's, which its first layer and that layer's residual add read."""
    pytest.importorskip("openvino")
    qmodel = calibrated("electra", rules="openvino", num_hidden_layers=1)
    scale = qs.quantizers(qmodel)["encoder.layer.0.attention.self.query._input_quantizer"].channel_scale
    assert scale is not None
    assert float(scale.max()) > 4.0
    file = qs.export_onnx(qmodel, tmp_path / "m.onnx", target="openvino", dynamic=False)
    assert file.parity is not None
    assert file.parity.agrees
    assert "Clip" in {node.op_type for node in onnx.load(str(file.path)).graph.node}


@pytest.mark.slow
def test_where_nothing_is_scaled_nothing_is_multiplied(tmp_path: Path) -> None:
    qmodel = calibrated_once(rules="qdqbert-scaled", num_hidden_layers=1)
    for quantizer in qs.quantizers(qmodel).values():
        if quantizer.scaled:
            assert quantizer.amax is not None
            quantizer.amax = torch.full_like(quantizer.amax, 2.0)
    qs.recalibrate_weights(qmodel)
    qs.export_onnx(qmodel, tmp_path / "m.onnx", target="onnxruntime")
    assert not products(tmp_path / "m.onnx")


@pytest.mark.slow
def test_openvino_takes_a_model_with_scaled_embeddings(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    qmodel, batch = encoder_decoder()
    file = qs.export_onnx(qmodel, tmp_path / "model.onnx", batch, "openvino")
    assert file.parity is not None
    assert file.parity.agrees
