"""JSON data, mutated."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from itertools import islice
from typing import Any

__all__ = ["WEIRD_NUMBERS", "WEIRD_TEXTS", "mutated"]

WEIRD_NUMBERS: list[Any] = [
    *[0, -1, 1, 2, 16, 17, 127, 128, 9999, 10_000, 10**6, 10**9, -(10**9), 2**31, 2**63, 2**64, 10**40, 10**4000],
    *[0.5, -0.0, 1e-60, 5e-324, 1e39, 1e308, float("inf"), float("-inf"), float("nan"), 99.99, 100.0001],
]

WEIRD_TEXTS = [
    *["", " ", "default", "all", "*", "[", "[a-", "*a" * 50, "x" * 5000, "a\nb", "a\x1b[2Jb", "\0", "\u202e", "\u200b"],
    *["\ud800", "\ufeff", "😀", "ﬁ", "é", "__import__('os')", "/etc/passwd", "../a.yaml", "a:1", "1" * 5000, "null"],
    *["linear(x, w)", "maybe(add)(x)", "neg(" * 70 + "x" + ")" * 70, "-" * 400, "x_quantizer", "qdqbert"],
]


def mutated(random_: random.Random, data: Any) -> Any:
    """``data`` with one value in it removed, doubled, exchanged or made into something else."""
    data = copy.deepcopy(data)
    places = [*islice(_places(data), 20_000)]
    if not places:
        return _anything(random_)
    holder, key = random_.choice(places)
    change = random_.randrange(6)
    if change == 0:
        del holder[key]
    elif change == 1:
        other, name = random_.choice(places)
        holder[key] = copy.deepcopy(other[name])
    elif change == 2 and isinstance(holder, dict):
        holder[random_.choice([*WEIRD_TEXTS, *map(str, holder)])] = holder.pop(key)
    elif change == 3 and isinstance(holder, list):
        holder += [holder[key]] * random_.choice((1, 10, 200, 2000))
    else:
        holder[key] = _anything(random_)
    return data


def _places(data: Any) -> Iterator[tuple[Any, Any]]:
    waiting = [data]
    while waiting:
        holder = waiting.pop()
        items = holder.items() if isinstance(holder, dict) else enumerate(holder)
        for key, value in items:
            yield holder, key
            if isinstance(value, (dict, list)):
                waiting.append(value)


def _anything(random_: random.Random) -> Any:
    deep: Any = []
    for _ in range(random_.choice((1, 20, 60))):
        deep = [deep] if random_.random() < 0.5 else {"a": deep}
    return random_.choice(
        [
            random_.choice(WEIRD_NUMBERS),
            random_.choice(WEIRD_TEXTS),
            random_.choice((None, True, False, [], {})),
            [random_.choice(WEIRD_NUMBERS)] * random_.choice((1, 3, 1500)),
            [random_.choice(WEIRD_TEXTS)] * random_.choice((1, 3, 1500)),
            {random_.choice(WEIRD_TEXTS): random_.choice(WEIRD_NUMBERS)},
            {"min": random_.choice(WEIRD_NUMBERS), "max": random_.choice(WEIRD_NUMBERS)},
            deep,
        ]
    )
