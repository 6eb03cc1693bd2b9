"""Tiny exported models, made when they are first asked for and kept for all workers while the tests run."""

from __future__ import annotations

import copy
import functools
import inspect
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from architectures import BASE, batch_for, build, tensors_of
from kept import kept
from numpy.typing import NDArray
from torch import Tensor
from transformers import BartConfig, BartModel, CLIPConfig, CLIPModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.export.onnx_trace import Traced, trace
from qdq_surgery.hf.example_inputs import make_examples, sample_inputs
from qdq_surgery.onnx_export import Export, export_onnx
from qdq_surgery.prove.parity import Check, certify
from qdq_surgery.quantize.export_node import FAKE_QUANT, FAKE_QUANT_DOMAIN


@functools.cache
def _model(model_type: str, head: str, rules: str, options: tuple[tuple[str, Any], ...]) -> PreTrainedModel:
    model = qs.convert(build(model_type, head, **dict(options)), rules, inplace=True)
    mask = not model.config.to_dict().get("chunk_size_feed_forward")  # padding cannot be told from text in chunks
    qs.calibrate(model, [inputs_for(model, (4, 12), mask=mask)])
    return model


def calibrated(model_type: str = "bert", head: str = "", rules: str = "qdqbert", **options: Any) -> PreTrainedModel:
    """A calibrated model of its own, in eval mode."""
    return copy.deepcopy(_model(model_type, head or BASE[model_type], rules, tuple(sorted(options.items()))))


def inputs_for(model: PreTrainedModel, shape: tuple[int, int], *, mask: bool = True) -> dict[str, Any]:
    """Everything that a file takes whose example inputs are made from the config."""
    made: dict[str, Any] = dict(batch_for(model, shape, mask=mask))
    takes = inspect.signature(model.forward).parameters
    if "token_type_ids" in takes and getattr(model.config, "type_vocab_size", 0) > 1:
        made["token_type_ids"] = torch.randint(2, made["input_ids"].shape, generator=torch.Generator().manual_seed(1))
    if getattr(model.config, "add_cross_attention", False):
        generator = torch.Generator().manual_seed(2)
        made["encoder_hidden_states"] = torch.randn(shape[0], 6, model.config.hidden_size, generator=generator)
    if getattr(model.config, "is_decoder", False):
        made["use_cache"] = False
    return made


@functools.cache
def _export(model_type: str, head: str, target: str, options: tuple[tuple[str, Any], ...]) -> tuple[Any, Export]:
    settings = dict(options)
    how = {name: settings.pop(name) for name in ("opset", "activations", "precision", "dynamic") if name in settings}
    qmodel = calibrated(model_type, head, settings.pop("rules", target), **settings)

    def make(folder: Path) -> tuple[dict[str, Tensor], Export]:
        return qmodel.state_dict(), export_onnx(qmodel, folder / "model.onnx", target=target, **how)

    # Ranges found in another process may differ in their last bit, and then a tie goes the other way.
    state, file = kept(make, "export", model_type, head, target, options)
    qmodel.load_state_dict(state)
    return qmodel, file


def exported(
    model_type: str = "bert", head: str = "", target: str = "onnxruntime", **options: Any
) -> tuple[PreTrainedModel, Export]:
    """A model and its file, which others use, too.

    Args:
        options: ``rules`` (the target's own if left out), options of the export, and of the config.
    """
    made: tuple[PreTrainedModel, Export]
    made = _export(model_type, head or BASE[model_type], target, tuple(sorted(options.items())))
    return made


def two_towers() -> tuple[PreTrainedModel, dict[str, Any]]:
    """A calibrated model of texts and images, and its example."""
    tower = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 60, "max_position_embeddings": 40, "eos_token_id": 2},
        vision_config={**tower, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    torch.manual_seed(0)
    return _with_examples(CLIPModel._from_config(config, attn_implementation="eager"), "onnxruntime")


def encoder_decoder() -> tuple[PreTrainedModel, dict[str, Any]]:
    """A calibrated model of two texts, whose embeddings are multiplied by a number, and its example."""
    side = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}
    sizes = {f"{name}_{size}": value for name in ("encoder", "decoder") for size, value in side.items()}
    config = BartConfig(d_model=32, vocab_size=60, max_position_embeddings=40, scale_embedding=True, **sizes)
    torch.manual_seed(0)
    return _with_examples(BartModel._from_config(config, attn_implementation="eager"), "openvino")


def _with_examples(model: PreTrainedModel, rules: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    qmodel = qs.convert(model.eval(), rules, inplace=True)
    inputs = make_examples(qmodel, (2, 9))
    qs.calibrate(qmodel, [inputs])
    return qmodel, inputs


@functools.cache
def _traced(names: tuple[str, ...], opset: int) -> Traced:
    model = calibrated(num_hidden_layers=1)
    assert tuple(qs.quantizers(model)) == names
    return trace(model, sample_inputs(model, None, True), opset, True)


def traced_once(qmodel: PreTrainedModel, inputs: Mapping[str, Any], opset: int, dynamic: bool) -> Traced:
    """In place of ``trace``, for ``calibrated(num_hidden_layers=1)`` and the example from its config."""
    assert dynamic
    assert {name: value.shape for name, value in inputs.items()} == {
        name: value.shape for name, value in sample_inputs(qmodel, None, True).items()
    }
    found = _traced(tuple(qs.quantizers(qmodel)), opset)
    return replace(found, model=found.model.clone())


def assert_parity(qmodel: PreTrainedModel, path: Path, inputs: Mapping[str, Any], *runtimes: str) -> None:
    certificate = certify(qmodel, path, inputs, runtimes or ("onnxruntime",))
    assert certificate.agrees, certificate.to_text()


def site_checks(qmodel: PreTrainedModel, path: Path, inputs: Mapping[str, Any], runtime: str) -> Check:
    """The check that looks at each site."""
    return next(check for check in certify(qmodel, path, inputs, (runtime,)).checks if check.sites)


def run(path: Path, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The file on ONNX Runtime, with optimisations off."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    arrays = {name: value.numpy() if isinstance(value, Tensor) else value for name, value in inputs.items()}
    taken = {each.name: arrays[each.name] for each in session.get_inputs()}
    return dict(zip([each.name for each in session.get_outputs()], session.run(None, taken), strict=True))


def outputs_of(qmodel: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
    with torch.no_grad():
        return {name: value.numpy() for name, value in tensors_of(qmodel(**inputs)).items()}


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def compute(model: ir.Model, **inputs: Any) -> list[NDArray[Any]]:
    """The outputs of a small graph on ONNX Runtime, with optimisations off."""
    with tempfile.TemporaryDirectory() as folder:
        ir.save(model, Path(folder) / "graph.onnx")
        return list(run(Path(folder) / "graph.onnx", inputs).values())


def graph(text: str, opset: int = 20, **constants: Any) -> ir.Model:
    """A graph from ONNX's text form without its head, with the shapes, types and names that torch's exporter leaves.

    Args:
        constants: Its initializers. Their names are what Python allows.
    """
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {opset}, "{FAKE_QUANT_DOMAIN}": 1]>\n{text}')
    model.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(each), k) for k, each in constants.items())
    for node in model.graph.node:
        if node.domain == FAKE_QUANT_DOMAIN:  # has no shape function
            node.domain, node.op_type = "", "Identity"
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    for at, node in enumerate(model.graph.node):
        node.name = f"node_{at}"
        if any(attribute.name == "quantizer" for attribute in node.attribute):
            node.domain, node.op_type = FAKE_QUANT_DOMAIN, FAKE_QUANT
    return ir.serde.deserialize_model(model)


def operators(nodes: Sequence[ir.Node] | ir.Graph) -> list[str]:
    return [node.op_type for node in nodes]
