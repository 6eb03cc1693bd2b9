"""The integer grids: scales and integers as PyTorch has them, and what no file can hold."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_quantization import calib
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.export.qparams import QParams, read_qparams
from qdq_surgery.numerics.fake_quant import fake_quant, native_fake_quant
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.targets.registry import get_target

pytest.importorskip("onnxruntime")

from exported import calibrated

QUERY = "encoder.layer.0.attention.self.query"
SUM = "encoder.layer.0.output.add_local_input_quantizer"
SCORES = "encoder.layer.0.attention.self.matmul_q_input_quantizer"


@pytest.fixture
def qmodel() -> PreTrainedModel:
    return calibrated(num_hidden_layers=1)


def read(model: PreTrainedModel, target: str = "onnxruntime") -> dict[str, QParams]:
    return read_qparams(model, get_target(target))


def qparams_of(
    amax: float | list[float] | None, axis: int | None = None, native: bool = False, **more: bool
) -> QParams:
    ranges = None if amax is None else np.asarray(amax, np.float32)
    return QParams("a.quantizer", "weight", ranges, axis, Grid(**more), native)


# --- scales and integers ------------------------------------------------------------------------------------------


def test_the_scale_is_the_step(qmodel: PreTrainedModel) -> None:
    qparams, quantizers = read(qmodel), qs.quantizers(qmodel)
    assert set(qparams) == set(quantizers)
    for name, each in qparams.items():
        assert each.amax is not None
        step = quantizers[name].step_size
        assert step is not None
        # NumPy and torch both round the quotient of two float32 once.
        assert np.array_equal(each.scale(each.amax).reshape(-1), step.reshape(-1).numpy()), name
        assert each.role == ("weight" if "weight" in name else "input")
        assert each.axis == (-2 if "weight" in name else None)  # (out, in)


def test_unsigned_steps() -> None:
    assert qparams_of(2.0, unsigned=True).scale(np.float32(2.0)) == np.float32(2.0) / np.float32(255)
    assert qparams_of(2.0).scale(np.float32(2.0)) == np.float32(2.0) / np.float32(127)


def values(shape: tuple[int, ...] = (6, 50)) -> NDArray[np.float32]:
    made = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    made[0, :4] = (0.5, 1.5, 2.5, -0.5)  # half-way, for the first channel of ONES
    return made


ONES = [127.0, 0.7, 1.0, 1.3, 2.0, 0.01]


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("narrow_range", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_integers_are_those_that_pytorch_rounds_to(native: bool, narrow_range: bool, per_channel: bool) -> None:
    if native and narrow_range:
        pytest.skip("the native formula knows no narrow range")
    each = qparams_of(
        ONES if per_channel else 1.1, 0 if per_channel else None, native=native, narrow_range=narrow_range
    )
    made = each.integers(values())
    assert made.dtype == np.int8
    amax = torch.tensor(ONES)[:, None] if per_channel else torch.tensor(1.1)
    tensor = torch.from_numpy(values())
    wanted = native_fake_quant(tensor, amax) if native else fake_quant(tensor, amax, each.grid)
    assert each.amax is not None
    steps = wanted / torch.from_numpy(each.scale(each.amax)).reshape(-1, 1)
    assert np.array_equal(made, steps.round().to(torch.int8).numpy())
    assert made.min() == (-127 if narrow_range else -128)


def test_halves_go_to_the_even_neighbour() -> None:
    assert qparams_of(ONES, 0).integers(values())[0, :4].tolist() == [0, 2, 2, 0]


def test_unsigned_integers() -> None:
    made = qparams_of(1.0, unsigned=True).integers(np.abs(values()))
    assert made.dtype == np.uint8
    assert made.max() == 255


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("amax", [0.0, 1e-45, 2.0**-24])
def test_a_range_of_nothing(amax: float, native: bool) -> None:
    each = qparams_of([amax, 1.0], 0, native=native)
    scale = each.scale(np.asarray([amax, 1.0], np.float32))
    assert np.isfinite(scale).all()
    assert (scale > np.finfo(np.float16).tiny).all() or native  # half precision holds it
    assert (scale > 0).all()
    made = each.integers(np.asarray([[0.0, 1e-30, -1e-12], [0.0, 0.5, -1.0]], np.float32))
    assert made[1].tolist() == [0, 64, -127]
    assert made[0].tolist() == [0, 0, 0]
    if not native:  # what comes is rounded to 0, as PyTorch does with it
        assert np.rint(np.float32(1000.0) / scale[0]) == 0
        assert not fake_quant(torch.tensor([1000.0]), torch.tensor(amax)).any()


@pytest.mark.parametrize("axis", [0, -2, None])
def test_a_weight_without_a_range_has_that_of_its_values(axis: int | None) -> None:
    found = qparams_of(None, axis).amax_of(values())
    wanted = np.abs(values()).max() if axis is None else np.abs(values()).max(axis=1)
    assert np.array_equal(found, wanted)
    assert found.shape == (() if axis is None else (6,))


# --- reading ------------------------------------------------------------------------------------------------------


def test_what_is_off_is_left_out(qmodel: PreTrainedModel) -> None:
    quantizers = qs.quantizers(qmodel)
    quantizers[SCORES].disable()
    quantizers[f"{QUERY}._input_quantizer"].disable_quant()
    assert set(read(qmodel)) == set(quantizers) - {SCORES, f"{QUERY}._input_quantizer"}


def test_learned_ranges(qmodel: PreTrainedModel) -> None:
    before = read(qmodel)
    qs.learn_ranges(qmodel)
    after = read(qmodel)
    assert all(np.array_equal(after[name].amax, before[name].amax) for name in before)  # type: ignore[arg-type]


def test_the_native_formula_is_noted(qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[SCORES].use_fb_fake_quant = True
    qparams = read(qmodel)
    assert qparams[SCORES].native
    assert not qparams[f"{QUERY}._weight_quantizer"].native


@pytest.mark.parametrize(
    ("shape", "axis"),
    [((), None), ((1,), None), ((1, 1, 1), None), ((32, 1), -2), ((1, 1, 32), -1), ((32,), -1), ((1, 4, 1, 1), -3)],
)
def test_the_axis_is_the_one_along_which_pytorch_broadcasts(
    shape: tuple[int, ...], axis: int | None, qmodel: PreTrainedModel
) -> None:
    quantizer = qs.quantizers(qmodel)[SUM]
    quantizer.reset_amax()
    quantizer.amax = torch.rand(shape) + 0.1
    found = read(qmodel)[SUM]
    assert found.axis == axis
    assert found.amax is not None
    assert found.amax.shape == (() if axis is None else (max(shape),))


def test_a_weight_needs_no_range(qmodel: PreTrainedModel) -> None:
    quantizer = qs.quantizers(qmodel)[f"{QUERY}._weight_quantizer"]
    wanted = quantizer.amax
    assert wanted is not None
    quantizer.reset_amax()
    found = read(qmodel)[f"{QUERY}._weight_quantizer"]
    assert found.amax is None
    assert found.axis == 0
    weight = qmodel.get_submodule(QUERY).weight.detach().numpy()
    assert np.array_equal(found.amax_of(weight), wanted.reshape(-1).numpy())


# --- refusals -----------------------------------------------------------------------------------------------------


def test_every_quantizer_without_a_range_is_named(qmodel: PreTrainedModel) -> None:
    inputs = [name for name in qs.quantizers(qmodel) if not name.endswith("weight_quantizer")]
    for name in inputs:
        qs.quantizers(qmodel)[name].reset_amax()
    assert len(inputs) == 14
    with pytest.raises(qs.CalibrationError) as caught:
        read(qmodel)
    message = str(caught.value)
    assert message.startswith("14 quantizers have no range; calibrate the model (qdq_surgery.calibrate), or disable")
    assert message.splitlines()[1:] == [f"  {name}" for name in inputs]


def test_one_that_is_off_needs_none(qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[SCORES].reset_amax()
    qs.quantizers(qmodel)[SCORES].disable()
    assert SCORES not in read(qmodel)


@pytest.mark.parametrize("amax", [float("nan"), float("inf")])
def test_a_range_that_is_none(amax: float, qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[SCORES].set_range(torch.tensor(amax))
    with pytest.raises(qs.CalibrationError, match=rf"^the quantizer {SCORES} is without a finite range; calibrate"):
        read(qmodel)


def test_in_the_middle_of_calibration(qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[SCORES].enable_calib()
    with pytest.raises(qs.CalibrationError, match=rf"^the quantizer {SCORES} is in the middle of calibration; load"):
        read(qmodel)


def four_bits(model: PreTrainedModel) -> None:
    qs.quantizers(model)[SCORES]._num_bits = 4


def integers_only(model: PreTrainedModel) -> None:
    qs.quantizers(model)[SCORES]._fake_quant = False


def clipped(model: PreTrainedModel) -> None:
    qs.quantizers(model)[SCORES]._if_clip = True


def old_learning(model: PreTrainedModel) -> None:
    qs.quantizers(model)[SCORES]._learn_amax = True


def narrow(model: PreTrainedModel) -> None:
    qs.quantizers(model)[SCORES]._narrow_range = True


def two_axes(model: PreTrainedModel) -> None:
    quantizer = qs.quantizers(model)[SCORES]
    quantizer.reset_amax()
    quantizer.amax = torch.ones(1, 4, 1, 8)


def unsigned(model: PreTrainedModel) -> None:
    qs.quantizers(model)[SCORES]._unsigned = True


@pytest.mark.parametrize(
    ("change", "what", "fix"),
    [
        (four_bits, "of another width than the 8 bits", "convert with num_bits: 8"),
        (integers_only, "no fake quantization to a fixed range", "learn_ranges instead"),
        (clipped, "no fake quantization to a fixed range", "learn_ranges instead"),
        (old_learning, "no fake quantization to a fixed range", "learn_ranges instead"),
        (narrow, "with narrow_range on an activation", "convert with narrow_range: false"),
        (two_axes, "with ranges along more than one axis", "one axis can have"),
        (unsigned, "with an unsigned grid, and tensorrt has only symmetric ones", "convert with unsigned: false"),
    ],
)
def test_what_no_file_can_hold(
    change: Callable[[PreTrainedModel], None], what: str, fix: str, qmodel: PreTrainedModel
) -> None:
    change(qmodel)
    with pytest.raises(qs.ExportError) as caught:
        read(qmodel, "tensorrt")
    message = str(caught.value)
    assert message.startswith(f"the quantizer {SCORES} is ")
    assert what in message
    assert fix in message
    qs.quantizers(qmodel)[SCORES].disable()
    assert SCORES not in read(qmodel, "tensorrt")


def test_ranges_of_input_channels_of_a_linear(qmodel: PreTrainedModel) -> None:
    """ONNX Runtime would refuse the product that it makes of such a file, in words about its own source."""
    name = SCORES.replace("attention.self.matmul_q_input_quantizer", "output.dense._weight_quantizer")
    quantizer = qs.quantizers(qmodel)[name]
    quantizer.reset_amax()
    quantizer.amax = torch.ones(1, 48)
    with pytest.raises(qs.ExportError, match=rf"^{name} has a range for each input channel .* write axis: 0"):
        read(qmodel, "onnxruntime")


def test_unsigned_grids_elsewhere(qmodel: PreTrainedModel) -> None:
    unsigned(qmodel)
    assert read(qmodel, "onnxruntime")[SCORES].grid.unsigned
    assert read(qmodel, "openvino")[SCORES].grid.qmax == 255


def test_a_weight_may_be_narrow(qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[f"{QUERY}._weight_quantizer"]._narrow_range = True
    assert read(qmodel, "tensorrt")[f"{QUERY}._weight_quantizer"].grid.narrow_range


def test_long_lists_are_cut(qmodel: PreTrainedModel) -> None:
    for each in qs.quantizers(qmodel).values():
        each._num_bits = 4
    with pytest.raises(qs.ExportError, match=r"^20 quantizers \(.*, \.\.\.\) are of another width"):
        read(qmodel)


def test_pytorch_quantizations_own_calibrators_do_not_matter(qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[SCORES]._calibrator = calib.MaxCalibrator(8, None, False)
    assert SCORES in read(qmodel)


def test_a_range_for_each_channel_of_an_activation_is_refused(qmodel: PreTrainedModel) -> None:
    """An integer product sums over them; the runtimes would say so in words of their own."""
    quantizer = qs.quantizers(qmodel)[f"{QUERY}._input_quantizer"]
    width = qmodel.config.hidden_size
    quantizer.reset_amax()
    quantizer.amax = torch.linspace(1, 2, width).reshape(1, 1, width)
    with pytest.raises(
        qs.ExportError,
        match=rf"^{QUERY}\._input_quantizer has ranges along an axis of what goes into a linear, .* axis: null",
    ):
        read(qmodel)


def test_ranges_of_heads_are_for_what_is_no_product(qmodel: PreTrainedModel) -> None:
    """The runtimes would say so in words of their own, or take nothing of it in integers."""
    quantizer = qs.quantizers(qmodel)[SCORES]
    quantizer.reset_amax()
    quantizer.amax = torch.linspace(1, 2, 4).reshape(1, 4, 1, 1)
    assert quantizer.provenance is not None
    for operator in ("matmul", "linear"):  # the latter as a function, in a block's own code
        quantizer.provenance = quantizer.provenance._replace(operand=f"{operator}(x)")
        with pytest.raises(qs.ExportError, match=rf"^{SCORES} has ranges .* goes into a {operator}, .* null"):
            read(qmodel)
    quantizer.provenance = quantizer.provenance._replace(operand="softmax(x)")
    for target in ("openvino", "tensorrt"):
        with pytest.raises(qs.ExportError, match=rf"^{SCORES} has ranges along an axis of an activation, and "):
            read(qmodel, target)
    assert read(qmodel, "onnxruntime")[SCORES].axis == -3


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [QUERY, "embeddings.word_embeddings"])
def test_a_weight_that_is_broken_is_named(place: str, value: float) -> None:
    """The certificate blamed the runtime; a table is one, too."""
    qmodel = calibrated(rules="onnxruntime", num_hidden_layers=1, vocab_size=1100)
    with torch.no_grad():
        qmodel.get_submodule(place).weight[0, 0] = value
    for act in (read, qs.freeze):
        with pytest.raises(qs.CalibrationError, match=rf"the weight of {place} has a NaN or an infinite value"):
            act(qmodel)
