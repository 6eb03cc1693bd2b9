"""QATTrainer: Hugging Face's Trainer with quantizers; distillation, checkpoints, accumulation, float models."""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import build
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from training_task import STILL, Batch, Texts, arguments, inputs_of
from transformers import PreTrainedModel, TrainingArguments

import qdq_surgery as qs
from qdq_surgery.errors import CalibrationError, ModelError, OptionError
from qdq_surgery.trainer import QATTrainer, distillation_loss

CLASSIFIER = "BertForSequenceClassification"
TAGGER = "BertForTokenClassification"

# torch says so on a machine without a GPU, of the loader that Trainer makes.
pytestmark = pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")


@functools.cache
def _model(head: str, rules: Any, **options: Any) -> PreTrainedModel:
    qmodel = qs.convert(build("bert", head, num_hidden_layers=1, **options), rules, inplace=True)
    qs.calibrate(qmodel, inputs_of(Texts()))
    return qmodel


def calibrated(head: str = CLASSIFIER, rules: Any = "qdqbert", **options: Any) -> PreTrainedModel:
    """A copy, as conversion takes longer."""
    return copy.deepcopy(_model(head, rules, **options))


def ranges(qmodel: nn.Module) -> dict[str, Tensor]:
    return {name: each.amax.detach().clone() for name, each in qs.quantizers(qmodel).items() if each.amax is not None}


def state(qmodel: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in qmodel.state_dict().items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert wanted
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def trained(qmodel: PreTrainedModel, folder: Path, texts: Texts | None = None, **options: Any) -> QATTrainer:
    own = {name: options.pop(name) for name in ("teacher", "temperature", "distill_weight") if name in options}
    trainer = QATTrainer(qmodel, arguments(folder, **options), train_dataset=texts or Texts(), **own)
    trainer.train()
    return trainer


# Training ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_train_evaluate_predict(tmp_path: Path, learned: bool) -> None:
    qmodel = calibrated()
    if learned:
        qs.learn_ranges(qmodel, weights=True)
    before, weights = ranges(qmodel), state(qmodel)
    texts = Texts()
    trainer = QATTrainer(qmodel, arguments(tmp_path, max_steps=12), train_dataset=texts, eval_dataset=texts)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first
    assert trainer.state.global_step == 12
    found = trainer.predict(texts)  # type: ignore[arg-type]
    qmodel.eval()
    with torch.no_grad():
        wanted = qmodel(**inputs_of(texts)[0]).logits
    # In batches of 8 and of 16: float32 rounding, which may move a value to the next step of a grid.
    assert torch.allclose(torch.as_tensor(found.predictions), wanted, rtol=0, atol=0.05)
    moved = [name for name, value in state(qmodel).items() if not torch.equal(value, weights[name])]
    assert "bert.encoder.layer.0.output.dense.weight" in moved
    if learned:
        changed = [name for name, amax in ranges(qmodel).items() if not torch.equal(amax, before[name])]
        assert len(changed) > len(before) / 2
    else:
        assert_equal(ranges(qmodel), before)


def test_a_quantizer_without_a_range_is_refused(tmp_path: Path) -> None:
    qmodel = calibrated()
    name = "bert.encoder.layer.0.output.dense._input_quantizer"
    qs.quantizers(qmodel)[name].reset_amax()
    with pytest.raises(CalibrationError, match=rf"{name} has no range, so every batch .*calibrate the model before"):
        QATTrainer(qmodel, arguments(tmp_path), train_dataset=Texts())
    qs.quantizers(qmodel)[name].disable()
    QATTrainer(qmodel, arguments(tmp_path), train_dataset=Texts())
    fresh = qs.convert(build("bert", CLASSIFIER, num_hidden_layers=1), inplace=True)
    with pytest.raises(CalibrationError, match=r"bert\.encoder\.layer\.0\.attention\.self\.query\._input_quantizer"):
        QATTrainer(fresh, arguments(tmp_path), train_dataset=Texts())


def test_a_float_model_is_trained_as_ever(tmp_path: Path) -> None:
    from transformers import Trainer

    found, wanted = (build("bert", CLASSIFIER, num_hidden_layers=1) for _ in range(2))
    trained(found, tmp_path / "ours")
    Trainer(wanted, arguments(tmp_path / "theirs"), train_dataset=Texts()).train()
    assert_equal(state(found), state(wanted))


def test_ranges_have_no_weight_decay(tmp_path: Path) -> None:
    qmodel = calibrated()
    parameters = {id(each) for each in qs.learn_ranges(qmodel, weights=True)}
    trainer = QATTrainer(qmodel, arguments(tmp_path, weight_decay=0.1), train_dataset=Texts())
    optimizer = trainer.create_optimizer()
    groups = {group["weight_decay"]: {id(each) for each in group["params"]} for group in optimizer.param_groups}
    assert set(groups) == {0.1, 0.0}
    assert parameters <= groups[0.0]
    assert not parameters & groups[0.1]
    dense = qmodel.bert.encoder.layer[0].output.dense
    assert id(dense.weight) in groups[0.1]
    assert id(dense.bias) in groups[0.0]
    assert groups[0.0] | groups[0.1] == {id(each) for each in qmodel.parameters()}


def test_weight_decay_leaves_the_ranges_of_a_model_that_stands_still(tmp_path: Path) -> None:
    # All that could move a range here is decay: the loss is a constant.
    class Still(QATTrainer):
        def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            del args, kwargs
            return sum(parameter.sum() for parameter in model.parameters()) * 0.0

    qmodel = calibrated()
    qs.learn_ranges(qmodel, weights=True)
    before, weight = ranges(qmodel), qmodel.bert.encoder.layer[0].output.dense.weight.detach().clone()
    Still(qmodel, arguments(tmp_path, weight_decay=10.0), train_dataset=Texts()).train()
    assert_equal(ranges(qmodel), before)
    assert not torch.equal(qmodel.bert.encoder.layer[0].output.dense.weight, weight)


RECALIBRATE = """\
schema: 1
name: own
extends: qdqbert
why: ranges of weights are found again
calibration: {recalibrate_weights: true}
"""


@pytest.mark.parametrize("again", [True, False], ids=["again", "once"])
def test_weights_are_found_again_where_the_rules_say_so(tmp_path: Path, again: bool) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(RECALIBRATE if again else RECALIBRATE.replace("true", "false"))
    qmodel = calibrated(rules=path)
    before = ranges(qmodel)
    trained(qmodel, tmp_path / "out")
    for name, amax in ranges(qmodel).items():
        if again and name.endswith("_weight_quantizer"):
            weight = qmodel.get_submodule(name.rpartition(".")[0]).weight.detach()
            assert torch.equal(amax, weight.abs().amax(1, keepdim=True)), name
            assert not torch.equal(amax, before[name]), name
        else:
            assert torch.equal(amax, before[name]), name


# Checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_resuming_is_the_same_as_going_on(tmp_path: Path, learned: bool) -> None:
    def start() -> PreTrainedModel:
        qmodel = calibrated()  # with dropout, whose random numbers a checkpoint keeps too
        if learned:
            qs.learn_ranges(qmodel, weights=True)
        return qmodel

    straight = start()
    trained(straight, tmp_path / "straight", save_strategy="steps", save_steps=2)
    checkpoint = tmp_path / "straight" / "checkpoint-2"
    saved = load_file(checkpoint / "model.safetensors")
    assert sum(name.endswith("._amax") for name in saved) == 20
    resumed = start()
    with torch.no_grad():
        for parameter in resumed.parameters():  # nothing but the checkpoint may count
            parameter.mul_(1.5)
    for each in qs.quantizers(resumed).values():
        each.amax.data.mul_(3.0)
    trainer = QATTrainer(resumed, arguments(tmp_path / "resumed"), train_dataset=Texts())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 4
    assert_equal(state(resumed), state(straight))
    if learned:
        assert any(not torch.equal(saved[f"{name}._amax"], amax) for name, amax in ranges(straight).items())


def test_a_checkpoint_goes_into_a_fresh_conversion(tmp_path: Path) -> None:
    qmodel = calibrated()
    qs.learn_ranges(qmodel)
    trained(qmodel, tmp_path, save_strategy="steps", save_steps=4)
    fresh = qs.convert(build("bert", CLASSIFIER, seed=1, num_hidden_layers=1), inplace=True)
    missing, unexpected = fresh.load_state_dict(
        load_file(tmp_path / "checkpoint-4" / "model.safetensors"), strict=False
    )
    assert (missing, unexpected) == ([], [])
    assert_equal(ranges(fresh), ranges(qmodel))
    qmodel.eval()
    with torch.no_grad():
        batch = inputs_of(Texts())[0]
        assert torch.equal(fresh(**batch).logits, qmodel(**batch).logits)


def test_the_best_checkpoint_is_loaded_with_its_ranges(tmp_path: Path) -> None:
    qmodel = calibrated()
    qs.learn_ranges(qmodel, weights=True)
    options = {
        "save_strategy": "steps",
        "eval_strategy": "steps",
        "save_steps": 1,
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "learning_rate": 0.3,  # so much that the last step is not the best
        "max_steps": 3,
    }
    trainer = QATTrainer(qmodel, arguments(tmp_path, **options), train_dataset=Texts(), eval_dataset=Texts())
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    saved = load_file(Path(best) / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    for name, amax in ranges(qmodel).items():
        assert torch.equal(amax, saved[f"{name}._amax"]), name
    if Path(best).name != "checkpoint-3":
        assert any(not torch.equal(value, saved[name]) for name, value in last.items())


# Options of Trainer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("head", "distilled"), [(CLASSIFIER, False), (TAGGER, True)], ids=["labels", "teacher"])
def test_two_batches_of_two_are_one_of_four(tmp_path: Path, head: str, distilled: bool) -> None:
    # All rows have as many labels each, so that a mean of means is the mean.
    texts = Texts(rows=12, tagged=head == TAGGER)
    texts.__class__ = _Whole
    gradients = []
    for size, steps in ((4, 1), (2, 2)):
        qmodel = calibrated(head, **STILL)
        qs.learn_ranges(qmodel)
        options: dict[str, Any] = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        if distilled:
            options["teacher"] = build("bert", head, seed=2, num_hidden_layers=1, **STILL)
        start = state(qmodel)
        # Plain descent: the change of a weight is its gradient.
        options.update(optim="sgd", learning_rate=1.0, max_steps=1, max_grad_norm=0.0, lr_scheduler_type="constant")
        trained(qmodel, tmp_path / str(size), texts, **options)
        gradients.append({name: value - start[name] for name, value in state(qmodel).items()})
    assert max(float(value.abs().max()) for value in gradients[0].values()) > 1e-3
    for name, value in gradients[0].items():
        # Float32 rounding of gradients and of weights of up to a few units.
        assert torch.allclose(gradients[1][name], value, rtol=0, atol=1e-5), name


class _Whole(Texts):
    """No padding."""

    def __getitem__(self, index: int) -> Batch:
        made = super().__getitem__(index)
        ids = made["input_ids"]
        labels = (ids > 30).long() if self._tagged else made["labels"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_bfloat16(tmp_path: Path, learned: bool) -> None:
    qmodel = calibrated()
    if learned:
        qs.learn_ranges(qmodel, weights=True)
    texts = Texts()
    trainer = QATTrainer(qmodel, arguments(tmp_path, bf16=True, max_steps=12), train_dataset=texts, eval_dataset=texts)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    assert all(value.isfinite().all() for value in state(qmodel).values())
    assert all(amax.dtype == torch.float32 for amax in ranges(qmodel).values())


#: transformers 5.23 deprecates the name that older ones have.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in {field.name for field in dataclasses.fields(TrainingArguments)}
)


@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_gradient_checkpointing(tmp_path: Path, learned: bool) -> None:
    states = []
    for checkpointing in (False, True):
        qmodel = calibrated()  # with dropout, whose random numbers must be drawn alike
        if learned:
            qs.learn_ranges(qmodel)
        trained(qmodel, tmp_path / str(checkpointing), **({CHECKPOINTING: True} if checkpointing else {}))
        states.append(state(qmodel))
    assert_equal(states[1], states[0])


# Distillation --------------------------------------------------------------------------------------------------------


def scores(*shape: int, seed: int = 0) -> Tensor:
    return 3.0 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equal_scores_cost_nothing() -> None:
    for shape in ((5, 3), (4, 6, 7)):
        logits = scores(*shape)
        assert float(distillation_loss({"logits": logits}, {"logits": logits})) == pytest.approx(0.0, abs=1e-6)
        # A softmax does not see what is added to all.
        shifted = {"logits": logits + 5.0}
        assert float(distillation_loss({"logits": logits}, shifted)) == pytest.approx(0.0, abs=1e-5)
        assert float(distillation_loss({"logits": logits}, {"logits": -logits})) > 0.1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.0])
def test_the_loss_is_the_formula(temperature: float) -> None:
    mine, theirs = scores(4, 6, 7), scores(4, 6, 7, seed=1)
    counted = torch.rand(4, 6, generator=torch.Generator().manual_seed(2)) > 0.4
    total = 0.0
    for row in range(4):
        for token in range(6):
            if counted[row, token]:
                p = (theirs[row, token].double() / temperature).softmax(0)
                q = (mine[row, token].double() / temperature).softmax(0)
                total += float((p * (p.log() - q.log())).sum())
    wanted = temperature**2 * total / int(counted.sum())
    found = distillation_loss({"logits": mine}, {"logits": theirs}, temperature, counted)
    assert float(found) == pytest.approx(wanted, rel=1e-5)  # float32
    without = distillation_loss({"logits": mine}, {"logits": theirs}, temperature)
    assert float(without) != pytest.approx(wanted, rel=1e-3)


def test_several_scores_are_averaged_and_others_ignored() -> None:
    mine = {"start_logits": scores(3, 6), "end_logits": scores(3, 6, seed=1), "loss": torch.tensor(9.0)}
    theirs = {"start_logits": scores(3, 6, seed=2), "end_logits": scores(3, 6, seed=3), "hidden_states": scores(3)}
    parts = [
        distillation_loss({"logits": mine[name]}, {"logits": theirs[name]}) for name in ("start_logits", "end_logits")
    ]
    found = distillation_loss(mine, theirs, 2.0, torch.ones(3, 6, dtype=torch.bool))
    assert float(found) == pytest.approx(float(sum(parts)) / 2, rel=1e-6)


def test_masked_tokens_get_no_gradient() -> None:
    mine = scores(2, 4, 5).requires_grad_()
    counted = torch.tensor([[True, True, False, False], [True, False, False, False]])
    distillation_loss({"logits": mine}, {"logits": scores(2, 4, 5, seed=1)}, 2.0, counted).backward()
    assert mine.grad is not None
    assert torch.equal(mine.grad.abs().sum(-1) > 0, counted)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ({}, {}),
        ({"logits": torch.ones(2, 2)}, {"start_logits": torch.ones(2, 2)}),
        ({"last": 1}, {"last": 1}),
        ({"last_hidden_state": torch.ones(1, 2)}, {"last_hidden_state": torch.ones(1, 3)}),
    ],
    ids=["empty", "others", "no-scores", "other-width"],
)
def test_no_scores_in_common(student: dict[str, Any], teacher: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="no scores in common; known: logits, start_logits"):
        distillation_loss(student, teacher)


@pytest.mark.parametrize(
    ("temperature", "weight"), [(0.0, 0.5), (-1.0, 0.5), (2.0, -0.1), (2.0, 1.1)], ids=lambda value: f"{value:g}"
)
def test_options_out_of_range(tmp_path: Path, temperature: float, weight: float) -> None:
    with pytest.raises(OptionError, match=rf"temperature {temperature} must be above 0, and distill_weight {weight}"):
        QATTrainer(
            calibrated(), arguments(tmp_path), train_dataset=Texts(), temperature=temperature, distill_weight=weight
        )


class _Flipped(Texts):
    """The other label, where there is one."""

    def __getitem__(self, index: int) -> Batch:
        made = super().__getitem__(index)
        return {**made, "labels": torch.where(made["labels"] == -100, -100, 1 - made["labels"])}


@pytest.mark.parametrize(("head", "weight"), [(CLASSIFIER, 1.0), (CLASSIFIER, 0.5), (TAGGER, 1.0)])
def test_the_weight_of_the_teacher(tmp_path: Path, head: str, weight: float) -> None:
    states = []
    for kind in (Texts, _Flipped):
        qmodel = calibrated(head)
        teacher = build("bert", head, seed=2, num_hidden_layers=1)
        kept = state(teacher)
        trained(qmodel, tmp_path / kind.__name__, kind(tagged=head == TAGGER), teacher=teacher, distill_weight=weight)
        states.append(state(qmodel))
        assert_equal(state(teacher), kept)
        assert not teacher.training
    name = "bert.encoder.layer.0.output.dense.weight"
    if weight == 1.0:
        assert_equal(states[1], states[0])
    else:
        assert not torch.equal(states[0][name], states[1][name])


def test_weight_zero_is_no_teacher(tmp_path: Path) -> None:
    found, wanted = calibrated(), calibrated()
    teacher = build("bert", CLASSIFIER, seed=2, num_hidden_layers=1)
    trained(found, tmp_path / "teacher", teacher=teacher, distill_weight=0.0)
    trained(wanted, tmp_path / "none")
    assert_equal(state(found), state(wanted))


def test_distillation_brings_student_and_teacher_together(tmp_path: Path) -> None:
    teacher = build("bert", CLASSIFIER, seed=2, num_hidden_layers=1)
    qmodel = calibrated()
    batch = inputs_of(Texts())[0]

    def apart() -> float:
        qmodel.eval()
        with torch.no_grad():
            return float(distillation_loss(qmodel(**batch), teacher(**batch)))

    before = apart()
    trained(qmodel, tmp_path, teacher=teacher, distill_weight=1.0, max_steps=20, learning_rate=3e-3)
    assert apart() < 0.5 * before


@pytest.mark.parametrize("head", [CLASSIFIER, TAGGER, "BertModel"])
def test_distillation_needs_no_labels(tmp_path: Path, head: str) -> None:
    teacher = build("bert", head, seed=2, num_hidden_layers=1, **STILL)
    qmodel = calibrated(head, **STILL)
    batch = inputs_of(Texts())[0]

    def apart() -> float:
        qmodel.eval()
        with torch.no_grad():
            return float(distillation_loss(qmodel(**batch), teacher(**batch), counted=batch["attention_mask"] != 0))

    before = apart()
    texts = [{name: value for name, value in Texts()[index].items() if name != "labels"} for index in range(16)]
    trained(qmodel, tmp_path, texts, teacher=teacher, max_steps=30, learning_rate=1e-3)  # type: ignore[arg-type]
    assert apart() < 0.8 * before


def test_without_labels_there_is_no_dropout(tmp_path: Path) -> None:
    options = {"hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5}
    qmodel = calibrated("BertModel", **options)
    teacher = build("bert", "BertModel", seed=2, num_hidden_layers=1, **options)
    trainer = QATTrainer(qmodel, arguments(tmp_path), train_dataset=Texts(), teacher=teacher)
    batch = inputs_of(Texts())[0]
    qmodel.train()
    qmodel.encoder.layer[0].eval()  # as the user has it
    found = trainer.compute_loss(qmodel, dict(batch))
    assert [qmodel.training, qmodel.encoder.layer[0].training] == [True, False]
    assert found.requires_grad
    wanted = distillation_loss(qmodel.eval()(**batch), teacher.eval()(**batch), 2.0, batch["attention_mask"] != 0)
    assert torch.equal(found, wanted)


def test_hidden_states_are_compared_where_tokens_count() -> None:
    wanted = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    counted = torch.tensor([[True, True, False], [True, False, False]])
    found = wanted.clone()
    found[~counted] += 5.0
    given = {"last_hidden_state": found}, {"last_hidden_state": wanted}
    assert distillation_loss(*given, counted=counted) == 0
    assert distillation_loss(*given) > 0
    found += wanted
    share = distillation_loss(*given, counted=counted)
    assert float(share) == pytest.approx(1.0, rel=1e-6)  # the difference is as large as what it is a share of


def test_the_loss_is_mixed(tmp_path: Path) -> None:
    qmodel = calibrated(TAGGER, **STILL)
    teacher = build("bert", TAGGER, seed=2, num_hidden_layers=1)
    texts = Texts(tagged=True)
    trainer = QATTrainer(
        qmodel, arguments(tmp_path), train_dataset=texts, teacher=teacher, temperature=3.0, distill_weight=0.25
    )
    rows = [texts[index] for index in range(4)]
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    loss, outputs = trainer.compute_loss(qmodel, dict(batch), return_outputs=True)
    with torch.no_grad():
        logits = teacher(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = functional.cross_entropy(outputs.logits.reshape(-1, 2), batch["labels"].reshape(-1))
    distilled = distillation_loss(outputs, {"logits": logits}, 3.0, batch["labels"] != -100)
    assert float(loss.detach()) == pytest.approx(float(0.75 * labels.detach() + 0.25 * distilled.detach()), rel=1e-5)
    only = trainer.compute_loss(qmodel, dict(batch))
    assert torch.equal(only, loss)
