"""The contract on an NVIDIA GPU. Skipped where there is none: ``pytest tests/contract/test_cuda.py`` on one."""

from __future__ import annotations

import copy
import functools
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, BASE, batch_for, build, kind_of
from comparing import assert_same
from torch import Tensor
from training_task import Texts, arguments, inputs_of
from transformers import AutoModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.numerics.fake_quant import fake_quant, learned_fake_quant
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.numerics.histogram import Histogram
from qdq_surgery.trainer import QATTrainer

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # Said by torch of float32 products, which are not to be rounded here.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
]

TYPES = [architecture.model_type for architecture in ARCHITECTURES]


@pytest.fixture(autouse=True)
def same_every_time(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Sums of gradients in a fixed order, and float32 products in float32."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32 = before


def sequence_head(model_type: str) -> str:
    heads = next(each for each in ARCHITECTURES if each.model_type == model_type).heads()
    return next(head for head in heads if kind_of(head) == "sequence")


def on_gpu(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


def calibrated(model_type: str, head: str, rules: str = "qdqbert") -> PreTrainedModel:
    return copy.deepcopy(_calibrated(model_type, head, rules))


@functools.cache
def _calibrated(model_type: str, head: str, rules: str) -> PreTrainedModel:
    model = build(model_type, head).cuda()
    qmodel = qs.convert(model, rules)
    qs.calibrate(qmodel, [on_gpu(batch_for(model, (3, 9)))])
    return qmodel


def waits(action: Callable[[], object]) -> int:
    """How often the CPU waits for the GPU meanwhile, as torch counts it."""
    action()  # what is made once
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            action()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(each.message) for each in caught)


# Exactness -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", TYPES)
def test_float_exact(model_type: str) -> None:
    """Outputs to the bit in eval mode and with dropout, and the same random numbers."""
    model = build(model_type, sequence_head(model_type)).cuda()
    qmodel = qs.convert(model)
    for training in (False, True):
        model.train(training)
        qmodel.train(training)
        for shape in ((1, 4), (4, 9)):
            assert_same(model, qmodel, on_gpu(batch_for(model, shape, labels=True)), output_hidden_states=True)
            assert_same(model, qmodel, on_gpu(batch_for(model, shape, mask=False)))


@pytest.mark.parametrize("model_type", TYPES)
def test_gradients_of_the_float_model(model_type: str) -> None:
    model = build(model_type, sequence_head(model_type)).cuda().train()
    qmodel = qs.convert(model)
    batch = on_gpu(batch_for(model, (3, 7), labels=True))
    with qs.quantization_disabled(qmodel):
        for each in (model, qmodel):
            torch.manual_seed(3)
            each(**batch).loss.backward()
    found = dict(qmodel.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, found[name].grad), name


def test_conversion_leaves_the_gpus_random_numbers() -> None:
    model = build("bert", "BertModel").cuda()
    before = torch.cuda.get_rng_state()
    qmodel = qs.convert(model)
    qs.calibrate(qmodel, [on_gpu(batch_for(model, (2, 6)))])
    assert torch.equal(torch.cuda.get_rng_state(), before)


GRIDS = [Grid(8, False, True), Grid(8, True, False), Grid(8, True, False, 32), Grid(4, False, True), Grid(16)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def values_and_ranges(dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    values = (torch.randn(64, 257, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    values[0, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 2.5, -2.5])
    yield values, torch.tensor(2.5)
    yield values, torch.tensor([2.5])
    yield values, torch.tensor(0.0)
    yield values, torch.rand(64, 1, generator=torch.Generator().manual_seed(1)) + 0.5
    yield values, torch.rand(257, generator=torch.Generator().manual_seed(2)).clamp(min=0.5) - 0.5
    yield values.t(), torch.tensor(1.0)
    yield values.reshape(4, 16, 257)[:, :0], torch.tensor(1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fake_quantization_is_that_of_the_cpu(grid: Grid, dtype: torch.dtype) -> None:
    for values, amax in values_and_ranges(dtype):
        wanted = fake_quant(values, amax, grid)
        found = fake_quant(values.cuda(), amax.cuda(), grid)
        assert found.dtype == dtype
        torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=0, equal_nan=True)
    # A range may lie on the CPU, as a single number may in torch.
    single = torch.ones(3, dtype=dtype)
    assert torch.equal(
        fake_quant(single.cuda(), torch.tensor(2.0), grid).cpu(), fake_quant(single, torch.tensor(2.0), grid)
    )
    assert bool(fake_quant(torch.tensor([torch.nan]).cuda(), torch.tensor(1.0).cuda(), grid).isnan())


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_gradients_of_fake_quantization_are_those_of_the_cpu(grid: Grid, dtype: torch.dtype, learned: bool) -> None:
    formula = learned_fake_quant if learned else fake_quant
    for values, amax in values_and_ranges(dtype):
        if learned and not bool(amax.all()):
            continue
        values = torch.where(values.isfinite(), values, 1.0)
        factor = torch.randn(values.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        found = []
        for device in ("cpu", "cuda"):
            x, top = (each.detach().clone().to(device) for each in (values, amax))
            x.requires_grad_(), top.requires_grad_(learned)
            (formula(x, top, grid) * factor.to(device)).sum().backward()
            found.append((x.grad, top.grad))
        (wanted, of_amax), (here, on_gpu) = found
        assert here is not None
        assert torch.equal(here.cpu(), wanted)
        if learned:
            # float32 sums in another order
            torch.testing.assert_close(on_gpu.cpu(), of_amax, rtol=1e-4, atol=1e-4)


# Ranges --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["qdqbert", "qdqbert-scaled", "openvino"])
@pytest.mark.parametrize("model_type", TYPES)
def test_ranges_are_those_of_the_cpu(model_type: str, rules: str) -> None:
    """Within 1 in 1,000, as both sum in other orders; a scale that rounds to another power would be off by 1.4."""
    model = build(model_type, BASE[model_type])
    here = qs.convert(model, rules)
    there = qs.convert(copy.deepcopy(model).cuda(), rules)
    batches = [batch_for(model, shape) for shape in ((3, 9), (2, 5))]
    qs.calibrate(here, batches, "max")
    qs.calibrate(there, batches, "max")  # batches may lie elsewhere
    found = qs.quantizers(there)
    for name, quantizer in qs.quantizers(here).items():
        amax = found[name].amax
        assert (amax is None) == (quantizer.amax is None), name
        if amax is not None:
            assert amax.is_cuda
            torch.testing.assert_close(amax.cpu(), quantizer.amax, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("method", ["percentile", "mse", "entropy", "best"])
def test_methods_find_the_ranges_of_the_cpu(method: str) -> None:
    model = build("bert", "BertModel")
    here, there = qs.convert(model), qs.convert(copy.deepcopy(model).cuda())
    batches = [batch_for(model, shape) for shape in ((3, 9), (2, 5))]
    qs.calibrate(here, batches, method)
    qs.calibrate(there, batches, method)
    found = qs.quantizers(there)
    # A value that falls into the next bin moves a range by up to a bin, 1 in 1,000 of the largest or so.
    for name, quantizer in qs.quantizers(here).items():
        if quantizer.amax is not None:
            torch.testing.assert_close(found[name].amax.cpu(), quantizer.amax, rtol=1e-2, atol=1e-6, msg=name)


@pytest.mark.parametrize("histograms", [False, True], ids=["maxima", "histograms"])
def test_collecting_waits_for_the_gpu_as_often_whatever_the_number_of_layers(histograms: bool) -> None:
    counts = []
    for layers in (1, 4):
        model = build("bert", "BertModel", num_hidden_layers=layers).cuda()
        qmodel = qs.convert(model)
        few, many = ([on_gpu(batch_for(model, (3, 9)))] * times for times in (1, 3))
        counts.append(
            [waits(functools.partial(qs.collect, qmodel, each, histograms=histograms)) for each in (few, many)]
        )
    (few, many), deeper = counts
    assert many > few  # so that what is counted is there: once for each batch, whether all is finite
    # For each batch as often; what a pass does once, at its end, may ask for each quantizer.
    assert many - few == deeper[1] - deeper[0]


def test_histograms_count_as_on_the_cpu() -> None:
    values = torch.randn(300, 700, generator=torch.Generator().manual_seed(0)) * 3
    for mask in (None, torch.randn(300, 1, generator=torch.Generator().manual_seed(1)) > 0):
        wanted = Histogram.of(values, mask) + Histogram.of(values * 100)
        found = Histogram.of(values.cuda(), None if mask is None else mask.cuda()) + Histogram.of(values.cuda() * 100)
        assert torch.equal(found.counts.cpu(), wanted.counts)
        assert int(found.exponent) == int(wanted.exponent)
        assert float(found.amax) == float(wanted.amax)


@pytest.mark.parametrize("rules", ["qdqbert", "qdqbert-scaled", "openvino"])
def test_a_quantized_step_waits_no_more_than_a_float_one(rules: str) -> None:
    qmodel = calibrated("bert", "BertForSequenceClassification", rules)
    model = build("bert", "BertForSequenceClassification").cuda()
    batch = on_gpu(batch_for(model, (3, 9), labels=True))

    def step(each: PreTrainedModel) -> None:
        each(**batch).loss.backward()

    for training in (False, True):
        model.train(training)
        qmodel.train(training)
        assert waits(lambda: step(qmodel)) <= waits(lambda: step(model))


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_a_quantized_forward_can_be_a_cuda_graph(learned: bool) -> None:
    qmodel = calibrated("bert", "BertModel")
    if learned:
        qs.learn_ranges(qmodel, weights=True)
    # The encoder: what transformers does with a mask before it copies from the CPU, which no graph can hold.
    states = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0)).cuda()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        wanted = qmodel.encoder(states).last_hidden_state
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                qmodel.encoder(states)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = qmodel.encoder(states).last_hidden_state
        graph.replay()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


# Training, precision, copies -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    qmodel = calibrated("bert", "BertForSequenceClassification").train()
    batch = on_gpu(batch_for(qmodel, (3, 9), labels=True))
    with torch.autocast("cuda", dtype=dtype):
        loss = qmodel(**batch).loss
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in qmodel.parameters())
    assert all(each.amax is None or each.amax.dtype == torch.float32 for each in qs.quantizers(qmodel).values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("model_type", TYPES)
def test_half_precision_is_float_exact(model_type: str, dtype: torch.dtype) -> None:
    model = build(model_type, BASE[model_type]).cuda().to(dtype)
    assert_same(model, qs.convert(model), on_gpu(batch_for(model, (3, 9))))


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_trainer_with_bf16(tmp_path: Path, learned: bool) -> None:
    qmodel = qs.convert(build("bert", "BertForSequenceClassification"))
    texts = Texts()
    qs.calibrate(qmodel, inputs_of(texts))
    if learned:
        qs.learn_ranges(qmodel)
    options: dict[str, Any] = {"use_cpu": False, "bf16": True, "max_steps": 12}
    trainer = QATTrainer(qmodel, arguments(tmp_path, **options), train_dataset=texts, eval_dataset=texts)
    torch.use_deterministic_algorithms(False)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert qmodel.device.type == "cuda"


def test_save_and_reload(tmp_path: Path) -> None:
    qmodel = calibrated("bert", "BertModel", "qdqbert-scaled")
    qmodel.save_pretrained(tmp_path)
    batch = on_gpu(batch_for(qmodel, (3, 9)))
    wanted = qmodel(**batch).last_hidden_state
    moved = AutoModel.from_pretrained(tmp_path).cuda()
    placed = AutoModel.from_pretrained(tmp_path, device_map="cuda")
    for each in (moved, placed, copy.deepcopy(qmodel)):
        assert {t.device.type for t in (*each.parameters(), *each.buffers())} == {"cuda"}
        assert torch.equal(each.eval()(**batch).last_hidden_state, wanted)


def test_a_converted_model_moves() -> None:
    qmodel = calibrated("bert", "BertModel")
    batch = batch_for(qmodel, (3, 9))
    wanted = qmodel(**on_gpu(batch)).last_hidden_state.cpu()
    found = qmodel.cpu()(**batch).last_hidden_state
    # Sums in another order; where one falls on the other side of a half, the value is a step away.
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.999
    assert torch.equal(qmodel.cuda()(**on_gpu(batch)).last_hidden_state.cpu(), wanted)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode: str) -> None:
    qmodel = calibrated("bert", "BertModel")
    batch = on_gpu(batch_for(qmodel, (3, 9)))
    torch.use_deterministic_algorithms(False)
    with torch.no_grad():
        wanted = qmodel(**batch).last_hidden_state
        compiled = torch.compile(qmodel, mode=mode)
        for _ in range(3):
            found = compiled(**batch).last_hidden_state.clone()
    assert torch.nn.functional.cosine_similarity(found.flatten(), wanted.flatten(), 0) > 0.999


def test_weights_are_rounded_for_their_products() -> None:
    here = calibrated("bert", "BertModel", "qdqbert-scaled")
    there = copy.deepcopy(here).cpu()
    batches = [on_gpu(batch_for(here, (8, 9)))]
    found, wanted = qs.round_weights(here, batches), qs.round_weights(there, batches)
    assert any(each.rounding is not None and each.rounding.is_cuda for each in qs.quantizers(here).values())
    for ours, theirs in zip(found.weights, wanted.weights, strict=True):
        # Sums in another order turn ties, after which the columns behind them differ, too.
        assert ours.nearest == pytest.approx(theirs.nearest, rel=0.01), ours.quantizer
        assert ours.adapted == pytest.approx(theirs.adapted, rel=0.3), ours.quantizer
    again = copy.deepcopy(here).cpu().to("cuda")
    assert all(each.rounding is None or each.rounding.is_cuda for each in qs.quantizers(again).values())


def test_equalize_and_sensitivity() -> None:
    here = calibrated("bert", "BertModel", "qdqbert-scaled")
    batches = [on_gpu(batch_for(here, (3, 9)))]
    assert qs.equalize(here, batches).scales
    found = qs.sensitivity(here, batches, sites=False)
    wanted = qs.sensitivity(copy.deepcopy(here).cpu(), batches, sites=False)
    costs = {(cost.what, cost.name, cost.layers): cost.alone for cost in wanted.costs}
    assert costs.keys() == {(cost.what, cost.name, cost.layers) for cost in found.costs}
    for cost in found.costs:
        # Of a tiny model: where a sum in another order falls on the other side of a half, a value is a step away.
        assert cost.alone == pytest.approx(costs[cost.what, cost.name, cost.layers], rel=0.2, abs=1e-5), cost.name


def test_export_from_the_gpu_is_that_from_the_cpu(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    qmodel = calibrated("bert", "BertModel")
    batch = on_gpu(batch_for(qmodel, (3, 9)))
    qs.export_onnx(qmodel, tmp_path / "gpu.onnx", batch)
    assert qmodel.device.type == "cuda"
    qs.export_onnx(qmodel.cpu(), tmp_path / "cpu.onnx", batch)
    assert (tmp_path / "gpu.onnx").read_bytes() == (tmp_path / "cpu.onnx").read_bytes()
