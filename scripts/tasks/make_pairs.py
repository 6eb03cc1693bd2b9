"""Sentence pairs, written as a GLUE-style TSV: do both sentences tell of the same event (label 1) or not (0)?

The second sentence is always put in other words than the first: sold and bought, taught and took lessons from. Where
the label is 0 it has the same people, place and year, too, but tells of another event or object, denies the event, or
has the people change roles, which is the hardest. Held-out pairs have names and places of their own, and one wording of
each event that training never shows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qdq_surgery.onnx_file.writer import replace_text
from tasks.words import FIRST_NAMES, PLACES, SURNAMES, part

__all__ = ["FILE_ENDING", "make", "write"]

FILE_ENDING = "tsv"


@dataclass(frozen=True)
class Event:
    """Wordings of one event: ``{a}`` does something to ``{b}``; ``{x}`` is an object. The last wording is held out."""

    objects: tuple[str, ...]
    wordings: tuple[str, ...]


EVENTS = (
    Event(
        ("a farm", "a painting", "two horses", "a printing press", "a vineyard", "an old boat"),
        ("{a} sold {x} to {b}", "{b} bought {x} from {a}", "{x} passed from {a} to {b} for money"),
    ),
    Event(
        ("the violin", "chess", "algebra", "Latin", "the art of fencing", "bookkeeping"),
        ("{a} taught {b} {x}", "{b} learned {x} from {a}", "{b} was a pupil of {a} in {x}"),
    ),
    Event(
        ("a car", "a large sum", "a camera", "a warm coat", "a set of tools", "a bicycle"),
        ("{a} lent {b} {x}", "{b} borrowed {x} from {a}", "{b} was allowed to use {x} of {a} for a while"),
    ),
    Event(
        ("the chess final", "the tennis match", "the election", "the sailing race", "the debate", "the quiz"),
        ("{a} defeated {b} in {x}", "{b} lost {x} to {a}", "{a} got the better of {b} in {x}"),
    ),
    Event(
        ("as a cook", "as a driver", "as a nurse", "as a secretary", "as a gardener", "as a tutor"),
        ("{a} employed {b} {x}", "{b} worked for {a} {x}", "{b} received wages from {a} {x}"),
    ),
    Event(
        ("chair of the council", "head of the school", "editor of the paper", "coach of the team", "bishop", "consul"),
        ("{a} followed {b} as {x}", "{b} was replaced by {a} as {x}", "{b} was {x} before {a}"),
    ),
    Event(
        ("a long letter", "a telegram", "a parcel", "a postcard", "a bunch of roses", "a secret report"),
        ("{a} sent {b} {x}", "{b} received {x} from {a}", "{x} from {a} reached {b}"),
    ),
    Event(
        ("theft", "fraud", "lying", "arson", "treason", "cheating at cards"),
        ("{a} accused {b} of {x}", "{b} was charged with {x} by {a}", "{a} said that {b} was guilty of {x}"),
    ),
    Event(
        ("from a fire", "from drowning", "from a burning car", "from an avalanche", "from a mob", "from a flood"),
        ("{a} saved {b} {x}", "{b} was rescued {x} by {a}", "{b} owed it to {a} to have escaped {x}"),
    ),
    Event(
        ("the gold medal", "a prize", "the keys of the city", "a certificate", "a silver cup", "the first copy"),
        ("{a} handed {b} {x}", "{b} was given {x} by {a}", "{b} accepted {x} out of the hands of {a}"),
    ),
)

_NEVER = ("It is not true that {e}", "Nobody believes any more that {e}", "It was wrongly claimed that {e}")


@dataclass(frozen=True)
class _Told:
    event: Event
    a: str
    b: str
    thing: str
    place: str
    year: str


def _another(rng: random.Random, words: Sequence[str], than: str) -> str:
    return rng.choice([word for word in words if word != than])


def _person(rng: random.Random, held_out: bool) -> str:
    return f"{rng.choice(part(FIRST_NAMES, held_out))} {rng.choice(part(SURNAMES, held_out))}"


def _years() -> list[str]:
    return [str(year) for year in range(1851, 2020)]


def _event(rng: random.Random, held_out: bool) -> _Told:
    event = rng.choice(EVENTS)
    a, b = (_person(rng, held_out) for _ in range(2))
    while b == a:
        b = _person(rng, held_out)
    place = rng.choice(part(PLACES, held_out))
    return _Told(event, a, b, rng.choice(event.objects), place, rng.choice(_years()))


def _sentence(rng: random.Random, told: _Told, wording: str, frame: str = "{e}") -> str:
    core = wording.format(a=told.a, b=told.b, x=told.thing)
    where, when = f"in {told.place}", f"in {told.year}"
    text = frame.format(
        e=rng.choice(
            (
                f"{when} {core} {where}",
                f"{where} {core} {when}",
                f"{core} {where} {when}",
                f"{core} {where}, and that was {when}",
            )
        )
    )
    return f"{text[0].upper()}{text[1:]}."


#: What is off where the label is 0, and how often: most often it is another event between the same people.
_CHANGES = {"event": 5, "object": 2, "never": 2, "roles": 1}


def _changed(rng: random.Random, told: _Told, held_out: bool) -> tuple[_Told, str]:
    """What is told where the label is 0, and the frame around it."""
    (kind,) = rng.choices(list(_CHANGES), list(_CHANGES.values()))
    if kind == "event":
        event = rng.choice([event for event in EVENTS if event is not told.event])
        return replace(told, event=event, thing=rng.choice(event.objects)), "{e}"
    if kind == "object":
        return replace(told, thing=_another(rng, told.event.objects, told.thing)), "{e}"
    if kind == "roles":
        return replace(told, a=told.b, b=told.a), "{e}"
    return told, rng.choice(part(_NEVER, held_out))


def _wordings(event: Event, held_out: bool) -> tuple[str, ...]:
    return event.wordings if held_out else event.wordings[:-1]


def make(rng: random.Random, count: int, held_out: bool) -> list[tuple[str, str, str]]:
    """``count`` rows: first sentence, second sentence, label."""
    rows = []
    for _ in range(count):
        told, same = _event(rng, held_out), rng.random() < 0.5
        other, frame = (told, "{e}") if same else _changed(rng, told, held_out)
        first = rng.choice(_wordings(told.event, held_out))
        second = rng.choice([wording for wording in _wordings(other.event, held_out) if wording != first])
        rows.append((_sentence(rng, told, first), _sentence(rng, other, second, frame), str(int(same))))
    return rows


def write(path: Path, rng: random.Random, count: int, held_out: bool) -> None:
    """Write ``count`` pairs to ``path``."""
    rows = [("sentence1", "sentence2", "label"), *make(rng, count, held_out)]
    replace_text(path, "".join("\t".join(row) + "\n" for row in rows))
