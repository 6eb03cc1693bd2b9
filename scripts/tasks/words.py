"""Word lists of the generators, written for them, and their division into a part for training and one held out."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

__all__ = ["FIRST_NAMES", "MONTHS", "PLACES", "SURNAMES", "part", "pick_distinct"]

_T = TypeVar("_T")

FIRST_NAMES = """
Ada Agnes Albert Alice Amir Anna Arthur Barbara Bruno Carla Cecil Clara Daniel David Diana Edgar Edith Elena Emil Emma
Erik Esther Felix Fiona Frank Gerda Grace Gustav Hanna Harold Helen Hugo Ida Irene Isaac Ivan Jacob Jane Joan Julia
Karl Laura Leo Linda Louis Lucy Marco Maria Martha Max Mina Nina Nora Oscar Otto Paula Peter Rosa Ruth Samuel Sarah
Simon Sofia Stefan Susan Thomas Tina Ursula Victor Walter
""".split()

SURNAMES = """
Abbott Adler Baker Barnes Becker Bennett Berger Bishop Blake Brandt Brooks Burke Butler Carter Chapman Clarke Cohen
Coleman Cooper Craig Cruz Dawson Dixon Doyle Duncan Ellis Evans Ferrari Fischer Fletcher Foster Fox Garcia Gibson
Gordon Graham Grant Greene Gupta Hansen Harper Hayes Hoffman Holmes Howard Hughes Ito Jansen Jensen Kane Keller Kelly
Khan Klein Lambert Lane Larsen Lopez Lynch Marsh Mason Meyer Miller Mills Moore Moreno Morris Murphy Nash Nielsen
Nolan Novak Olsen Ortiz Osborne Owens Palmer Parker Patel Pearson Perry Porter Quinn Ramsey Reyes Rhodes Richter Rossi
Russo Sanders Sato Schmidt Shaw Silva Singh Spencer Stone Sutton Tanaka Torres Tucker Turner Vega Vogel Wagner Walsh
Watts Weber Wong Wright Young Zimmer
""".split()

PLACES = """
Aberdeen Antwerp Athens Bangkok Barcelona Basel Belfast Bergen Berlin Birmingham Bologna Bordeaux Boston Bremen
Brighton Bristol Brussels Budapest Cairo Calgary Cambridge Cardiff Chicago Cologne Copenhagen Cork Dallas Delhi Denver
Detroit Dresden Dublin Dundee Edinburgh Exeter Frankfurt Geneva Genoa Ghent Glasgow Graz Halifax Hamburg Hanover
Havana Helsinki Istanbul Kiel Kyoto Leeds Leipzig Lille Lima Lisbon Liverpool London Lyon Madrid Malmo Manchester
Manila Marseille Melbourne Miami Milan Montreal Moscow Mumbai Munich Nairobi Nantes Naples Norwich Odessa Osaka Oslo
Ottawa Oxford Palermo Perth Plymouth Porto Prague Quebec Riga Rome Rotterdam Salzburg Santiago Seattle Seoul Seville
Shanghai Sheffield Singapore Stockholm Stuttgart Swansea Tokyo Toronto Toulouse Trieste Turin Utrecht Valencia Venice
Vienna Warsaw York Zagreb Zurich
""".split()

MONTHS = "January February March April May June July August September October November December".split()


def part(words: Sequence[_T], held_out: bool) -> list[_T]:
    """Every third entry for the held-out part, the others for training: the parts share none."""
    return [word for index, word in enumerate(words) if (index % 3 == 2) == held_out]


def pick_distinct(rng: random.Random, words: Sequence[_T], count: int) -> list[_T]:
    """``count`` different entries, in random order."""
    return rng.sample(words, count)
