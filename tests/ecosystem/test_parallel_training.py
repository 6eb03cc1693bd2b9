"""Converted models in Trainer, accelerate and torch.nn.parallel, as any float model would be used there."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from accelerate import Accelerator, cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.state import AcceleratorState
from architectures import batch_for, build
from ecosystem import CLASSIFIER, assert_equal, calibrated, called, ddp_worker, ranges, state
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training_task import STILL, Texts, arguments, inputs_of
from transformers import PreTrainedModel, Trainer

import qdq_surgery as qs

pytestmark = [
    # torch says so on a machine without a GPU, of the loaders that Trainer and accelerate make.
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

LAYER = "bert.encoder.layer.1.output.dense.weight"


# transformers.Trainer ------------------------------------------------------------------------------------------------


def learned(qmodel: PreTrainedModel) -> PreTrainedModel:
    qs.learn_ranges(qmodel, weights=True)
    return qmodel


def fixed(qmodel: PreTrainedModel) -> PreTrainedModel:
    return qmodel


KINDS = pytest.mark.parametrize("kind", [fixed, learned])


@KINDS
def test_trainer_trains_evaluates_and_predicts(tmp_path: Path, kind: Callable[..., Any]) -> None:
    qmodel = kind(calibrated())
    before, weights, texts = ranges(qmodel), state(qmodel), Texts()
    options: dict[str, Any] = {"max_steps": 12, "per_device_eval_batch_size": 16}
    trainer = Trainer(qmodel, arguments(tmp_path, **options), train_dataset=texts, eval_dataset=texts)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    found = trainer.predict(texts)  # type: ignore[arg-type]
    qmodel.eval()
    batch = inputs_of(texts)[0]
    with torch.no_grad():
        assert torch.equal(torch.as_tensor(found.predictions), qmodel(**batch).logits)  # one batch, as in predict
    assert len(called(qmodel, batch)) == len(before)
    assert not torch.equal(state(qmodel)[LAYER], weights[LAYER])
    if kind is fixed:
        assert_equal(ranges(qmodel), before)
    else:
        moved = [name for name, amax in ranges(qmodel).items() if not torch.equal(amax, before[name])]
        assert len(moved) > len(before) / 2


@KINDS
def test_trainer_resumes_as_if_it_had_gone_on(tmp_path: Path, kind: Callable[..., Any]) -> None:
    straight = kind(calibrated())  # with dropout, whose random numbers a checkpoint keeps too
    Trainer(
        straight, arguments(tmp_path / "straight", save_strategy="steps", save_steps=2), train_dataset=Texts()
    ).train()
    resumed = kind(calibrated())
    with torch.no_grad():  # nothing but the checkpoint may count
        for parameter in resumed.parameters():
            parameter.mul_(1.5)
    for each in qs.quantizers(resumed).values():
        each.amax.data.mul_(3.0)
    trainer = Trainer(resumed, arguments(tmp_path / "resumed"), train_dataset=Texts())
    trainer.train(resume_from_checkpoint=str(tmp_path / "straight" / "checkpoint-2"))
    assert trainer.state.global_step == 4
    assert_equal(state(resumed), state(straight))
    assert not torch.equal(state(resumed)[LAYER], state(calibrated())[LAYER])


def test_trainer_loads_the_best_model_and_saves_it(tmp_path: Path) -> None:
    qmodel = learned(calibrated())
    steps: dict[str, Any] = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss"}
    # So high a rate that the last step is not the best.
    options = arguments(tmp_path, **steps, **best, learning_rate=0.3, max_steps=3)
    trainer = Trainer(qmodel, options, train_dataset=Texts(), eval_dataset=Texts())
    trainer.train()
    losses = {int(each["step"]): each["eval_loss"] for each in trainer.state.log_history if "eval_loss" in each}
    assert min(losses, key=lambda step: losses[step]) != 3
    assert trainer.state.best_model_checkpoint is not None
    wanted = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    assert_equal(state(qmodel), wanted)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses.values()), abs=1e-6)  # printed digits
    trainer.save_model(str(tmp_path / "saved"))
    assert_equal(load_file(tmp_path / "saved" / "model.safetensors"), wanted)


# accelerate ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps its precision for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def prepared(qmodel: PreTrainedModel, precision: str, steps: int = 1) -> tuple[Accelerator, Any, Any, Any]:
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=steps)
    optimizer = torch.optim.AdamW(qmodel.parameters(), 1e-3)
    return accelerator, *accelerator.prepare(qmodel, optimizer, DataLoader(Texts(), 4))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_accumulates_gradients(precision: str) -> None:
    wanted, qmodel = learned(calibrated(**STILL)).train(), learned(calibrated(**STILL)).train()
    optimizer = torch.optim.AdamW(wanted.parameters(), 1e-3)
    for index, batch in enumerate(DataLoader(Texts(), 4)):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = wanted(**batch).loss
        (loss.float() / 2).backward()
        if index % 2 == 1:
            optimizer.step()
            optimizer.zero_grad()
    accelerator, model, optimizer, loader = prepared(qmodel, precision, steps=2)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert unwrapped is qmodel
    assert_equal(state(unwrapped), state(wanted))
    batch = inputs_of(Texts())[0]
    assert len(called(unwrapped, batch)) == len(qs.quantizers(unwrapped))
    pickle.loads(pickle.dumps(unwrapped))


@pytest.mark.usefixtures("fresh_accelerate")
@pytest.mark.parametrize("head", [CLASSIFIER, "BertForMaskedLM"])
def test_accelerate_saves_and_loads_its_state(head: str, tmp_path: Path) -> None:
    accelerator, model, optimizer, _ = prepared(learned(calibrated(head=head)).train(), "no")
    batch = batch_for(model, (4, 6), labels=True)

    def step() -> None:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()

    step()
    accelerator.save_state(str(tmp_path))
    step()  # dropout: from here on, random numbers count
    wanted = state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.0)
    accelerator.load_state(str(tmp_path))
    step()
    assert_equal(state(model), wanted)


CPU = torch.device("cpu")
MIXED = {
    "bert.embeddings": "cpu",
    "bert.encoder.layer.0": "cpu",
    "bert.encoder.layer.1": "disk",
    "bert.pooler": "cpu",
    "classifier": "disk",
}


def on_cpu(model: nn.Module, folder: Path, **options: Any) -> None:
    del folder
    cpu_offload(model, CPU, **options)


def on_disk(model: nn.Module, folder: Path, **options: Any) -> None:
    disk_offload(model, str(folder), CPU, **options)


def on_both(model: nn.Module, folder: Path, **options: Any) -> None:
    dispatch_model(model, MIXED, main_device="cpu", offload_dir=str(folder), **options)


@pytest.mark.parametrize("offload", [on_cpu, on_disk, on_both])
@pytest.mark.parametrize(
    ("options", "kind"), [({}, learned), ({"offload_buffers": True}, fixed)], ids=["weights", "ranges-too"]
)
@torch.no_grad()
def test_offloaded_models(
    offload: Callable[..., None], options: dict[str, Any], kind: Callable[..., Any], tmp_path: Path
) -> None:
    assert_offloads(kind(calibrated()), functools.partial(offload, **options), tmp_path)


@pytest.mark.parametrize(
    ("model_type", "head"),
    # deberta-v2 is not among them: float or not, it reads a weight that no hook of accelerate's brings back.
    [("albert", "AlbertModel"), ("mpnet", "MPNetModel"), ("modernbert", "ModernBertModel")],
)
@torch.no_grad()
def test_offloaded_architectures(model_type: str, head: str, tmp_path: Path) -> None:
    assert_offloads(calibrated(model_type, head), on_disk, tmp_path)


def assert_offloads(qmodel: PreTrainedModel, offload: Callable[..., None], folder: Path) -> None:
    """Outputs are equal to the bit, in calls that are recorded under accelerate's hooks, too."""
    batches: list[dict[str, Any]] = [
        batch_for(qmodel, (2, 5)),
        {**batch_for(qmodel, (3, 7), mask=False), "output_attentions": True},
    ]
    wanted = [qmodel(**batch)[0] for batch in batches]
    qmodel = pickle.loads(pickle.dumps(fresh(qmodel)))  # a pickle leaves what was recorded behind
    offload(qmodel, folder)
    assert any(parameter.is_meta for parameter in qmodel.parameters())
    for batch, value in zip(batches, wanted, strict=True):
        assert torch.equal(qmodel(**batch)[0], value)
    assert len(called(qmodel, batches[0])) == len(qs.quantizers(qmodel))


def fresh(qmodel: PreTrainedModel) -> PreTrainedModel:
    """Without the hooks that transformers leaves behind when attentions were asked for, and that no pickle takes."""
    for module in qmodel.modules():
        module._forward_hooks.clear()
    return qmodel


@pytest.mark.parametrize(
    "call",
    [
        lambda qmodel: qs.calibrate(qmodel, [batch_for(qmodel, (2, 5))]),
        lambda qmodel: qs.collect(qmodel, [batch_for(qmodel, (2, 5))]),
        qs.recalibrate_weights,
        qs.learn_ranges,
        qs.fix_ranges,
    ],
    ids=["calibrate", "collect", "recalibrate", "learn", "fix"],
)
def test_ranges_of_an_offloaded_model_cannot_be_set(call: Callable[..., Any]) -> None:
    qmodel = calibrated()
    before = state(qmodel)
    cpu_offload(qmodel, CPU)
    message = r"embeddings\.weight is not in memory .*accelerate has offloaded.*remove_hook_from_submodules"
    with pytest.raises(qs.ModelError, match=message):
        call(qmodel)
    remove_hook_from_submodules(qmodel)
    assert_equal(state(qmodel), before)
    call(qmodel)


def test_a_dispatched_model_is_calibrated() -> None:
    wanted = calibrated()
    # Without what was recorded, so that calls are recorded under the hooks: each value counts once nevertheless.
    qmodel = pickle.loads(pickle.dumps(qs.convert(build("bert", CLASSIFIER))))
    dispatch_model(qmodel, {"": "cpu"}, main_device="cpu", force_hooks=True)
    block = next(module for module in qmodel.modules() if hasattr(module, "add_local_input_quantizer"))
    assert "forward" in vars(block)
    batches = [batch_for(qmodel, (4, 8))]
    found, expected = qs.collect(qmodel, batches), qs.collect(wanted, batches)
    assert found.to_json() == expected.to_json()
    qs.calibrate(qmodel, found)
    assert_equal(ranges(qmodel), ranges(wanted))


def test_an_offloaded_model_is_not_converted() -> None:
    model = build("bert", CLASSIFIER)
    cpu_offload(model, CPU)
    with pytest.raises(qs.ModelError, match=r"word_embeddings.weight has no data \(meta device\); load the weights"):
        qs.convert(model)


# torch.nn.parallel ---------------------------------------------------------------------------------------------------


def replica(model: nn.Module) -> nn.Module:
    """What ``torch.nn.parallel.replicate`` makes for each device, on the CPU: parameters are plain tensors in it."""
    twins = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, twin in twins.items():
        twin._former_parameters = {}
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else twins[child]
        for name, parameter in module._parameters.items():
            if parameter is None:
                twin._parameters[name] = None
            else:
                setattr(twin, name, parameter.detach().clone())
        for name, buffer in module._buffers.items():
            twin._buffers[name] = None if buffer is None else buffer.clone()
    return twins[model]


@KINDS
@pytest.mark.parametrize(
    ("model_type", "head"), [("bert", CLASSIFIER), ("mpnet", "MPNetModel"), ("albert", "AlbertModel")]
)
@torch.no_grad()
def test_data_parallel(model_type: str, head: str, kind: Callable[..., Any]) -> None:
    qmodel = kind(calibrated(model_type, head))
    wrapped, twin = nn.DataParallel(qmodel), replica(qmodel)
    assert not list(twin.parameters())
    for batch in (batch_for(qmodel, (2, 5)), batch_for(qmodel, (3, 9), mask=False)):
        wanted = qmodel(**batch)[0]
        assert torch.equal(wrapped(**batch)[0], wanted)
        assert torch.equal(twin(**batch)[0], wanted)
        assert len(called(twin, batch)) == len(qs.quantizers(qmodel))


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path: Path) -> None:
    qmodel = learned(calibrated(**STILL)).train()
    texts = Texts()
    rows = [texts[index] for index in range(8)]
    batches = [{name: torch.stack([row[name] for row in half]) for name in rows[0]} for half in (rows[:4], rows[4:])]
    torch.multiprocessing.start_processes(
        ddp_worker, (str(tmp_path), qmodel, batches), nprocs=2, start_method=forked.METHOD
    )
    halves: list[dict[str, Tensor]] = []
    for batch in batches:
        twin = copy.deepcopy(qmodel)
        twin(**batch).loss.backward()
        halves.append({name: each.grad for name, each in twin.named_parameters() if each.grad is not None})
    for rank in (0, 1):
        gradients, found, logits = torch.load(tmp_path / f"{rank}.pt")
        assert_equal(found, ranges(qmodel))
        assert gradients.keys() == halves[0].keys()
        for name, gradient in gradients.items():
            # The mean of two is rounded once, wherever it is taken.
            assert torch.allclose(gradient, (halves[0][name] + halves[1][name]) / 2, rtol=0, atol=1e-6), name
        with torch.no_grad():
            assert torch.equal(logits, qmodel.eval()(**batches[0]).logits)
