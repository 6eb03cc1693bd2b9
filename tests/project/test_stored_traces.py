"""The tests' store of traces: what differs in anything that a trace depends on is traced by itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import qdq_surgery as qs

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")

import stored_traces
from exported import calibrated, inputs_for

from qdq_surgery.export import onnx_trace


@pytest.mark.slow
@pytest.mark.traces
@pytest.mark.parametrize(("target", "rules"), [("onnxruntime", "qdqbert"), ("tensorrt", "tensorrt")])
def test_a_stored_trace_gives_the_same_file(
    target: str, rules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = calibrated(rules=rules, num_hidden_layers=1)
    qs.export_onnx(model, tmp_path / "real.onnx", target=target, dynamic=False, parity=False)
    stored_traces.install(monkeypatch)
    for name in ("first", "second"):
        qs.export_onnx(model, tmp_path / f"{name}.onnx", target=target, dynamic=False, parity=False)
        assert (tmp_path / f"{name}.onnx").read_bytes() == (tmp_path / "real.onnx").read_bytes()


def other_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight[0, 0] += 1


def other_config(model: PreTrainedModel) -> None:
    model.config.hidden_act = "relu"


def other_module(model: PreTrainedModel) -> None:
    model.encoder.layer[0].intermediate.intermediate_act_fn = torch.nn.ReLU()


def other_number(model: PreTrainedModel) -> None:
    model.encoder.layer[0].output.LayerNorm.eps = 0.5


def other_switch(model: PreTrainedModel) -> None:
    next(iter(qs.quantizers(model).values())).disable()


def other_ranges(model: PreTrainedModel) -> None:
    for quantizer in qs.quantizers(model).values():
        assert quantizer.amax is not None
        quantizer.amax = quantizer.amax * 3.0


@pytest.mark.parametrize("change", [other_weight, other_config, other_module, other_number, other_switch])
def test_another_model_is_told(change: Callable[[PreTrainedModel], None]) -> None:
    model = calibrated(num_hidden_layers=1)
    before = stored_traces.fingerprint(model)
    assert stored_traces.fingerprint(calibrated(num_hidden_layers=1)) == before
    assert stored_traces.fingerprint(calibrated(rules="onnxruntime", num_hidden_layers=1)) != before
    other_ranges(model)
    assert stored_traces.fingerprint(model) == before
    change(model)
    assert stored_traces.fingerprint(model) != before


def test_other_calls_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def kept(_: Any, *key: object) -> Any:
        asked.append(key)
        raise RuntimeError("seen")

    monkeypatch.setattr(stored_traces, "kept", kept)
    model = calibrated(num_hidden_layers=1)
    short, long = inputs_for(model, (2, 9)), inputs_for(model, (2, 10))
    calls = [(short, 20, True), (short, 20, False), (short, 19, False), (long, 20, False)]
    without = {name: value for name, value in short.items() if name != "token_type_ids"}
    turned = dict(reversed(short.items()))
    for inputs in (without, turned, {**short, "output_hidden_states": True}, {**short, "output_attentions": False}):
        calls.append((inputs, 20, False))
    for inputs, opset, dynamic in (*calls, *calls):
        with pytest.raises(qs.ExportError, match="seen"):
            onnx_trace.trace(model, inputs, opset, dynamic)
    assert len({repr(key) for key in asked}) == len(calls)
