"""Single sentences, written as a GLUE-style TSV: is a review's verdict good (label 1) or bad (0)?

A word alone does not tell: praise is negated ("anything but dull"), granted and taken back ("for all its lovely scenery
the film bored me"), or compared. Half the sentences have words of both kinds. Held-out sentences use adjectives and
verdicts that training never shows, so that a model has to know what they mean.
"""

from __future__ import annotations

import random
from pathlib import Path

from qdq_surgery.onnx_file.writer import replace_text
from tasks.words import part

__all__ = ["FILE_ENDING", "make", "write"]

FILE_ENDING = "tsv"

_GOOD = """
brilliant charming touching witty gripping graceful honest inventive lovely moving fresh elegant delightful clever
thrilling tender warm superb vivid engaging subtle funny memorable beautiful stirring sincere lively polished
rewarding splendid
""".split()

_BAD = """
dull clumsy tedious shallow lifeless pretentious messy predictable bland tiresome awkward silly forgettable stale
wooden dreary confused noisy flat lazy pointless sloppy ugly hollow grating muddled boring annoying feeble cheap
""".split()

_ASPECTS = """
acting plot score dialogue camerawork ending opening cast script pacing scenery humour direction editing romance
costumes finale soundtrack
""".split()

_WORKS = ("film", "movie", "drama", "comedy", "thriller", "sequel", "documentary", "western", "musical")

_GOOD_VERDICTS = (
    "won me over",
    "stayed with me for days",
    "is worth every minute",
    "deserves a large audience",
    "kept me on the edge of my seat",
    "left me smiling",
    "is one to see twice",
    "hits the mark",
    "earns its applause",
    "works wonderfully",
    "is a joy",
    "does not disappoint",
)

_BAD_VERDICTS = (
    "bored me",
    "falls apart",
    "is a waste of an evening",
    "left me cold",
    "made me look at my watch",
    "never comes to life",
    "goes nowhere",
    "is best avoided",
    "fails on every count",
    "sent half the audience home",
    "is hard to sit through",
    "does not satisfy",
)


_OPENERS = ("", "", "", "to be fair , ", "in the end , ", "after all the talk , ", "as far as i can tell , ")


def _sentence(rng: random.Random, held_out: bool, good: bool) -> str:
    """One review; ``own`` words fit the verdict, ``other`` ones are against it."""
    own_words, other_words = (_GOOD, _BAD) if good else (_BAD, _GOOD)
    own = rng.sample(part(own_words, held_out), 2)
    other = rng.sample(part(other_words, held_out), 2)
    verdict = rng.choice(part(_GOOD_VERDICTS if good else _BAD_VERDICTS, held_out))
    aspects, work = rng.sample(_ASPECTS, 2), rng.choice(_WORKS)
    return rng.choice(_OPENERS) + rng.choice(
        (
            f"the {aspects[0]} is {own[0]} and the {aspects[1]} {own[1]}",
            f"such {own[0]} {aspects[0]} and {own[1]} {aspects[1]} are rare in a {work}",
            f"this {work} {verdict}",
            f"the {aspects[0]} is anything but {other[0]}",
            f"nobody could call the {aspects[0]} of this {work} {other[0]}",
            f"far from being {other[0]} , this {work} is {own[0]}",
            f"for all its {other[0]} {aspects[0]} , the {work} {verdict}",
            f"the {aspects[0]} may be {other[0]} , but the {work} {verdict}",
            f"although friends had told me that the {work} was {other[0]} , i found it {own[0]}",
            f"the {aspects[0]} is {other[0]} and the {aspects[1]} {other[1]} , and still the {work} {verdict}",
            f"the {work} {verdict} , even if the {aspects[0]} is {other[0]}",
            f"i had expected something {other[0]} and {other[1]} ; i was wrong",
            f"less {other[0]} than {own[0]} , the {work} {verdict}",
        )
    )


def make(rng: random.Random, count: int, held_out: bool) -> list[tuple[str, str]]:
    """``count`` rows: sentence, label."""
    rows = []
    for _ in range(count):
        good = rng.random() < 0.5
        rows.append((_sentence(rng, held_out, good), str(int(good))))
    return rows


def write(path: Path, rng: random.Random, count: int, held_out: bool) -> None:
    """Write ``count`` sentences to ``path``."""
    rows = [("sentence", "label"), *make(rng, count, held_out)]
    replace_text(path, "".join("\t".join(row) + "\n" for row in rows))
