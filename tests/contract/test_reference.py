"""Contract 2: bit-equal to the real QDQBERT, which computes on the spot what is compared (reference_run.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from golden_case import ACROSS_VERSIONS, Golden, assert_equal, flat, target_of
from pytorch_quantization import calib
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.calib import histogram as reference_histogram
from pytorch_quantization.tensor_quant import QuantDescriptor

import qdq_surgery as qs
from qdq_surgery.numerics.range_methods import entropy_amax
from reference_cases import AMAX, CASES

pytestmark = pytest.mark.usefixtures("threads_of_the_reference")


@pytest.fixture(scope="module", params=[case.name for case in CASES])
def golden(request: pytest.FixtureRequest, reference: Path) -> Golden:
    return Golden(reference / f"{request.param}.safetensors")


def test_quantizers_have_the_names_of_qdqbert(golden: Golden) -> None:
    assert set(qs.quantizers(golden.converted())) == set(golden.group("amax"))


def test_outputs_and_loss_are_bit_equal(golden: Golden) -> None:
    qmodel = golden.calibrated()
    output = qmodel(**golden.arguments(), output_hidden_states=True, output_attentions=True)
    found, wanted = flat(output), golden.group("legacy")
    if "loss" in wanted:
        assert_equal(found, {"loss": wanted["loss"]}, tolerance=ACROSS_VERSIONS)
        found["loss"] = target_of(golden, output).detach()
    assert_equal(found, wanted, tolerance=0.0)


def test_gradients_are_bit_equal(golden: Golden) -> None:
    qmodel = golden.calibrated()
    target_of(golden, qmodel(**golden.arguments())).backward()
    gradients = {name: p.grad for name, p in qmodel.named_parameters() if p.grad is not None}
    assert_equal(gradients, golden.group("gradients"), tolerance=0.0)


def test_cached_step_is_bit_equal(golden: Golden) -> None:
    wanted = golden.group("cached")
    if not wanted:
        return
    qmodel = golden.calibrated()
    batch = {name: value for name, value in golden.group("batch").items() if name in ("input_ids", "token_type_ids")}
    with torch.no_grad():
        start = {name: value[:, :-1] for name, value in batch.items()}
        cache = qmodel(**start, **golden.group("memory"), use_cache=True).past_key_values
        last = {name: value[:, -1:] for name, value in batch.items()}
        step = qmodel(**last, **golden.group("memory"), past_key_values=cache, use_cache=True)
    assert_equal({"logits": step.logits}, wanted, tolerance=0.0)


def test_native_fake_quant(golden: Golden) -> None:
    qmodel = golden.calibrated()
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.use_fb_fake_quant = True
    with torch.no_grad():
        assert_equal(flat(qmodel(**golden.arguments())), golden.group("native"), tolerance=ACROSS_VERSIONS)


def test_float_path(golden: Golden) -> None:
    qmodel = golden.calibrated()
    with torch.no_grad(), qs.quantization_disabled(qmodel):
        assert_equal(flat(qmodel(**golden.arguments())), golden.group("float"), tolerance=ACROSS_VERSIONS)


def calibrated_here(golden: Golden, theirs: bool) -> dict[str, torch.Tensor | None]:
    """Ranges from the case's data, by the loop of QDQBERT's documentation.

    Args:
        theirs: With pytorch-quantization's own histogram calibrators in the quantizers.
    """
    method = golden.meta["calibrator"]
    quant_nn.QuantLinear.set_default_quant_desc_input(
        QuantDescriptor(num_bits=8, calib_method="max" if method == "max" else "histogram")
    )
    qmodel = golden.converted()
    for quantizer in qs.quantizers(qmodel).values():
        if theirs and isinstance(quantizer._calibrator, calib.HistogramCalibrator):
            quantizer._calibrator = calib.HistogramCalibrator(8, None, False)
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        for index in range(2):
            qmodel(**golden.group(f"calibration/{index}"), **golden.group("memory"))
    for name, quantizer in qs.quantizers(qmodel).items():
        quantizer.load_calib_amax(**AMAX["max" if name.endswith("_weight_quantizer") else method])
    return {name: quantizer.amax for name, quantizer in qs.quantizers(qmodel).items()}


#: Each calibrator, and what an encoder alone does not have; other heads stand on the same.
CALIBRATED = ("model", "model-percentile", "model-entropy", "multiple-choice", "decoder-cross")


@pytest.mark.parametrize("golden", CALIBRATED, indirect=True)
@pytest.mark.usefixtures("default_descriptors")
def test_calibration_finds_the_same_ranges(golden: Golden) -> None:
    assert_equal(calibrated_here(golden, theirs=True), golden.group("amax"), tolerance=ACROSS_VERSIONS)


@pytest.mark.parametrize("golden", [name for name in CALIBRATED if name != "model-entropy"], indirect=True)
@pytest.mark.usefixtures("default_descriptors")
def test_own_calibrators_agree_but_for_the_grid(golden: Golden) -> None:
    """pytorch-quantization's bins are 1/2048 of the first batch's largest value, ours of the next power of two.

    On another grid another candidate is the entropy's best: test_own_entropy_is_that_of_the_reference.
    """
    rtol = 0.0 if golden.meta["calibrator"] == "max" else 1e-3  # one bin of each
    found, wanted = calibrated_here(golden, theirs=False), golden.group("amax")
    assert found.keys() == wanted.keys()
    for name, amax in found.items():
        assert amax is not None
        close = 0.0 if name.endswith("_weight_quantizer") else rtol
        assert torch.allclose(amax, wanted[name], rtol=close, atol=ACROSS_VERSIONS), name


@pytest.mark.slow
def test_own_entropy_is_that_of_the_reference(reference: Path) -> None:
    """On what the quantizers saw: pytorch-quantization's own function finds the same range on our histograms.

    In a quarter of the bins: that function is a loop in Python. Whole searches: tests/numerics/test_range_methods.py.
    """
    golden = Golden(reference / "model-entropy.safetensors")
    qmodel = golden.converted()
    batches = [{**golden.group(f"calibration/{index}"), **golden.group("memory")} for index in range(2)]
    seen = qs.collect(qmodel, batches).seen
    for name in [*seen][::14]:
        histogram = seen[name].histogram
        assert histogram is not None
        counts, edges = histogram.table()
        counts, edges = counts.reshape(-1, 4).sum(1), edges[::4]
        wanted = reference_histogram._compute_amax_entropy(counts.numpy().copy(), edges.numpy(), 8, False)
        assert entropy_amax(counts, edges) == pytest.approx(float(wanted), rel=1e-6), name


def test_the_comparer_can_fail() -> None:
    with pytest.raises(AssertionError, match="differs by"):
        assert_equal({"a": torch.ones(2)}, {"a": torch.tensor([1.0, 1.0 + 1e-7])}, tolerance=0.0)
