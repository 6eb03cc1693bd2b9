"""Exceptions at lines of the package: afterwards the model is as it was before, or as the whole operation leaves it."""

from __future__ import annotations

import copy
import functools
import itertools
import os
import random
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import qdq_surgery as qs
from fuzzing.outcome import Outcome
from fuzzing.state import global_state, state_of

__all__ = ["OPERATIONS", "Injected", "Line", "Operation", "lines_of", "run"]

_PACKAGE = str(Path(qs.__file__).parent)
_TRANSFORMERS = str(Path(transformers.__file__).parent)

Place = tuple[str, int]
#: Of a line: its number, its call and its step, see :class:`Line`.
Event = tuple[int, int, int]


@dataclass(frozen=True)
class Line:
    """A line that an operation runs, once.

    Attributes:
        number: Of the lines that it runs, in their order.
        call: In which call of a function of the package, in the order in which they begin.
        step: Which of the lines that this call runs.
    """

    place: Place
    number: int
    call: int
    step: int


class Injected(BaseException):
    """What is raised at a line: nothing in the package knows it, as nothing knows when Ctrl-C comes."""


@dataclass(frozen=True)
class Operation:
    """Something that changes a model, or a folder with one.

    Attributes:
        start: Makes the model that it changes; to save one, the model and the folder.
        act: Changes it.
        homes: Folders of the code whose lines are interrupted.
    """

    name: str
    start: Callable[[], Any]
    act: Callable[[Any], Any]
    homes: tuple[str, ...] = (_PACKAGE,)


def run(count: int, seed: int, names: Iterable[str] = ()) -> Outcome:
    """Interrupt ``count`` times, each operation as often, at lines spread over all that run.

    Args:
        names: Of the operations; all if left out.
    """
    outcome = Outcome()
    chosen = [each for each in (*OPERATIONS, SAVING) if not names or each.name in names]
    for index, operation in enumerate(chosen):
        share = count // len(chosen) + (index < count % len(chosen))
        check = _check_save if operation is SAVING else functools.partial(_check, operation, _ends(operation))
        for line in _spread(lines_of(operation), share, random.Random(f"{seed} {operation.name}")):
            where = f"{operation.name} at {Path(line.place[0]).name}:{line.place[1]} (line event {line.number})"
            outcome.run(operation.name, where, functools.partial(check, line), _Never)
    return outcome


class _Never(Exception):
    """No case is refused: each is right or wrong."""


def lines_of(operation: Operation) -> dict[Place, list[Event]]:
    """The lines of the source that the operation runs, and each time that it does."""
    found: dict[Place, list[Event]] = {}
    first, subject = operation.start(), operation.start()
    operation.act(first)  # what is done once in a process is done now
    numbers = itertools.count()

    def entered(call: int) -> Callable[[FrameType], None]:
        steps = itertools.count()

        def see(frame: FrameType) -> None:
            place = frame.f_code.co_filename, frame.f_lineno
            found.setdefault(place, []).append((next(numbers), call, next(steps)))

        return see

    _traced(lambda: operation.act(subject), operation.homes, entered)
    for each in (first, subject):
        if isinstance(each, _Saving):
            each.folder.cleanup()
    return found


def _spread(events: Mapping[Place, list[Event]], count: int, random_: random.Random) -> list[Line]:
    """Each line of the source before a second time at any, its first time, its last and others in turn."""
    turns: list[Line] = []
    places = random_.sample(sorted(events), len(events))
    while len(turns) < count:
        for place in places:
            times = events[place]
            turns.append(Line(place, *random_.choice((times[0], times[-1], random_.choice(times)))))
    return turns[:count]


def _traced(
    act: Callable[[], Any], homes: tuple[str, ...], entered: Callable[[int], Callable[[FrameType], None] | None]
) -> None:
    """Run ``act``; of each call of a function in ``homes``, ``entered`` says who sees its lines, if anybody does."""
    calls = itertools.count()

    def call(frame: FrameType, _: str, __: Any) -> Any:
        see = entered(next(calls)) if frame.f_code.co_filename.startswith(homes) else None
        if see is None:
            return None

        def local(frame: FrameType, event: str, _: Any) -> Any:
            if event == "line":
                see(frame)
            return local

        return local

    before = sys.gettrace()
    sys.settrace(call)
    try:
        act()
    finally:
        sys.settrace(before)


def _interrupted(operation: Operation, subject: Any, line: Line) -> bool:
    """Run the operation and raise at a line; whether that came to pass.

    The lines of all other calls are not looked at, which takes as long as a hundred operations.
    """
    steps = itertools.count()

    def see(_: FrameType) -> None:
        if next(steps) == line.step:
            raise Injected

    try:
        _traced(lambda: operation.act(subject), operation.homes, lambda number: see if number == line.call else None)
    except Injected:
        return True
    return False


def _ends(operation: Operation) -> tuple[Any, Any]:
    model = operation.start()
    before = state_of(model)
    operation.act(model)
    return before, state_of(model)


def _check(operation: Operation, ends: tuple[Any, Any], line: Line) -> str:
    before, after = ends
    model, around = operation.start(), global_state()
    if not _interrupted(operation, model, line):
        return "the line was not reached"
    if global_state() != around:
        return "torch, Python or logging were left in another state"
    found = state_of(model)
    if found == after:
        return ""
    if found != before:
        return f"the model is neither as before nor complete: {_difference(before, found)}"
    operation.act(model)  # nothing may be left that keeps it from being done
    return "" if state_of(model) == after else "the operation, done again, gives something else"


def _difference(one: dict[str, Any], other: dict[str, Any]) -> str:
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    return ", ".join(names[:4])


def _check_save(line: Line) -> str:
    subject = SAVING.start()
    try:
        return _saved_wrong(subject, line)
    finally:
        subject.folder.cleanup()


def _saved_wrong(subject: _Saving, line: Line) -> str:
    new, before = subject.model, state_of(subject.model)
    if not _interrupted(SAVING, subject, line):
        return "the line was not reached"
    if state_of(new) not in (before, _after_saving()):
        return "the model that was saved was changed"
    found = BertForSequenceClassification.from_pretrained(subject.folder.name)
    if not any(torch.equal(_output(found), _output(model)) for model in (_calibrated(), new)):
        return "the folder holds neither the old model nor the new one"
    SAVING.act(subject)
    found = BertForSequenceClassification.from_pretrained(subject.folder.name)
    if not torch.equal(_output(found), _output(new)) or len(os.listdir(subject.folder.name)) != 3:
        return "the model, saved again, is another, or leaves files behind"
    return ""


# -- the models -------------------------------------------------------------------------------------------------------


def _batches(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, 60, (2, 6), generator=generator) for _ in range(2)]
    return [{"input_ids": each, "attention_mask": torch.ones_like(each)} for each in ids]


def _output(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(**_batches()[0]).logits
    return logits


@functools.cache
def _float() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = BertConfig(vocab_size=64, max_position_embeddings=16, **sizes)
    return BertForSequenceClassification(config).eval()


@functools.cache
def _converted() -> PreTrainedModel:
    return qs.convert(_float())


@functools.cache
def _calibrated() -> PreTrainedModel:
    qmodel = copy.deepcopy(_converted())
    qs.calibrate(qmodel, _batches())
    return qmodel


@functools.cache
def _scaled() -> PreTrainedModel:
    qmodel = qs.convert(_float(), "qdqbert-scaled")
    qs.calibrate(qmodel, _batches())
    return qmodel


@functools.cache
def _learning() -> PreTrainedModel:
    qmodel = copy.deepcopy(_calibrated())
    qs.learn_ranges(qmodel, weights=True)
    return qmodel


@functools.cache
def _statistics() -> qs.Statistics:
    return qs.collect(_converted(), _batches())


@functools.cache
def _other() -> PreTrainedModel:
    qmodel = _moved_weights()
    qs.calibrate(qmodel, _batches(1))
    return qmodel


@dataclass(frozen=True)
class _Saving:
    """A model, and a folder that holds another one."""

    model: PreTrainedModel
    folder: tempfile.TemporaryDirectory[str]


def _start_saving() -> _Saving:
    folder = tempfile.TemporaryDirectory()
    _calibrated().save_pretrained(folder.name)
    return _Saving(copy.deepcopy(_other()), folder)


@functools.cache
def _after_saving() -> Any:
    subject = _start_saving()
    SAVING.act(subject)
    subject.folder.cleanup()
    return state_of(subject.model)


def _copy_of(make: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    return lambda: copy.deepcopy(make())


def _moved_weights() -> PreTrainedModel:
    qmodel = copy.deepcopy(_calibrated())
    with torch.no_grad():
        for parameter in qmodel.parameters():
            parameter.mul_(1.5)
    return qmodel


OPERATIONS = (
    Operation("convert", _copy_of(_float), lambda model: qs.convert(model, inplace=True)),
    Operation("collect", _copy_of(_converted), lambda model: qs.collect(model, _batches())),
    Operation("calibrate", _copy_of(_converted), lambda model: qs.calibrate(model, _batches(), "percentile")),
    Operation("calibrate again", _copy_of(_calibrated), lambda model: qs.calibrate(model, _statistics(), "mse")),
    Operation("equalize", _copy_of(_scaled), lambda model: qs.equalize(model, _batches(1))),
    Operation("round_weights", _copy_of(_calibrated), lambda model: qs.round_weights(model, _batches(1))),
    Operation("learn_ranges", _copy_of(_calibrated), lambda model: qs.learn_ranges(model, weights=True)),
    Operation("fix_ranges", _copy_of(_learning), qs.fix_ranges),
    Operation("recalibrate_weights", _moved_weights, qs.recalibrate_weights),
    Operation("quantization_disabled", _copy_of(_calibrated), lambda model: _disabled(model)),
    Operation("dequantize", _copy_of(_calibrated), lambda model: model.dequantize()),
)

SAVING = Operation(
    "save_pretrained",
    _start_saving,
    lambda subject: subject.model.save_pretrained(subject.folder.name),
    (_PACKAGE, _TRANSFORMERS),
)


def _disabled(model: PreTrainedModel) -> None:
    with qs.quantization_disabled(model):
        model(**_batches()[0])
