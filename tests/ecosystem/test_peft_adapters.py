"""LoRA on converted models: adapters in float beside quantized linears, and the quantizers stay in the path."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import EVERY_HEAD, batch_for, build
from ecosystem import CLASSIFIER, assert_equal, calibrated, called, ranges, state
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from training_task import Texts, arguments
from transformers import PreTrainedModel, Trainer

import qdq_surgery as qs
from qdq_surgery.trainer import QATTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
    # PEFT asks for it under the name that transformers 5.23 deprecates.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

TARGETS = ["query", "value", "dense"]


def config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"task_type": "SEQ_CLS", "r": 4, "target_modules": TARGETS, **options})


def random_adapters(model: nn.Module, seed: int = 0, size: float = 0.3) -> None:
    """Adapters start as zero: give them something to say, the same whatever has run before."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:  # as PEFT draws them
                nn.init.kaiming_uniform_(parameter, a=5**0.5, generator=generator)
            if "lora_B" in name:
                parameter.copy_(size * torch.randn(parameter.shape, generator=generator))


def base_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names that they have without adapters; the adapters' own are left out."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in tensors.items()
        if "lora_" not in name and ".modules_to_save." not in name
    }


def by_peft(qmodel: PreTrainedModel, **options: Any) -> nn.Module:
    return get_peft_model(qmodel, config(**options))


def by_transformers(qmodel: PreTrainedModel, **options: Any) -> nn.Module:
    qmodel.add_adapter(config(**options))
    return qmodel.eval()


WAYS = pytest.mark.parametrize("way", [by_peft, by_transformers])


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        found: Tensor = model(**batch).logits
    return found


# Training ------------------------------------------------------------------------------------------------------------


@WAYS
def test_adapters_train_and_nothing_else(way: Callable[..., nn.Module]) -> None:
    qmodel = calibrated()
    batch = batch_for(qmodel, (4, 6), labels=True)
    start, before = logits(qmodel, batch), state(qmodel)
    model = way(qmodel, modules_to_save=None)
    assert torch.equal(logits(model, batch), start)
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 1e-2)
    losses = []
    for _ in range(8):
        torch.manual_seed(0)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    after = base_names(dict(model.state_dict()))
    head = ("classifier.", "modules_to_save")  # PEFT trains the head of a classifier, too
    kept = {name: value for name, value in before.items() if not name.startswith(head)}
    assert_equal({name: after[name] for name in kept}, kept)
    assert base_names(called(model, batch)) == called(calibrated(), batch)  # type: ignore[arg-type]
    assert not torch.equal(logits(model, batch), start)


@pytest.mark.parametrize(
    ("model_type", "head"),
    # PEFT takes every linear but a head that it finds by its name. One of each kind of attention and of layer.
    [
        each
        for each in EVERY_HEAD
        if each[1].endswith("ForSequenceClassification")
        and each[0] in ("bert", "albert", "mobilebert", "mpnet", "deberta-v2", "modernbert")
    ],
    ids=lambda value: value if value[0].isupper() else "",
)
def test_every_quantizer_runs_as_before(model_type: str, head: str) -> None:
    qmodel = calibrated(model_type, head, num_hidden_layers=1)
    batches = [batch_for(qmodel, (3, 6)), batch_for(qmodel, (2, 9), mask=False)]
    wanted = [logits(qmodel, batch) for batch in batches]
    counts = [called(qmodel, batch) for batch in batches]
    model = get_peft_model(qmodel, config(target_modules="all-linear"))
    for batch, count, value in zip(batches, counts, wanted, strict=True):
        assert torch.equal(logits(model, batch), value)  # adapters are zero at first
        with torch.no_grad():
            found = called(model, batch)
        assert base_names(found) == count  # type: ignore[arg-type]
    random_adapters(model)
    assert not torch.equal(logits(model, batches[0]), wanted[0])
    with model.disable_adapter():
        assert torch.equal(logits(model, batches[0]), wanted[0])
    model.train()
    model(**batch_for(qmodel, (2, 5), labels=True)).loss.backward()
    assert all(each.grad is not None for each in model.parameters() if each.requires_grad)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"target_parameters": ["query.weight"], "target_modules": []}])
def test_other_kinds_of_adapters(options: dict[str, Any]) -> None:
    """One that scales the weight's columns; one that adds to the parameter itself, before its quantizer."""
    qmodel = calibrated()
    batch = batch_for(qmodel, (3, 6))
    counts, start = called(qmodel, batch), logits(qmodel, batch)
    model = get_peft_model(qmodel, config(**options))
    random_adapters(model)
    assert base_names(called(model, batch)) == counts  # type: ignore[arg-type]
    assert not torch.equal(logits(model, batch), start)


@pytest.mark.parametrize("trainer", [Trainer, QATTrainer])
@WAYS
def test_trainers_train_adapters(tmp_path: Path, trainer: type[Trainer], way: Callable[..., nn.Module]) -> None:
    model = way(calibrated())
    before = base_names(ranges(model))
    texts = Texts()
    made = trainer(model, arguments(tmp_path, max_steps=8, learning_rate=1e-2), train_dataset=texts, eval_dataset=texts)
    first = made.evaluate()["eval_loss"]
    made.train()
    assert made.evaluate()["eval_loss"] < first
    assert_equal(base_names(ranges(model)), before)
    made.save_model(str(tmp_path / "saved"))
    assert (tmp_path / "saved" / "adapter_model.safetensors").exists()


# Files ---------------------------------------------------------------------------------------------------------------


def test_an_adapter_is_saved_and_loaded(tmp_path: Path) -> None:
    model = get_peft_model(calibrated(), config())
    random_adapters(model)
    batch = batch_for(model, (3, 6))
    wanted = logits(model, batch)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(calibrated(), str(tmp_path))
    assert torch.equal(logits(again, batch), wanted)
    assert len(called(again, batch)) == len(qs.quantizers(again))
    assert_equal(ranges(again), ranges(model))
    other = calibrated()
    other.load_adapter(str(tmp_path), adapter_name="mine")  # transformers' own way
    assert torch.equal(logits(other, batch), wanted)
    other.disable_adapters()
    assert torch.equal(logits(other, batch), logits(calibrated(), batch))
    other.enable_adapters()
    assert torch.equal(logits(other, batch), wanted)
    assert torch.equal(logits(copy.deepcopy(other), batch), wanted)


def test_two_adapters_take_turns() -> None:
    model = get_peft_model(calibrated(), config())
    random_adapters(model)
    batch = batch_for(model, (3, 6))
    first = logits(model, batch)
    model.add_adapter("second", config())
    model.set_adapter("second")
    assert torch.equal(logits(model, batch), logits(calibrated(), batch))
    model.set_adapter("default")
    assert torch.equal(logits(model, batch), first)


# Merging -------------------------------------------------------------------------------------------------------------


def test_merged_adapters_leave_a_converted_model() -> None:
    qmodel = calibrated()
    names, before = list(qs.quantizers(qmodel)), ranges(qmodel)
    model = get_peft_model(qmodel, config())
    random_adapters(model)
    batch = batch_for(qmodel, (3, 6))
    wanted = logits(model, batch)
    with qs.quantization_disabled(model):
        floats = logits(model, batch)
    merged = model.merge_and_unload()
    assert merged is qmodel
    assert list(qs.quantizers(merged)) == names
    assert len(called(merged, batch)) == len(names)
    with qs.quantization_disabled(merged):
        # The adapter's two products have become part of one: float32 rounding.
        assert torch.allclose(logits(merged, batch), floats, rtol=0, atol=1e-5)
    # Merging moves weights and no range: what has grown beyond its range is cut off.
    assert_equal(ranges(merged), before)
    stale = logits(merged, batch)
    cut = [
        name
        for name, module in merged.named_modules()
        if getattr(module, "_weight_quantizer", None) is not None
        and bool((module.weight.abs() > module._weight_quantizer.amax).any())
    ]
    assert cut
    qs.recalibrate_weights(merged)
    for name, amax in ranges(merged).items():
        if name.endswith("_weight_quantizer"):
            weight = merged.get_submodule(name.rpartition(".")[0]).weight.detach()
            assert torch.equal(amax, weight.abs().amax(1, keepdim=True)), name
        else:
            assert torch.equal(amax, before[name]), name
    found = logits(merged, batch)
    assert float((found - wanted).norm()) < float((stale - wanted).norm())
    # A wide bound: what the adapter adds is quantized with the weight now.
    assert torch.cosine_similarity(found.flatten(), wanted.flatten(), dim=0) > 0.97


def test_unloading_takes_the_adapters_out() -> None:
    qmodel = calibrated()
    batch = batch_for(qmodel, (3, 6))
    start, before = logits(qmodel, batch), state(qmodel)
    model = get_peft_model(qmodel, config(modules_to_save=[]))
    random_adapters(model)
    assert torch.equal(logits(model.unload(), batch), start)
    assert_equal(state(qmodel), before)


# Ranges --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rules", ["qdqbert", "fuse-qkv"])
@WAYS
def test_calibrating_beside_adapters(way: Callable[..., nn.Module], rules: str) -> None:
    """Adapters that are zero change no range, and groups that share one stay groups, whatever wraps their linears."""
    wanted = ranges(calibrated(rules=rules))
    model = way(calibrated(rules=rules))
    for each in qs.quantizers(model).values():
        each.amax.mul_(3.0)
    qs.calibrate(model, [batch_for(calibrated(), (4, 8))])
    assert_equal(base_names(ranges(model)), wanted)
    for each in qs.quantizers(model).values():
        each.amax.mul_(3.0)
    qs.recalibrate_weights(model)
    weights = {name: amax for name, amax in wanted.items() if name.endswith("_weight_quantizer")}
    found = base_names(ranges(model))
    assert_equal({name: found[name] for name in weights}, weights)


@pytest.mark.parametrize("rules", ["qdqbert", "fuse-qkv"])
@WAYS
def test_ranges_are_learned_beside_adapters(way: Callable[..., nn.Module], rules: str) -> None:
    plain, model = calibrated(rules=rules), way(calibrated(rules=rules))
    for each in (plain, model):
        assert qs.learn_ranges(each, weights=True)
    learning = {name: each for name, each in qs.quantizers(model).items() if each.learns}
    assert sorted(base_names(learning)) == sorted(  # type: ignore[arg-type]
        name for name, each in qs.quantizers(plain).items() if each.learns
    )
    model.train()
    model(**batch_for(plain, (3, 6), labels=True)).loss.backward()
    assert all(each.amax.grad is not None for each in learning.values())
    qs.fix_ranges(model)
    assert not any(each.learns for each in qs.quantizers(model).values())


def test_what_is_not_converted_is_named_inside_peft() -> None:
    model = get_peft_model(build("bert", CLASSIFIER), config())
    with pytest.raises(qs.ModelError, match="this BertForSequenceClassification is not converted"):
        qs.calibrate(model, [batch_for(model, (2, 5))])
    with pytest.raises(qs.ModelError, match="found a PeftModelForSequenceClassification, wanted a Hugging Face"):
        qs.convert(model)  # type: ignore[type-var]


def test_the_plan_is_that_of_the_model_inside() -> None:
    model = get_peft_model(calibrated(), config())
    for ask in (qs.explain, lambda each: qs.export_onnx(each, "model.onnx", batch_for(model, (2, 5)))):
        with pytest.raises(qs.ModelError, match=r"this PeftModel\w+ is not converted; pass model.get_base_model\(\)"):
            ask(model)
    assert "query" in str(qs.explain(model.get_base_model()))


@WAYS
def test_converting_beside_adapters_is_refused(way: Callable[..., nn.Module]) -> None:
    model = way(build("bert", CLASSIFIER))
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    with pytest.raises(qs.ModelError, match="the model has adapters; convert it first and add them then, or merge"):
        qs.convert(base)
    if isinstance(model, PeftModel):
        assert len(qs.quantizers(qs.convert(model.merge_and_unload()))) == 40
