"""What QDQBERT's documentation told its users to do, word for word, on a converted model; and the exported graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for, build
from pytorch_quantization import nn as quant_nn

import qdq_surgery as qs

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)

#: The documentation's code, as it stood. What stood as ``...`` there is filled in, in EXPORT; the line that asked
#: transformers for the device is gone with the function (infer_device) that it imported.
DESCRIPTORS = """
>>> import pytorch_quantization.nn as quant_nn
>>> from pytorch_quantization.tensor_quant import QuantDescriptor

>>> # The default tensor quantizer is set to use Max calibration method
>>> input_desc = QuantDescriptor(num_bits=8, calib_method="max")
>>> # The default tensor quantizer is set to be per-channel quantization for weights
>>> weight_desc = QuantDescriptor(num_bits=8, axis=((0,)))
>>> quant_nn.QuantLinear.set_default_quant_desc_input(input_desc)
>>> quant_nn.QuantLinear.set_default_quant_desc_weight(weight_desc)
"""

CALIBRATION = """
>>> # Find the TensorQuantizer and enable calibration
>>> for name, module in model.named_modules():
...     if name.endswith("_input_quantizer"):
...         module.enable_calib()
...         module.disable_quant()  # Use full precision data to calibrate

>>> # Feeding data samples
>>> model(x)
>>> # ...

>>> # Finalize calibration
>>> for name, module in model.named_modules():
...     if name.endswith("_input_quantizer"):
...         module.load_calib_amax()
...         module.enable_quant()

>>> # If running on accelerator, it needs to call `.to(xx)` again because new tensors will be created by calibration process
>>> model.to(device)

>>> # Keep running the quantized model
>>> # ...
"""  # noqa: E501

EXPORT = """
>>> from pytorch_quantization.nn import TensorQuantizer

>>> TensorQuantizer.use_fb_fake_quant = True

>>> # Load the calibrated model
>>> model.load_state_dict(state)
>>> # ONNX export
>>> torch.onnx.export(model, (x,), path)
"""


def python(snippet: str) -> str:
    return "\n".join(line[4:] for line in snippet.splitlines() if line[:3] in (">>>", "..."))


@pytest.fixture
def native_switch() -> Iterator[None]:
    """pytorch-quantization's switch is global: put it back afterwards."""
    yield
    quant_nn.TensorQuantizer.use_fb_fake_quant = False


@pytest.mark.slow
@pytest.mark.usefixtures("default_descriptors", "native_switch")
def test_the_old_documentation_word_for_word(tmp_path: Path) -> None:
    scope: dict[str, Any] = {"torch": torch, "device": "cpu", "path": str(tmp_path / "model.onnx")}
    exec(python(DESCRIPTORS), scope)
    float_model = build("bert", "BertForSequenceClassification", num_hidden_layers=1)
    model = scope["model"] = qs.convert(float_model)
    x = scope["x"] = batch_for(model, (4, 8))["input_ids"]
    with torch.no_grad():
        exec(python(CALIBRATION), scope)
    inputs = [q for name, q in qs.quantizers(model).items() if name.endswith("_input_quantizer")]
    assert len(inputs) == 14
    assert all(quantizer.amax is not None for quantizer in inputs)
    scope["state"] = model.state_dict()
    scope["model"] = fresh = qs.convert(float_model)
    exec(python(EXPORT), scope)
    graph = onnx.load(scope["path"])
    counts = Counter(node.op_type for node in graph.graph.node)
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] > 0
    session = onnxruntime.InferenceSession(scope["path"], providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    with torch.no_grad():
        wanted = fresh(x).logits
    # Tiny random model; one step of its coarsest quantizer is larger than this.
    assert torch.allclose(torch.from_numpy(found), wanted, rtol=0, atol=1e-3)


def export(qmodel: torch.nn.Module, batch: dict[str, torch.Tensor], path: Path) -> Any:
    dynamic = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch}
    with torch.no_grad():
        torch.onnx.export(
            qmodel, (), path, kwargs=batch, dynamo=True, opset_version=19, dynamic_shapes=dynamic, verbose=False
        )
    return onnx.load(path)


def calibrate(qmodel: torch.nn.Module, batch: dict[str, torch.Tensor]) -> None:
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.enable_calib()
        quantizer.disable_quant()
    with torch.no_grad():
        qmodel(**batch)
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()


@pytest.mark.slow
def test_the_dynamo_exporter_with_dynamic_shapes(tmp_path: Path) -> None:
    qmodel = qs.convert(build("bert", "BertModel", num_hidden_layers=1))
    calibrate(qmodel, batch_for(qmodel, (4, 8)))
    graph = export(qmodel, batch_for(qmodel, (3, 9)), tmp_path / "model.onnx").graph
    by_output = {output: node for node in graph.node for output in node.output}
    quantize = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantize
    assert all(len(node.input) == 3 for node in quantize)  # explicit zero points
    # Every matrix product of the encoder has both operands straight from a DequantizeLinear, but for layout.
    for node in graph.node:
        if node.op_type == "MatMul":
            for name in node.input:
                source = by_output.get(name)
                while source is not None and source.op_type in ("Transpose", "Reshape", "Identity"):
                    source = by_output.get(source.input[0])
                # (The pooler's product is float by the recipe, and has a weight for an operand.)
                assert source is None or source.op_type in ("DequantizeLinear", "Gather")
    # The weights have one scale per channel.
    dequantize = [node for node in graph.node if node.op_type == "DequantizeLinear"]
    axes = Counter(each.i for node in dequantize for each in node.attribute if each.name == "axis")
    assert axes[0] == 6
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.use_fb_fake_quant = True
    batch = batch_for(qmodel, (2, 6))
    found = session.run(None, {name: value.numpy() for name, value in batch.items()})[0]
    with torch.no_grad():
        wanted = qmodel(**batch).last_hidden_state
    difference = (torch.from_numpy(found) - wanted).abs()
    # Values half-way between two steps may go either way: nearly all are equal, and none is far.
    assert difference.median() < 1e-5
    assert difference.mean() < 0.02


@pytest.mark.slow
def test_what_the_export_refuses(tmp_path: Path) -> None:
    """Whatever part of a model is exported; here the smallest."""
    qmodel = qs.convert(build("bert", "BertModel", num_hidden_layers=1))
    block = qmodel.encoder.layer[0].intermediate
    batch = {"hidden_states": torch.randn(2, 5, 32)}
    with pytest.raises(Exception, match="export") as error:
        export(block, batch, tmp_path / "model.onnx")
    assert "_input_quantizer has no range: calibrate the model before exporting it" in chain(error.value)
    calibrate(qmodel, batch_for(qmodel, (2, 5)))
    block.dense._input_quantizer.num_bits = 4
    with pytest.raises(Exception, match="export") as error:
        export(block, batch, tmp_path / "model.onnx")
    assert "QuantizeLinear has 8 bits, this quantizer has 4" in chain(error.value)


def chain(error: BaseException | None) -> str:
    """The messages of an error and of all that caused it."""
    text = ""
    while error is not None:
        text += f"{error}\n"
        error = error.__cause__ or error.__context__
    return text
