"""Token classification, written in CoNLL-2003's four columns: PER, LOC, ORG and MISC as B-, I- and O.

The same surface stands for different things: Lincoln speaks, lies on a river, and wins at home; only the sentence tells
which. First names, suffixes and upper case give away some entities and not others. Held-out sentences have surfaces of
their own, and a third of their templates are such that training never shows. The part-of-speech and chunk columns are
only there to have the format: every row says the same in them.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from qdq_surgery.onnx_file.writer import replace_text
from tasks.words import FIRST_NAMES, MONTHS, PLACES, SURNAMES, part

__all__ = ["FILE_ENDING", "make", "write"]

FILE_ENDING = "txt"

#: Each is the name of people, of places and of teams or firms.
_AMBIGUOUS = """
Lincoln Florence Chelsea Jordan Washington Austin Georgia Victoria Hamilton Houston Sydney Madison Jackson Lancaster
Preston Chester Warwick Stafford Burnley Everton Kent Essex Carlisle Derby Durham Lawrence Bradford Windsor Nelson Dover
Stirling Clifton Bolton Stanley Wells Cleveland
""".split()

_ADJECTIVES = """
Danish Norwegian Polish Greek Turkish Finnish Brazilian Chilean Kenyan Korean Swedish Dutch Irish Belgian Hungarian
Canadian Peruvian Indian Romanian Scottish Egyptian
""".split()

_EVENTS = ("Cup", "Open", "Prize", "Marathon", "Trophy", "Festival", "Masters", "Derby", "Classic")
_FIRMS = ("Bank", "Airlines", "Motors", "Holdings", "Press", "Insurance", "Group", "Steel", "Records")
_TEAMS = ("United", "City", "Rovers", "Wanderers", "Athletic", "Rangers", "Town")
_BODIES = ("University of", "Bank of", "Museum of", "Institute of", "Port of", "Opera of")

#: ``[kind]`` is one entity, other words are none. Every third template is only used in held-out sentences.
_TEMPLATES = tuple(
    line.strip()
    for line in """
    [per] told reporters in [loc] that the talks had failed .
    The train from [loc] to [loc] was late again .
    [org] beat [org] 3 - 1 on Saturday .
    [per] , who was born in [loc] , joined [org] last week .
    Shares of [org] fell by two percent in [month] .
    The [misc] minister met [per] near [loc] .
    [per] won the [event] for the second time .
    Heavy rain closed the airport of [loc] on Monday .
    Police in [loc] arrested a [misc] driver .
    [org] said it would close its plant in [loc] .
    " I never liked [loc] , " said [per] .
    A spokesman for [org] declined to comment .
    [per] scored twice as [org] drew with [org] .
    [loc] lies on a river north of [loc] .
    The doctor asked [per] to stay in bed .
    [org] has sold its [misc] business to [org] .
    The [event] will be held in [loc] next [month] .
    [per] married [per] in a small church in [loc] .
    Thousands marched through [loc] against [org] .
    [misc] farmers want more money , [per] wrote .
    After the match [per] thanked the fans of [org] .
    The road to [loc] is blocked by snow .
    [org] hired [per] as its chief lawyer .
    [per] beat [per] in straight sets at the [event] .
    The coach of [org] praised [per] .
    In [loc] the temperature rose to forty degrees .
    [per] and her brother left [loc] as children .
    Analysts expect [org] to raise its forecast .
    The mayor of [loc] opened the [event] .
    [org] lost at home to [org] and sacked [per] .
    A [misc] ship sank off [loc] , and the crew was saved .
    The widow of [per] lives in [loc] .
    """.strip().splitlines()
)

_Entity = tuple[str, str]  # words, separated by spaces, and the tag; "" where it is no entity


def _person(rng: random.Random, held_out: bool) -> _Entity:
    first = rng.choice(part(FIRST_NAMES, held_out))
    last = rng.choice(part(_AMBIGUOUS if rng.random() < 0.6 else SURNAMES, held_out))
    return rng.choice((last, last, f"{first} {last}")), "PER"


def _place(rng: random.Random, held_out: bool) -> _Entity:
    name = rng.choice(part(_AMBIGUOUS if rng.random() < 0.6 else PLACES, held_out))
    return rng.choice((name, name, name, name, f"New {name}", f"{name} Bay")), "LOC"


def _organisation(rng: random.Random, held_out: bool) -> _Entity:
    names = (_AMBIGUOUS, PLACES, SURNAMES)[rng.choice((0, 0, 0, 1, 2))]
    name = rng.choice(part(names, held_out))
    city = rng.choice(part(PLACES, held_out))
    forms = (
        name,
        name,
        name,
        f"{name} {rng.choice(_TEAMS)}",
        f"{name} {rng.choice(_FIRMS)}",
        f"{name} & {rng.choice(part(SURNAMES, held_out))}",
        f"{rng.choice(_BODIES)} {city}",
    )
    return rng.choice(forms), "ORG"


def _nation(rng: random.Random, held_out: bool) -> _Entity:
    return rng.choice(part(_ADJECTIVES, held_out)), "MISC"


def _occasion(rng: random.Random, held_out: bool) -> _Entity:
    name = rng.choice(part((*_AMBIGUOUS, *_ADJECTIVES), held_out))
    return f"{name} {rng.choice(_EVENTS)}", "MISC"


def _month(rng: random.Random, held_out: bool) -> _Entity:  # noqa: ARG001  months are no entities and in both parts
    return rng.choice(MONTHS), ""


_MAKERS: dict[str, Callable[[random.Random, bool], _Entity]] = {
    "per": _person,
    "loc": _place,
    "org": _organisation,
    "misc": _nation,
    "event": _occasion,
    "month": _month,
}


def _sentence(rng: random.Random, held_out: bool) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for word in rng.choice(_TEMPLATES if held_out else part(_TEMPLATES, False)).split():
        if not word.startswith("["):
            rows.append((word, "O"))
            continue
        text, tag = _MAKERS[word.strip("[]")](rng, held_out)
        for index, name in enumerate(text.split()):
            rows.append((name, f"{'I' if index else 'B'}-{tag}" if tag else "O"))
    return rows


def make(rng: random.Random, count: int, held_out: bool) -> list[list[tuple[str, str]]]:
    """``count`` sentences of (word, tag)."""
    return [_sentence(rng, held_out) for _ in range(count)]


def write(path: Path, rng: random.Random, count: int, held_out: bool) -> None:
    """Write ``count`` sentences to ``path``."""
    lines = ["-DOCSTART- -X- -X- O", ""]
    for sentence in make(rng, count, held_out):
        lines += [f"{word} X X {tag}" for word, tag in sentence]
        lines.append("")
    replace_text(path, "\n".join(lines))
