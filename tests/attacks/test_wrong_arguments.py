"""Arguments of another kind than is asked for: an error of the package says what was found. Numbers of numpy pass."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import batch_for, build
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.onnx_export import _opset
from qdq_surgery.targets.registry import get_target


@cache
def model() -> PreTrainedModel:
    return build("bert", "BertModel", num_hidden_layers=1)


@cache
def qmodel() -> PreTrainedModel:
    made = qs.convert(model())
    qs.calibrate(made, batches())
    return made


def batches() -> list[dict[str, Any]]:
    return [batch_for(model(), (2, 5))]


TAKE_A_MODEL: Mapping[str, Callable[[Any], Any]] = {
    "calibrate": lambda it: qs.calibrate(it, batches()),
    "certify": lambda it: qs.certify(it, "model.onnx", batches()[0]),
    "collect": lambda it: qs.collect(it, batches()),
    "convert": qs.convert,
    "diff": lambda it: qs.diff(it, qmodel()),
    "diff, after": lambda it: qs.diff(model(), it),
    "equalize": lambda it: qs.equalize(it, batches()),
    "evaluate": lambda it: qs.evaluate(it, batches()),
    "explain": qs.explain,
    "export_onnx": lambda it: qs.export_onnx(it, "model.onnx"),
    "fix_ranges": qs.fix_ranges,
    "freeze": qs.freeze,
    "learn_ranges": qs.learn_ranges,
    "plan": qs.plan,
    "quantization_disabled": lambda it: qs.quantization_disabled(it).__enter__(),
    "quantizers": qs.quantizers,
    "recalibrate_weights": qs.recalibrate_weights,
    "report": lambda it: qs.report(it, "report.html"),
    "round_weights": lambda it: qs.round_weights(it, batches()),
    "run_rows": lambda it: list(qs.run_rows(it, ["a"], None)),
    "sensitivity": lambda it: qs.sensitivity(it, batches()),
    "tune": lambda it: qs.tune(it, batches()),
}


@pytest.mark.parametrize("thing", [None, 3, "model"], ids=repr)
@pytest.mark.parametrize("name", TAKE_A_MODEL)
def test_what_is_no_model(name: str, thing: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(qs.QdqSurgeryError, match=rf"(found|first is|with) a {type(thing).__name__}|compare a"):
        TAKE_A_MODEL[name](thing)
    assert not any(tmp_path.iterdir())


def test_the_converted_model_in_a_wrapper_is_named() -> None:
    import torch

    for wrapper, place in ((torch.nn.DataParallel, "module"), (torch.nn.Sequential, "[0]")):
        with pytest.raises(qs.ModelError, match=rf"it holds a BertModel that is, at model\.?\[?{place.strip('[]')}"):
            qs.export_onnx(wrapper(qmodel()), "model.onnx")
        with pytest.raises(qs.ModelError, match=r"is not converted; call qdq_surgery\.convert\(model\) first"):
            qs.export_onnx(wrapper(model()), "model.onnx")


TAKE_A_PATH: Mapping[str, Callable[[Any], Any]] = {
    "certify": lambda it: qs.certify(qmodel(), it, batches()[0]),
    "export_onnx": lambda it: qs.export_onnx(qmodel(), it, batches()[0]),
    "lint": lambda it: qs.lint(it, "tensorrt"),
    "load_onnx": qs.load_onnx,
    "receipt": qs.receipt,
    "report": lambda it: qs.report(qmodel(), it),
    "save_pretrained": lambda it: qmodel().save_pretrained(it),
    "sensitivity": lambda it: qs.sensitivity(qmodel(), batches(), resume=it),
}


@pytest.mark.parametrize("thing", [{}, 3, b"model.onnx"], ids=repr)
@pytest.mark.parametrize("name", TAKE_A_PATH)
def test_what_is_no_path(name: str, thing: object) -> None:
    with pytest.raises(qs.OptionError, match=rf"found a {type(thing).__name__}, wanted the path of a"):
        TAKE_A_PATH[name](thing)


WRONG: Mapping[str, tuple[Callable[[], Any], str]] = {
    "opset, a text": (lambda: _opset(get_target("openvino"), "20"), "opset '20' is not supported"),  # type: ignore[arg-type]
    "opset, a fraction": (lambda: _opset(get_target("openvino"), 20.0), r"opset 20\.0 is not"),  # type: ignore[arg-type]
    "opset, a flag": (lambda: _opset(get_target("openvino"), True), "opset True is not supported"),
    "threads, a text": (lambda: qs.load_onnx("model.onnx", threads="2"), "threads is '2'; give 1"),  # type: ignore[arg-type]
    "threads, a fraction": (lambda: qs.load_onnx("model.onnx", threads=2.5), r"threads is 2\.5; give 1"),  # type: ignore[arg-type]
    "threads, a flag": (lambda: qs.load_onnx("model.onnx", threads=True), "threads is True; give 1"),
    "threads, too many": (lambda: qs.load_onnx("model.onnx", threads=10**9), "threads is 1000000000; give 1"),
    "tokens, a text": (lambda: [*qs.run_rows(model(), ["a"], None, tokens="9")], "tokens=9"),  # type: ignore[arg-type]
    "name, a number": (lambda: qs.tune(model(), batches(), name=3), "name=3 is no name"),  # type: ignore[arg-type]
    "name, nothing": (lambda: qs.tune(model(), batches(), name=""), "name='' is no name"),
    "path, a number": (lambda: qs.explain(qmodel(), 3), "the path is a int; give a text"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_option(name: str) -> None:
    call, words = WRONG[name]
    with pytest.raises(qs.QdqSurgeryError, match=words):
        call()


@pytest.mark.parametrize("percentile", [np.float32(99.5), np.float64(99.5), Fraction(199, 2)], ids=repr)
def test_a_percentile_is_any_real_number(percentile: Any) -> None:
    made = qs.calibrate(qs.convert(model()), batches(), "percentile", percentile=percentile)
    wanted = qs.calibrate(qs.convert(model()), batches(), "percentile", percentile=99.5)
    assert json.dumps(made.to_json()) == json.dumps(wanted.to_json())


def test_numbers_and_texts_of_numpy_are_as_python_s() -> None:
    opset = _opset(get_target("openvino"), np.int64(20))  # type: ignore[arg-type]
    assert (opset, type(opset)) == (20, int)
    made = qs.tune(
        model(), batches(), "linear-only", np.float32(1.0), name=np.str_("mine"), float_share=np.float32(0.5)
    )
    assert json.loads(json.dumps(made.to_json()))["budget"] == 1.0
    assert "name: mine\n" in made.rules.text
