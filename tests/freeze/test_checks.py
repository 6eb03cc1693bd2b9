"""What cannot be frozen: each refusal names the place, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from frozen_models import calibrated, frozen
from pytorch_quantization.tensor_quant import QuantDescriptor

import qdq_surgery as qs
from qdq_surgery.freeze import checks
from qdq_surgery.freeze.checks import choose
from qdq_surgery.integers.choice import unsupported

FIRST = "encoder.layer.0.attention.self.query"


def first(qmodel: Any) -> Any:
    return qmodel.get_submodule(FIRST)


def test_all_linears_of_a_calibrated_model_are_taken() -> None:
    made = choose(calibrated())
    assert len(made.integer) == 12
    assert made.kept == {}


def test_a_float_model_and_a_frozen_one() -> None:
    with pytest.raises(qs.ModelError, match=r"not converted; call qdq_surgery.convert"):
        qs.freeze(build("bert", "BertModel"))
    with pytest.raises(qs.ModelError, match="is frozen"):
        qs.freeze(frozen())


def test_a_model_without_ranges() -> None:
    qmodel = qs.convert(build("bert", "BertModel"), "linear-only")
    with pytest.raises(qs.CalibrationError, match=r"_input_quantizer, .* and 19 more have no range; call .*calibrate"):
        qs.freeze(qmodel)


def test_one_without_a_range() -> None:
    qmodel = calibrated()
    first(qmodel)._input_quantizer.reset_amax()
    with pytest.raises(qs.CalibrationError, match=rf"^{FIRST}._input_quantizer has no range"):
        qs.freeze(qmodel)
    first(qmodel)._input_quantizer.disable()
    assert qs.freeze(qmodel)._qdq_frozen.kept == {FIRST: "its input quantizer is disabled"}


def test_a_range_that_is_no_number() -> None:
    qmodel = calibrated()
    first(qmodel)._input_quantizer._amax.fill_(float("nan"))
    with pytest.raises(qs.CalibrationError, match="is not a finite number; calibrate"):
        qs.freeze(qmodel)


def test_a_collection_that_runs() -> None:
    qmodel = calibrated()
    first(qmodel)._input_quantizer.enable_calib()
    with pytest.raises(qs.CalibrationError, match="is collecting statistics"):
        qs.freeze(qmodel)


@pytest.mark.usefixtures("default_descriptors")
@pytest.mark.parametrize("bits", [4, 16])
def test_other_grids(bits: int) -> None:
    qmodel = calibrated()
    first(qmodel)._weight_quantizer.num_bits = bits
    with pytest.raises(qs.ModelError, match=rf"^{FIRST}: its weight is on a grid of {bits} bits .* num_bits"):
        qs.freeze(qmodel)


def test_another_device() -> None:
    with pytest.raises(qs.ModelError, match=r"is on meta, .* frozen on a CPU or an NVIDIA GPU; move it there first"):
        qs.freeze(calibrated().to("meta"))


def test_another_dtype() -> None:
    with pytest.raises(qs.ModelError, match="cannot be frozen: their results are float32 or bfloat16, not float64"):
        qs.freeze(calibrated().double())


def test_a_machine_without_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "unsupported", lambda *_: "no such kernel")
    with pytest.raises(qs.ModelError, match=r"cannot be frozen: no such kernel; use it with fake .*export_onnx"):
        qs.freeze(calibrated())
    assert unsupported(torch.device("cpu"), torch.float32) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda linear: linear._weight_quantizer.disable(), "its weight quantizer is disabled"),
        (lambda linear: vars(linear).update(forward=type(linear).forward), "it has a forward of its own"),
        (lambda linear: linear._weight_quantizer._amax.resize_(1, 32), "ranges along another axis"),
        (
            lambda linear: setattr(linear._weight_quantizer, "_unsigned", True),
            "unsigned grid, and integer products have int8",
        ),
        (lambda linear: linear._input_quantizer._amax.resize_(1, 32).fill_(1.0), "ranges along an axis, other than"),
    ],
)
def test_linears_that_stay(change: Callable[[Any], object], reason: str) -> None:
    qmodel = calibrated()
    change(first(qmodel))
    made = choose(qmodel)
    assert len(made.integer) == 11
    assert reason in made.kept[FIRST]


def test_a_linear_whose_input_no_rule_quantizes(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    exclude = f"{{why: a test, within: {FIRST}, sites: _input_quantizer}}"
    path.write_text(f"schema: 1\nname: without\nextends: linear-only\nexclude:\n  - {exclude}\n")
    qmodel = qs.convert(build("bert", "BertModel"), str(path))
    qs.calibrate(qmodel, [{"input_ids": torch.arange(3, 9)[None]}])
    assert choose(qmodel).kept == {FIRST: "no rule quantizes its input"}


def test_a_model_of_which_nothing_can_be_frozen() -> None:
    qmodel = calibrated()
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.disable()
    with pytest.raises(qs.ModelError, match=r"nothing of this BertModel can be frozen: .*is disabled"):
        qs.freeze(qmodel)


def test_descriptors_with_clips_stay() -> None:
    qmodel = calibrated()
    clipped = qs.TensorQuantizer(QuantDescriptor(amax=2.0, learn_amax=True))
    clipped.eval()
    first(qmodel)._modules["_input_quantizer"] = clipped
    assert "clips" in choose(qmodel).kept[FIRST]
