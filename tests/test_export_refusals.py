"""export_onnx: what is refused and what a failure leaves behind, and that the model stays as it is."""

from __future__ import annotations

import copy
import importlib
import inspect
import logging
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.onnx_export import export_onnx
from qdq_surgery.onnx_file import opened, reader

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from exported import calibrated, inputs_for, listing, outputs_of  # noqa: E402

from qdq_surgery.export.passes import lower_qdq as lowering  # noqa: E402

#: Of the texts that a model is run on.
SHAPE = (3, 17)


@pytest.fixture
def tiny() -> PreTrainedModel:
    return calibrated(num_hidden_layers=1)


# --- the model ----------------------------------------------------------------------------------------------------


def state(model: PreTrainedModel) -> dict[str, Any]:
    """Everything that an export could leave behind."""
    return {
        "tensors": {name: value.clone() for name, value in model.state_dict().items()},
        "pointers": {name: value.data_ptr() for name, value in model.state_dict().items()},
        "training": [each.training for each in model.modules()],
        "gradients": {name: (each.requires_grad, each.grad) for name, each in model.named_parameters()},
        "hooks": [(len(each._forward_hooks), len(each._forward_pre_hooks)) for each in model.modules()],
        "classes": [type(each) for each in model.modules()],
        "flags": {
            name: (each._disabled, each._if_quant, each._if_calib, each.learns, each.use_fb_fake_quant)
            for name, each in qs.quantizers(model).items()
        },
        "config": model.config.to_json_string(use_diff=False),
        "random": torch.get_rng_state(),
        "logging": logging.getLogger("torch.onnx._internal.exporter").level,
        "attributes": {name: set(vars(each)) for name, each in model.named_modules()},
    }


def assert_unchanged(model: PreTrainedModel, before: dict[str, Any]) -> None:
    after = state(model)
    for name in ("tensors", "random"):
        torch.testing.assert_close(after.pop(name), before[name], rtol=0, atol=0)
    assert after == {name: value for name, value in before.items() if name not in ("tensors", "random")}


@pytest.mark.slow
def test_the_model_stays_as_it_is(tiny: PreTrainedModel, tmp_path: Path) -> None:
    """Whatever block the call stands in."""
    inputs, before = inputs_for(tiny, SHAPE), state(tiny)
    wanted = outputs_of(tiny, inputs)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        file = export_onnx(tiny, tmp_path / "model.onnx")
    assert {value.dtype for value in ir.load(file.path).graph.outputs} == {ir.DataType.FLOAT}
    assert_unchanged(tiny, before)
    assert all(np.array_equal(value, wanted[name]) for name, value in outputs_of(tiny, inputs).items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_torchs_own_export_goes_on_working(tiny: PreTrainedModel, tmp_path: Path) -> None:
    export_onnx(tiny, tmp_path / "ours.onnx", parity=False)
    part, values = tiny.get_submodule("encoder.layer.0.intermediate"), torch.randn(2, 9, 32)
    with torch.no_grad():
        torch.onnx.export(part, (values,), tmp_path / "plain.onnx", dynamo=True, opset_version=19, verbose=False)
    counts = Counter(node.op_type for node in onnx.load(tmp_path / "plain.onnx").graph.node)
    assert counts["QuantizeLinear"] == counts["DequantizeLinear"] > 0
    assert {node.domain for node in onnx.load(tmp_path / "plain.onnx").graph.node} <= {"", "pkg.onnxscript.torch_lib"}


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With a file that an export would replace."""
    made = tmp_path / "files"
    made.mkdir()
    (made / "model.onnx").write_bytes(b"old")
    (made / "model.onnx.data").write_bytes(b"old data")
    return made


def refusal(qmodel: Any, folder: Path, kind: type[Exception] = qs.ExportError, **how: Any) -> str:
    """What is said; and everything is as it was."""
    before = listing(folder)
    with pytest.raises(kind) as caught:
        export_onnx(qmodel, how.pop("path", folder / "model.onnx"), **{"overwrite": True, **how})
    assert listing(folder) == before
    assert [each for each in folder.iterdir() if each.is_dir()] == []
    assert isinstance(caught.value, qs.QdqSurgeryError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"target": "coreml"}, "there is no target 'coreml'; targets are onnxruntime, openvino, tensorrt"),
        ({"opset": 18}, "opset 18 is not supported for onnxruntime; choose one of 19 to 23"),
        ({"opset": 99}, "opset 99 is not supported for onnxruntime; choose one of 19 to 23"),
        ({"activations": "int4"}, "there is no activations 'int4'; choose one of int8, uint8"),
        (
            {"activations": "uint8", "target": "tensorrt"},
            "activations 'uint8' is not supported for tensorrt; choose int8",
        ),
        (
            {"activations": "uint8", "target": "openvino"},
            "activations 'uint8' is not supported for openvino; choose int8",
        ),
        ({"precision": "half"}, "there is no precision 'half'; choose one of float32, float16, bfloat16"),
        ({"precision": "bfloat16"}, "precision 'bfloat16' is not supported for onnxruntime; choose float32"),
        ({"precision": "bf16"}, "precision 'bfloat16' is not supported for onnxruntime; choose float32"),
        ({"precision": "float16"}, "precision 'float16' is not supported for onnxruntime; choose float32"),
    ],
)  # fmt: skip
def test_what_a_target_does_not_take(how: dict[str, Any], said: str, tiny: PreTrainedModel, folder: Path) -> None:
    assert refusal(tiny, folder, **how) == said


def test_paths_that_cannot_be_written(tiny: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(tiny, folder, path=folder).startswith(f"{folder} is a folder; give the name of a file, such as ")
    nowhere = folder / "nowhere" / "model.onnx"
    assert refusal(tiny, folder, path=nowhere) == (
        f"{nowhere} cannot be written: there is no folder {nowhere.parent}; make it first"
    )
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert refusal(tiny, folder).endswith("cannot be written: permission denied; give another path")


def test_models_that_cannot_be_exported(tiny: PreTrainedModel, folder: Path) -> None:
    assert refusal(build("bert", "BertModel", num_hidden_layers=1), folder, qs.ModelError) == (
        "this BertModel is not converted; call qdq_surgery.convert(model) first"
    )
    assert refusal(copy.deepcopy(tiny).train(), folder, qs.ModelError) == (
        "this BertModel is in train mode, with dropout; call .eval() first"
    )
    for kind in (torch.float16, torch.bfloat16, torch.float64):
        name = str(kind).removeprefix("torch.")
        assert refusal(copy.deepcopy(tiny).to(kind), folder, qs.ModelError) == (
            f"this BertModel is in {name}, and the file is to be in float32; call .float() first"
        )


def test_a_model_whose_quantizers_are_off_for_a_while(tiny: PreTrainedModel, folder: Path) -> None:
    with qs.quantization_disabled(tiny):
        assert refusal(tiny, folder, qs.ModelError) == (
            "the quantizers of this BertModel are off for a while; call export_onnx outside of quantization_disabled"
        )


def uncalibrated(model: PreTrainedModel) -> None:
    for name, each in qs.quantizers(model).items():
        if "query" in name:
            each.reset_amax()


def four_bits(model: PreTrainedModel) -> None:
    qs.quantizers(model)["encoder.layer.0.output.dense._weight_quantizer"]._num_bits = 4


def narrow(model: PreTrainedModel) -> None:
    qs.quantizers(model)["encoder.layer.0.output.dense._input_quantizer"]._narrow_range = True


def unsigned(model: PreTrainedModel) -> None:
    qs.quantizers(model)["encoder.layer.0.output.dense._input_quantizer"]._unsigned = True


def calibrating(model: PreTrainedModel) -> None:
    qs.quantizers(model)["encoder.layer.0.output.dense._input_quantizer"].enable_calib()


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (uncalibrated, qs.CalibrationError, "a quantizer has no range; calibrate the model"),
        (four_bits, qs.ExportError, "of another width than the 8 bits of QuantizeLinear"),
        (narrow, qs.ExportError, "with narrow_range on an activation"),
        (unsigned, qs.ExportError, "with an unsigned grid, and tensorrt has only symmetric ones"),
        (calibrating, qs.CalibrationError, "in the middle of calibration"),
    ],
)
def test_quantizers_that_cannot_be_exported(
    change: Callable[[PreTrainedModel], None], kind: type[Exception], said: str, tiny: PreTrainedModel, folder: Path
) -> None:
    change(tiny)
    assert said in refusal(tiny, folder, kind, target="tensorrt")


def test_every_uncalibrated_quantizer_is_named(folder: Path) -> None:
    qmodel = qs.convert(build("bert", "BertModel"))
    said = refusal(qmodel, folder, qs.CalibrationError)
    inputs = [name for name in qs.quantizers(qmodel) if not name.endswith("weight_quantizer")]
    assert said.startswith(f"{len(inputs)} quantizers have no range")
    assert said.splitlines()[1:] == [f"  {name}" for name in inputs]


@pytest.mark.parametrize("package", ["onnx", "onnx_ir", "onnxscript", "onnxruntime"])
def test_packages_that_are_not_installed(
    package: str, tiny: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.import_module

    def missing(name: str, *args: Any) -> Any:
        if name == package:
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    what = "the parity certificate" if package == "onnxruntime" else "exporting to ONNX"
    assert refusal(tiny, folder, qs.ModelError) == (
        f"{what} needs {package}, which is not installed; pip install 'qdq-surgery[onnx]'"
    )


def test_a_runtime_that_is_not_installed_is_told_of(
    tiny: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "openvino" else real(name, *a))
    file = export_onnx(tiny, tmp_path / "model.onnx", target="openvino")
    assert file.parity is not None
    assert {check.runtime.partition(",")[0] for check in file.parity.checks} == {"onnxruntime"}
    assert "not checked: OpenVINO, which is not installed; pip install 'qdq-surgery[openvino]'" in file.parity.to_text()


@pytest.mark.parametrize("parity", [True, False])
def test_what_was_built_is_passed_along(
    parity: bool, tiny: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The certificate reads the file once; nobody reads the list of sites that was just written."""
    calls: list[Path] = []
    right = reader.open_proto
    monkeypatch.setattr(reader, "open_proto", lambda path: calls.append(Path(path)) or right(path))
    monkeypatch.setattr(opened, "load_sites", lambda *_: pytest.fail("the sites were parsed"))
    export_onnx(tiny, tmp_path / "model.onnx", parity=parity)
    assert [path.name for path in calls] == ["model.onnx"] * parity


def wrong_scales(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lowering.typed_scale
    monkeypatch.setattr(lowering, "typed_scale", lambda scale, kind: right(scale * np.float32(1.01), kind))


def failing_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("torch says no\nin two lines")

    monkeypatch.setattr(torch.onnx, "export", fail)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half a file")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ir, "save", fail)


def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half a file")
        raise qs.ExportError("someone pressed a key")

    monkeypatch.setattr(ir, "save", fail)


@pytest.mark.parametrize(
    ("fail", "kind", "said"),
    [
        (wrong_scales, qs.ExportError, "diverges first at encoder.layer.0.attention.self.query._input_quantizer: "),
        pytest.param(
            failing_torch,
            qs.ExportError,
            "BertModel cannot be traced: RuntimeError: torch says no in two lines",
            marks=pytest.mark.traces,
        ),
        (full_disk, qs.ExportError, "model.onnx cannot be written: No space left on device"),
        (interrupted, qs.ExportError, "someone pressed a key"),
    ],
)
def test_a_failed_export_leaves_nothing(
    fail: Callable[[pytest.MonkeyPatch], None],
    kind: type[Exception],
    said: str,
    tiny: PreTrainedModel,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = state(tiny)
    fail(monkeypatch)
    assert said in refusal(tiny, folder, kind)
    assert_unchanged(tiny, before)
    monkeypatch.undo()
    # Nothing of it is left in the process either: quantizers quantize.
    quantizer = qs.quantizers(tiny)["encoder.layer.0.output.dense._input_quantizer"]
    values = torch.linspace(-1, 1, 100)
    assert not torch.equal(quantizer(values), values)


def test_a_failed_export_without_a_file_before(
    tiny: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_scales(monkeypatch)
    refusal(tiny, tmp_path)
    assert listing(tmp_path) == {}


def test_without_the_certificate_nothing_is_checked(
    tiny: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong_scales(monkeypatch)
    file = export_onnx(tiny, tmp_path / "model.onnx", parity=False)
    assert file.parity is None
    assert "parity" not in file.to_text()


def test_what_a_runtime_has_no_kernel_for(tiny: PreTrainedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")

    def fail(*_: object) -> None:
        raise RuntimeError("Exception from src/core.cpp:99:\nFakeQuantize node with name 'a' has no kernel")

    monkeypatch.setattr(openvino.Core, "compile_model", fail)
    said = refusal(tiny, folder, target="openvino")
    assert said.startswith("openvino cannot run model.onnx: FakeQuantize node with name 'a' has no kernel")


@pytest.mark.parametrize("name", ["pixel_values", "entity_ids"])
def test_inputs_that_no_config_gives_are_asked_for(name: str, tiny: PreTrainedModel, folder: Path) -> None:
    forward, parameters = tiny.forward, inspect.signature(tiny.forward).parameters
    extra = inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
    kept = [each for each in parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]

    def further(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    further.__signature__ = inspect.Signature([*kept, extra])  # type: ignore[attr-defined]
    tiny.forward = further
    message = refusal(tiny, folder, qs.ModelError)
    assert message.startswith(f"BertModel takes '{name}', for which its config gives no example")
    assert message.endswith("pass example_inputs= with it, or without it for a file of text alone")
