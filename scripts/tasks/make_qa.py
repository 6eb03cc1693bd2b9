"""Extractive question answering, written as SQuAD v1.1 JSON.

A context tells of one or more subjects of one kind, with several facts of the same kind: founder and manager, opening
and accident. A question names one subject and asks for one fact in other words than the context's, so that neither
position nor the kind of value is enough. Every second context keeps each subject's sentences together and calls it by
its kind ("the firm") after the first; the others mix the sentences of all subjects. Held-out contexts have names,
places and subjects of their own, and one wording of each fact and question that training never shows.

Templates, not real text: a fact has one right span, so that a lost point is the model's.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdq_surgery.onnx_file.writer import replace_text
from tasks.words import FIRST_NAMES, MONTHS, PLACES, SURNAMES, part, pick_distinct

__all__ = ["FILE_ENDING", "make", "write"]

FILE_ENDING = "json"

_QUESTIONS_PER_CONTEXT = 3

#: Share of the contexts that tell of two subjects, and of those on one subject that have two facts of a kind.
_TWO_SUBJECTS, _TWO_OF_A_KIND = 0.1, 0.35


@dataclass(frozen=True)
class Relation:
    """One fact about a subject: ``{s}`` is the subject, ``{v}`` the value. The last wording of each is held out."""

    kind: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]


@dataclass(frozen=True)
class Scene:
    """A kind of subject, how a text calls it again, and what is told about it."""

    again: str
    first_parts: tuple[str, ...]
    second_parts: tuple[str, ...]
    relations: tuple[Relation, ...]


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


SCENES = (
    Scene(
        "the firm",
        _words(
            "Amber Beacon Cedar Comet Delta Falcon Granite Harbour Heron Ivory Juniper Lantern Maple Meridian Onyx "
            "Orchid Pioneer Quartz Raven Saffron Summit Tulip Vertex Willow"
        ),
        ("Textiles", "Optics", "Foods", "Motors", "Press", "Glass", "Toys", "Paper", "Steel"),
        (
            Relation(
                "person",
                ("{v} founded {s}.", "{s} was set up by {v}.", "{s} began in the garage of {v}."),
                ("Who started {s}?", "Which person created {s}?", "By whom was {s} established?"),
            ),
            Relation(
                "person",
                ("{v} now manages {s}.", "{s} is led by {v} today.", "At the head of {s} stands {v}."),
                ("Who is in charge of {s}?", "Who runs {s} at present?", "What is the name of the boss of {s}?"),
            ),
            Relation(
                "year",
                ("{s} opened its doors in {v}.", "The story of {s} began in {v}.", "{s} dates from {v}."),
                ("When did {s} start business?", "In which year was {s} founded?", "Since when has {s} existed?"),
            ),
            Relation(
                "place",
                ("{s} has its offices in {v}.", "The head office of {s} is in {v}.", "{s} is run from {v}."),
                ("Where is {s} based?", "In which city does {s} sit?", "What town is home to {s}?"),
            ),
            Relation(
                "place",
                (
                    "{s} sends most of its goods to {v}.",
                    "{v} buys most of what {s} makes.",
                    "{s} sells chiefly in {v}.",
                ),
                ("Where are most customers of {s}?", "Which city is the main market of {s}?", "Where does {s} sell?"),
            ),
            Relation(
                "number",
                (
                    "{s} employs {v} people.",
                    "About {v} workers earn their living at {s}.",
                    "{s} pays {v} wages a month.",
                ),
                ("How many people work for {s}?", "How large is the staff of {s}?", "What is the headcount of {s}?"),
            ),
        ),
    ),
    Scene(
        "the bridge",
        _words(
            "Abbey Castle Cathedral Chapel Convent Dragon Eagle Friar Garden Guild Jubilee King Lion Market Mill "
            "Minster Monk Palace Priory Queen Rose Saint Swan Tower"
        ),
        ("Bridge", "Viaduct", "Crossing"),
        (
            Relation(
                "person",
                ("{v} designed {s}.", "The plans of {s} were drawn by {v}.", "{s} came from the pen of {v}."),
                ("Who was the architect of {s}?", "Who planned {s}?", "Whose design is {s}?"),
            ),
            Relation(
                "person",
                ("{v} paid for {s}.", "The money for {s} came from {v}.", "{s} was a gift of {v}."),
                ("Who financed {s}?", "Who bore the cost of {s}?", "Whose fortune made {s} possible?"),
            ),
            Relation(
                "date",
                ("{s} was opened on {v}.", "The first carts crossed {s} on {v}.", "{s} has carried traffic since {v}."),
                ("When could people first use {s}?", "On what day did {s} open?", "What is the opening date of {s}?"),
            ),
            Relation(
                "date",
                ("A storm damaged {s} on {v}.", "On {v} part of {s} fell down.", "{s} lost an arch on {v}."),
                ("When was {s} hit by an accident?", "On what day did {s} break?", "When did {s} suffer harm?"),
            ),
            Relation(
                "number",
                ("{s} is {v} metres long.", "From end to end {s} measures {v} metres.", "{s} spans {v} metres."),
                ("How long is {s}?", "What is the length of {s}?", "How far does {s} reach?"),
            ),
            Relation(
                "place",
                ("{s} stands in {v}.", "Visitors to {v} like to walk over {s}.", "{s} is a sight of {v}."),
                ("Where is {s}?", "Which city is {s} in?", "Where must one go to see {s}?"),
            ),
        ),
    ),
    Scene(
        "the novel",
        _words(
            "Bitter Borrowed Broken Burning Crooked Distant Empty Fallen Forgotten Frozen Gentle Golden Hidden Hollow "
            "Lonely Narrow Patient Quiet Restless Secret Silent Sleeping Stolen Wandering"
        ),
        ("Orchard", "Letters", "River", "Winter", "Garden", "Mirror", "Station", "Islands", "Window"),
        (
            Relation(
                "person",
                ("{v} wrote {s}.", "{s} is a work of {v}.", "{v} spent years on the pages of {s}."),
                ("Who is the author of {s}?", "Who penned {s}?", "From whose hand is {s}?"),
            ),
            Relation(
                "person",
                (
                    "{v} translated {s} into English.",
                    "English readers know {s} through {v}.",
                    "{v} put {s} into English.",
                ),
                (
                    "Who is the translator of {s}?",
                    "Who rendered {s} in English?",
                    "Whose English version of {s} is read?",
                ),
            ),
            Relation(
                "year",
                ("{s} was printed in {v}.", "{s} reached the bookshops in {v}.", "Readers first held {s} in {v}."),
                ("When was {s} published?", "In which year did {s} come out?", "When did {s} appear?"),
            ),
            Relation(
                "year",
                ("{s} was made into a play in {v}.", "Theatres showed {s} in {v}.", "{s} came to the stage in {v}."),
                ("When did {s} become a drama?", "What year was {s} performed?", "When could one watch {s}?"),
            ),
            Relation(
                "place",
                ("The plot of {s} unfolds in {v}.", "{s} plays in {v}.", "{v} is the scene of {s}."),
                (
                    "Where is the story of {s} set?",
                    "In which city does {s} happen?",
                    "Where do the figures of {s} live?",
                ),
            ),
            Relation(
                "number",
                ("{s} fills {v} pages.", "It takes {v} pages to tell {s}.", "{s} ends on page {v}."),
                ("How long a book is {s}?", "How many pages does {s} have?", "What is the page count of {s}?"),
            ),
        ),
    ),
    Scene(
        "the ship",
        _words(
            "Adventure Albatross Arrow Aurora Bounty Carnation Courage Diamond Dolphin Endeavour Fortune Gazelle "
            "Hercules Liberty Mercury Neptune Orion Penguin Phoenix Sapphire Triton Unity Valiant Zephyr"
        ),
        ("",),
        (
            Relation(
                "person",
                ("{v} commanded {s}.", "The captain of {s} was {v}.", "{v} held the command aboard {s}."),
                ("Who was in command of {s}?", "Under whom did {s} sail?", "Who gave the orders on {s}?"),
            ),
            Relation(
                "person",
                ("{v} owned {s}.", "{s} belonged to {v}.", "{s} was the property of {v}."),
                ("Who was the owner of {s}?", "Whose ship was {s}?", "Who possessed {s}?"),
            ),
            Relation(
                "place",
                ("{s} was built in {v}.", "The yards of {v} launched {s}.", "Carpenters in {v} put {s} together."),
                ("Where was {s} made?", "In which port was {s} constructed?", "Where did {s} first touch water?"),
            ),
            Relation(
                "place",
                ("{s} sank off {v}.", "{s} went down near {v}.", "{s} found her grave outside {v}."),
                ("Where was {s} lost?", "Near which city did {s} sink?", "Close to what port is the wreck of {s}?"),
            ),
            Relation(
                "date",
                ("{s} left harbour on {v}.", "The last voyage of {s} began on {v}.", "On {v} {s} put to sea."),
                ("When did {s} set out?", "On what day did {s} depart?", "What is the sailing date of {s}?"),
            ),
            Relation(
                "number",
                ("{s} carried {v} sailors.", "There were {v} hands aboard {s}.", "{v} men served on {s}."),
                ("How many people were in the crew of {s}?", "How big was the crew of {s}?", "How many manned {s}?"),
            ),
        ),
    ),
)


def _person(rng: random.Random, held_out: bool) -> str:
    return f"{rng.choice(part(FIRST_NAMES, held_out))} {rng.choice(part(SURNAMES, held_out))}"


def _place(rng: random.Random, held_out: bool) -> str:
    return rng.choice(part(PLACES, held_out))


def _year(rng: random.Random, held_out: bool) -> str:
    return str(rng.choice(part(range(1821, 2012), held_out)))


def _date(rng: random.Random, held_out: bool) -> str:
    return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {_year(rng, held_out)}"


def _number(rng: random.Random, held_out: bool) -> str:
    return str(rng.choice(part(range(41, 980), held_out)))


_VALUES: dict[str, Callable[[random.Random, bool], str]] = {
    "person": _person,
    "place": _place,
    "year": _year,
    "date": _date,
    "number": _number,
}


@dataclass(frozen=True)
class _Fact:
    subject: int
    relation: Relation
    value: str


@dataclass(frozen=True)
class _Told:
    text: str
    places: dict[_Fact, int]


def _subjects(rng: random.Random, scene: Scene, held_out: bool, count: int) -> list[str]:
    firsts = pick_distinct(rng, part(scene.first_parts, held_out), count)
    return [f"the {first} {rng.choice(scene.second_parts)}".strip() for first in firsts]


def _relations(rng: random.Random, scene: Scene, extra: int) -> list[Relation]:
    """One relation for each kind of value, and ``extra`` more, whose values could be taken for those."""
    shuffled = pick_distinct(rng, scene.relations, len(scene.relations))
    first = {relation.kind: relation for relation in shuffled}
    others = [relation for relation in shuffled if relation not in first.values()]
    return [*first.values(), *others[:extra]]


def _facts(rng: random.Random, relations: Sequence[Relation], held_out: bool, subjects: int) -> list[_Fact]:
    """The same relations of every subject, and no value twice."""
    used, facts = set[str](), list[_Fact]()
    for subject in range(subjects):
        for relation in relations:
            value = _VALUES[relation.kind](rng, held_out)
            while value in used:
                value = _VALUES[relation.kind](rng, held_out)
            used.add(value)
            facts.append(_Fact(subject, relation, value))
    return facts


def _ordered(rng: random.Random, facts: list[_Fact]) -> tuple[list[_Fact], bool]:
    """The facts as told, and whether each subject's come together."""
    shuffled = rng.sample(facts, len(facts))
    if rng.random() < 0.5:
        return shuffled, False
    subjects = list(dict.fromkeys(fact.subject for fact in shuffled))
    return sorted(shuffled, key=lambda fact: subjects.index(fact.subject)), True


def _wording(rng: random.Random, wordings: tuple[str, ...], held_out: bool) -> str:
    return rng.choice(wordings if held_out else wordings[:-1])


def _context(rng: random.Random, scene: Scene, subjects: list[str], facts: list[_Fact], held_out: bool) -> _Told:
    told, together = _ordered(rng, facts)
    text, places, before = "", dict[_Fact, int](), -1
    for fact in told:
        name = scene.again if together and fact.subject == before else subjects[fact.subject]
        before = fact.subject
        head, tail = _wording(rng, fact.relation.statements, held_out).replace("{s}", name).split("{v}")
        head = f"{head[:1].upper()}{head[1:]}"
        text = f"{text} {head}" if text else head
        places[fact] = len(text)
        text += fact.value + tail
    return _Told(text, places)


def _paragraph(rng: random.Random, held_out: bool, first_id: int, questions: int) -> dict[str, Any]:
    scene = rng.choice(SCENES)
    count = 2 if rng.random() < _TWO_SUBJECTS else 1
    subjects = _subjects(rng, scene, held_out, count)
    relations = _relations(rng, scene, extra=int(rng.random() < _TWO_OF_A_KIND))
    facts = _facts(rng, relations if count == 1 else pick_distinct(rng, relations, 3), held_out, count)
    told = _context(rng, scene, subjects, facts, held_out)
    asked = []
    for number, fact in enumerate(pick_distinct(rng, facts, questions)):
        question = _wording(rng, fact.relation.questions, held_out).replace("{s}", subjects[fact.subject])
        asked.append(
            {
                "id": f"{'held-out' if held_out else 'train'}-{first_id + number:05d}",
                "question": question,
                "answers": [{"text": fact.value, "answer_start": told.places[fact]}],
            }
        )
    return {"context": told.text, "qas": asked}


def make(rng: random.Random, count: int, held_out: bool) -> dict[str, Any]:
    """A SQuAD v1.1 document with ``count`` questions."""
    paragraphs = [
        _paragraph(rng, held_out, first, min(_QUESTIONS_PER_CONTEXT, count - first))
        for first in range(0, count, _QUESTIONS_PER_CONTEXT)
    ]
    title = "Firms, bridges, novels and ships"
    return {"version": "1.1", "data": [{"title": title, "paragraphs": paragraphs}]}


def write(path: Path, rng: random.Random, count: int, held_out: bool) -> None:
    """Write ``count`` questions to ``path``."""
    text = json.dumps(make(rng, count, held_out), indent=1, ensure_ascii=False)
    replace_text(path, text + "\n")
