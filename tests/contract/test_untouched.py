"""What converting leaves alone: the original's buffers, hooks and gradients; random numbers; logging; other threads."""

from __future__ import annotations

import copy
import hashlib
import logging
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from architectures import batch_for, build
from fresh_import import fresh_import
from torch import Tensor, nn
from transformers import BertForSequenceClassification, PreTrainedModel

import qdq_surgery as qs
from fuzzing.state import global_state, state_of

BATCH = {"input_ids": torch.arange(3, 15).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}


def bert(**options: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    return build("bert", "BertForSequenceClassification", **options)  # type: ignore[return-value]


class Counting(nn.Module):
    """Writes to what is no parameter, in every way that a forward can without setting an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.plain = torch.zeros(())
        self.seen: list[int] = []
        self.inside = {"sums": [torch.zeros(())]}

    def forward(self, states: Tensor) -> Tensor:
        self.calls.add_(1)
        self.plain.add_(1)
        self.seen.append(len(self.seen))
        self.inside["sums"][0].add_(1)
        random.random()
        np.random.random()
        return states


def with_batch_norm(model: PreTrainedModel) -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(32)

        def forward(self, states: Tensor) -> Tensor:
            return self.norm(states.transpose(1, 2)).transpose(1, 2) if states.ndim == 3 else self.norm(states)

    model.bert.encoder.layer[0].output.LayerNorm = nn.Sequential(model.bert.encoder.layer[0].output.LayerNorm, Normed())


def with_spectral_norm(model: PreTrainedModel) -> None:
    torch.nn.utils.parametrizations.spectral_norm(model.bert.pooler.dense)


def with_counts(model: PreTrainedModel) -> None:
    model.bert.encoder.layer[1].output.LayerNorm = nn.Sequential(
        model.bert.encoder.layer[1].output.LayerNorm, Counting()
    )


SPOILT: dict[str, Callable[[PreTrainedModel], Any]] = {
    "a batch norm in a block": with_batch_norm,
    "a batch norm in the head": lambda model: setattr(
        model, "classifier", nn.Sequential(nn.BatchNorm1d(32), model.classifier)
    ),
    "a batch norm in the pooler": lambda model: setattr(
        model.bert.pooler, "activation", nn.Sequential(model.bert.pooler.activation, nn.BatchNorm1d(32))
    ),
    "a spectral norm": with_spectral_norm,
    "counts of many kinds": with_counts,
}


def plain_state(model: nn.Module) -> dict[str, Any]:
    """With what lists, dicts and attributes hold."""
    found = state_of(model)
    for name, module in model.named_modules():
        if isinstance(module, Counting):
            found[f"{name} held"] = (float(module.plain), list(module.seen), float(module.inside["sums"][0]))
    return found


@pytest.mark.parametrize(("name", "act"), [*((name, qs.convert) for name in SPOILT), ("counts of many kinds", qs.plan)])
def test_buffers_and_random_numbers_are_those_of_before(name: str, act: Callable[..., Any]) -> None:
    model = bert(hidden_dropout_prob=0.1)
    SPOILT[name](model)
    before, around = plain_state(model), global_state()
    with torch.no_grad():
        output = copy.deepcopy(model)(**BATCH).logits
    around = global_state()
    act(model)
    assert plain_state(model) == before
    assert global_state() == around
    with torch.no_grad():
        assert torch.equal(model(**BATCH).logits, output)


@pytest.mark.parametrize("inplace", [False, True])
def test_gradients_and_hooks_stay(inplace: bool) -> None:
    model = bert()
    calls: list[str] = []
    model.classifier.register_forward_hook(lambda *_: calls.append("classifier"))
    model.bert.encoder.layer[0].output.register_forward_pre_hook(lambda *_: calls.append("output"))
    model(**BATCH, labels=torch.tensor([0, 1])).loss.backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    values = {name: None if grad is None else grad.clone() for name, grad in grads.items()}
    calls.clear()
    qmodel = qs.convert(model, inplace=inplace)
    assert calls == []
    for name, parameter in model.named_parameters():
        assert parameter.grad is grads[name]
        assert parameter.grad is None or torch.equal(parameter.grad, values[name])
    qmodel(**BATCH)
    assert calls == ["output", "classifier"]


def test_a_first_call_of_a_new_kind_leaves_buffers_alone() -> None:
    """It is recorded on a shadow, from which nothing comes back but the graph."""
    model = bert()
    with_counts(model)
    qmodel = qs.convert(model, inplace=True)
    counting = next(module for module in qmodel.modules() if isinstance(module, Counting))
    before = float(counting.calls)
    with torch.no_grad():
        qmodel(**BATCH, output_attentions=True)
    assert float(counting.calls) == before + 1


@pytest.mark.slow
def test_importing_changes_no_logging_and_warns_of_nothing() -> None:
    """Of another process: in this one it has been imported long since."""
    told = fresh_import()
    assert told.before == told.after
    assert "INFO:mine:heard" in told.logged


# Overlaps -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> PreTrainedModel:
    qmodel = qs.convert(bert(), inplace=True)
    qs.calibrate(qmodel, [BATCH])
    return qmodel


@pytest.fixture
def qmodel(made: PreTrainedModel) -> PreTrainedModel:
    """A copy of its own."""
    return copy.deepcopy(made)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(**BATCH).logits  # type: ignore[no-any-return]


def test_disabled_blocks_may_end_in_any_order(qmodel: PreTrainedModel) -> None:
    quantized = logits(qmodel)
    first, second = qs.quantization_disabled(qmodel), qs.quantization_disabled(qmodel)
    first.__enter__()
    second.__enter__()
    plain = logits(qmodel)
    assert not torch.equal(plain, quantized)
    first.__exit__(None, None, None)
    assert torch.equal(logits(qmodel), plain)  # the second still holds
    second.__exit__(None, None, None)
    assert torch.equal(logits(qmodel), quantized)


def test_disabled_in_threads(qmodel: PreTrainedModel) -> None:
    quantized, problems = logits(qmodel), []
    start = threading.Barrier(4)

    def hold() -> None:
        start.wait()
        for _ in range(50):
            with qs.quantization_disabled(qmodel):
                if any(quantizer.enabled for quantizer in qs.quantizers(qmodel).values()):
                    problems.append("one works")

    threads = [threading.Thread(target=hold) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert all(quantizer.enabled for quantizer in qs.quantizers(qmodel).values())
    assert torch.equal(logits(qmodel), quantized)


def test_a_part_and_the_whole_disabled_at_once(qmodel: PreTrainedModel) -> None:
    quantized = logits(qmodel)
    with qs.quantization_disabled(qmodel.bert.encoder.layer[0]):
        half = logits(qmodel)
        with qs.quantization_disabled(qmodel):
            assert not torch.equal(logits(qmodel), half)
        assert torch.equal(logits(qmodel), half)
    assert torch.equal(logits(qmodel), quantized)


def test_one_that_is_disabled_stays_so_and_a_copy_is_not_held(qmodel: PreTrainedModel) -> None:
    name, quantizer = next(iter(qs.quantizers(qmodel).items()))
    quantizer.disable()
    with qs.quantization_disabled(qmodel):
        copied = copy.deepcopy(qmodel)
    assert not quantizer.enabled
    assert [key for key, each in qs.quantizers(copied).items() if not each.enabled] == [name]
    assert torch.equal(logits(copied), logits(qmodel))


def test_a_second_collection_is_refused_and_the_first_goes_on(qmodel: PreTrainedModel) -> None:
    before, refused = state_of(qmodel), []

    def batches() -> Any:
        yield BATCH
        with pytest.raises(qs.CalibrationError, match=r"another collection or calibration of this Bert.* is running"):
            qs.calibrate(qmodel, [BATCH])
        refused.append(True)
        yield BATCH

    seen = qs.collect(qmodel, batches())
    assert refused == [True]
    assert seen.batches == 2
    assert state_of(qmodel) == before
    qs.calibrate(qmodel, [BATCH])  # nothing keeps it from being collected again


def test_a_call_of_another_thread_is_not_counted(qmodel: PreTrainedModel) -> None:
    told: list[str] = []

    def call() -> None:
        try:
            logits(qmodel)
        except qs.CalibrationError as error:
            told.append(str(error))

    def batches() -> Any:
        yield BATCH
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        yield BATCH

    once = qs.collect(qmodel, [BATCH, BATCH])
    assert qs.collect(qmodel, batches()).compare() == once.compare()
    assert [text for text in told if "is being calibrated in another thread" in text] == told
    assert len(told) == 1


def test_disabling_during_a_collection_loses_nothing(qmodel: PreTrainedModel) -> None:
    def batches() -> Any:
        yield BATCH
        with qs.quantization_disabled(qmodel):
            yield BATCH

    once = qs.collect(qmodel, [BATCH, BATCH])
    assert qs.collect(qmodel, batches()).compare() == once.compare()


# Names that are taken -------------------------------------------------------------------------------------------------

TAKEN: dict[str, Callable[[PreTrainedModel], Any]] = {
    "attribute": lambda model: setattr(dense(model), "_input_quantizer", 5),
    "parameter": lambda model: dense(model).register_parameter("_weight_quantizer", nn.Parameter(torch.ones(1))),
    "buffer": lambda model: dense(model).register_buffer("_weight_quantizer", torch.ones(1)),
    "child": lambda model: dense(model).add_module("_input_quantizer", nn.Identity()),
}


def dense(model: PreTrainedModel) -> nn.Linear:
    return model.bert.encoder.layer[0].intermediate.dense  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "rules"), [*zip(TAKEN, ("linear-only",) * 3 + ("qdqbert",), strict=True)])
def test_a_name_that_is_taken_is_refused_at_conversion(kind: str, rules: str) -> None:
    model = bert()
    TAKEN[kind](model)
    reasons = [r.reason for r in qs.plan(model, rules).refusals if r.path == "bert.encoder.layer.0.intermediate.dense"]
    assert len(reasons) == 1
    assert "quantizer' already; rename it" in reasons[0]
    qmodel = qs.convert(model, rules)
    assert not any(name.startswith("bert.encoder.layer.0.intermediate.dense") for name in qs.quantizers(qmodel))
    with qs.quantization_disabled(qmodel):
        assert torch.equal(logits(qmodel), logits_of_eager(model))
    qs.calibrate(qmodel, [batch_for(qmodel, (2, 6))])


def logits_of_eager(model: PreTrainedModel) -> Tensor:
    model.set_attn_implementation("eager")
    return logits(model)


def test_the_digest_of_a_state_tells_states_apart() -> None:
    """Of the helper that the tests above rely on."""
    model = bert()
    before = hashlib.sha256(repr(state_of(model)).encode()).hexdigest()
    model.bert.pooler.dense.bias.data.add_(1e-3)
    assert hashlib.sha256(repr(state_of(model)).encode()).hexdigest() != before
    assert logging.root.level == global_state()["level"]


@pytest.mark.parametrize("name", ["evaluate", "sensitivity", "calibrate"])
def test_evaluate_and_another_measurement_are_not_mixed(qmodel: PreTrainedModel, name: str) -> None:
    """The quantizers are off while evaluate runs the float model: in another thread they would seem to cost nothing."""
    refused = []

    def batches() -> Any:
        yield BATCH
        with pytest.raises(qs.CalibrationError, match=r"another collection or calibration of this Bert.* is running"):
            qs.evaluate(qmodel, [BATCH])
        refused.append(True)
        yield BATCH

    getattr(qs, name)(qmodel, batches())
    assert refused == [True]
    assert qs.evaluate(qmodel, [BATCH]).loss > 0  # nothing keeps it from being measured again


def test_models_are_converted_in_threads() -> None:
    """Dropout is recorded twice with the same numbers; another thread's would come between."""
    model, found = bert(num_hidden_layers=1), []

    def convert() -> None:
        try:
            found.append(len(qs.quantizers(qs.convert(model))))
        except qs.QdqSurgeryError as error:
            found.append(error)

    threads = [threading.Thread(target=convert) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [20] * 4
