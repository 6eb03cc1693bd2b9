"""Interrupted at any line, a model is as before or complete: a sample of ``scripts/fuzz.py interruptions``."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import qdq_surgery as qs
from fuzzing import interruptions
from fuzzing.interruptions import OPERATIONS, SAVING, Operation
from fuzzing.state import state_of
from qdq_surgery.surgery.model_state import ModelState, plan_of, set_state

#: 100 in all, fewer of what takes longest. (What a conversion runs is a quarter of a million lines, most of them while
#: it only looks at the model.) Which lines they are follows from the seed, and so from the lines of the package.
COUNTS = {each.name: 12 for each in OPERATIONS} | {
    "convert": 5,
    "calibrate": 8,
    "calibrate again": 6,
    "equalize": 6,
    "round_weights": 6,
    SAVING.name: 9,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTS)
def test_whole_or_not_at_all(name: str) -> None:
    transformers.utils.logging.disable_progress_bar()
    outcome = interruptions.run(COUNTS[name], 0, [name])
    assert outcome.read.total() == COUNTS[name]
    assert outcome.is_right, str(outcome)


SETTERS = {
    "calibrate": "set_range",
    "calibrate again": "set_range",
    "equalize": "set_range",
    "round_weights": "set_rounding",
    "learn_ranges": "learn_amax",
    "fix_ranges": "learn_amax",
    "recalibrate_weights": "set_range",
}


@pytest.mark.parametrize("name", SETTERS)
def test_between_two_quantizers_is_as_before(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a sample of lines may not come: the second of them is interrupted, when the first has its new state."""
    operation = next(each for each in OPERATIONS if each.name == name)
    model, complete = operation.start(), operation.start()
    before, own, calls = state_of(model), getattr(qs.TensorQuantizer, SETTERS[name]), []

    def interrupted(quantizer: qs.TensorQuantizer, *args: Any) -> Any:
        calls.append(quantizer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return own(quantizer, *args)

    with monkeypatch.context() as patched:
        patched.setattr(qs.TensorQuantizer, SETTERS[name], interrupted)
        with pytest.raises(KeyboardInterrupt):
            operation.act(model)
    assert state_of(model) == before
    operation.act(model)
    operation.act(complete)
    assert state_of(model) == state_of(complete) != before


def test_every_operation_that_promises_it_is_there() -> None:
    promised = {"convert", "collect", "calibrate", "learn_ranges", "fix_ranges", "recalibrate_weights", "dequantize"}
    assert promised | {"equalize", "round_weights", "quantization_disabled", "save_pretrained"} <= set(COUNTS)
    assert sum(COUNTS.values()) >= 100


def half(model: PreTrainedModel) -> None:
    """In two steps, as none of the package's operations may be."""
    for quantizer in qs.quantizers(model).values():
        quantizer.amax = 7.0


def test_the_test_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    start = OPERATIONS[1].start
    monkeypatch.setattr(interruptions, "OPERATIONS", (Operation("half", start, half),))
    assert not interruptions.run(40, 0, ["half"]).is_right


@pytest.mark.parametrize("change", ["value", "name", "class", "mode", "grad", "attribute", "config"])
def test_no_change_of_a_state_goes_unseen(change: str) -> None:
    model = OPERATIONS[2].start()
    qs.calibrate(model, [{"input_ids": torch.arange(3, 9)[None]}])
    before = state_of(model)
    changes: dict[str, Any] = {
        "value": lambda: next(iter(qs.quantizers(model).values())).amax.add_(1),
        "name": lambda: model.bert.pooler.register_buffer("one", torch.ones(())),
        "class": lambda: setattr(model.dropout, "__class__", torch.nn.Identity),
        "mode": lambda: model.bert.pooler.train(),
        "grad": lambda: setattr(model.classifier.bias, "grad", torch.ones(2)),
        "attribute": lambda: set_state(model, ModelState(plan_of(model))),
        "config": lambda: setattr(model.config, "hidden_act", "relu"),
    }
    assert state_of(copy.deepcopy(model)) == before
    changes[change]()
    assert state_of(model) != before


def test_a_second_interrupt_does_not_stop_the_putting_back() -> None:
    from qdq_surgery.safety.transaction import put_back_after

    done = []

    def put_back(times: int) -> None:
        done.append(times)
        if len(done) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), put_back_after(functools.partial(put_back, 1)):
        raise ValueError
    assert done == [1, 1]
