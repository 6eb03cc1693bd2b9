"""Names that differ only in the number of their encoder layer, as one: ``encoder.layer.*.output`` in layers 0-11."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

__all__ = [
    "by_layers",
    "expand",
    "fold",
    "join_layers",
    "layer_in",
    "split_layers",
    "star",
    "star_numbers",
    "unstar",
]

#: No model has more layers, or names that are folded, than this: a text that says so would fill the memory.
_MOST_LAYERS, _MOST_NAMES = 10_000, 100_000

_RUN = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", re.ASCII)
#: The path of a module in a text; a decimal number is none.
_PATH = re.compile(r"(?<![\w.])[^\W\d]\w*(?:\.\w+)+")

#: Stands for the number of the encoder layer.
_STAR = "*"

_K = TypeVar("_K", bound=Hashable)


def star(name: str, layer: int | None) -> str:
    """``name`` with the number of its layer replaced, if it holds it."""
    parts = name.split(".")
    if layer is not None and str(layer) in parts:
        parts[parts.index(str(layer))] = _STAR
    return ".".join(parts)


def star_numbers(text: str) -> str:
    """``text`` with every number of a module replaced, in all paths in it: of names whose layer is not known."""
    return _PATH.sub(lambda path: ".".join(_STAR if part.isdecimal() else part for part in path[0].split(".")), text)


def unstar(name: str, layer: int | None) -> str:
    """The name that :func:`star` was given."""
    return name if layer is None else name.replace(_STAR, str(layer))


def layer_in(name: str) -> int | None:
    """The first number in a name: its layer, where nothing else tells it."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), None)


def join_layers(layers: Iterable[int]) -> str:
    """``0-3, 5`` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][1] + 1:
            runs[-1][1] = layer
        else:
            runs.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def split_layers(text: str) -> list[int]:
    """What :func:`join_layers` joined.

    Raises:
        ValueError: It is no such text.
    """
    return [layer for run in _runs(text) for layer in run]


def _runs(text: str) -> list[range]:
    """The runs of layers in a text, which takes no longer than the text, whatever it says."""
    runs: list[range] = []
    for run in text.split(", "):
        found = _RUN.fullmatch(run)
        start, end = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not start <= end < _MOST_LAYERS:
            raise ValueError(f"'{run[:40]}' are no layers")
        runs.append(range(start, end + 1))
    if sum(map(len, runs)) > _MOST_LAYERS:
        raise ValueError(f"'{text[:40]}' are more than {_MOST_LAYERS} layers")
    return runs


def fold(names: Mapping[str, int | None]) -> dict[str, str | None]:
    """Names with their layers, folded: starred name to layers; ``None`` for a name outside the layers."""
    return by_layers((star(name, layer), layer) for name, layer in names.items())


def by_layers(items: Iterable[tuple[_K, int | None]]) -> dict[_K, str | None]:
    """Things that several layers have, each once, with these layers joined; ``None`` for what is outside of them."""
    layers: dict[_K, list[int]] = {}
    for key, layer in items:
        layers.setdefault(key, []).extend(() if layer is None else (layer,))
    return {key: join_layers(found) if found else None for key, found in layers.items()}


def expand(folded: Mapping[str, str | None]) -> list[str]:
    """The names that :func:`fold` folded.

    Raises:
        ValueError: The layers are no such text, or there are too many names.
    """
    count = sum(1 if layers is None else sum(map(len, _runs(layers))) for layers in folded.values())
    if count > _MOST_NAMES:
        raise ValueError(f"{count} names are more than {_MOST_NAMES}")
    return [
        unstar(name, layer)
        for name, layers in folded.items()
        for layer in ([None] if layers is None else split_layers(layers))
    ]
