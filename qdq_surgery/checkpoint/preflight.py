"""A folder with a model, looked at before transformers reads it: what a stranger's files may cost is bounded.

transformers builds whatever a config asks for. Here the files are looked at first: whether they are regular files and
say what such files say, and whether what the config asks for is of the size of the weights that are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from qdq_surgery.errors import ModelError
from qdq_surgery.safety.untrusted import DamagedError, Item, parse_json, quoted, read_regular_file

__all__ = ["check_files", "check_size"]

#: The most bytes of a JSON file, and of the header of a safetensors file.
_MOST_JSON, _MOST_HEADER = 1 << 22, 1 << 25

_LAYERS = re.compile(r"(?:^|_)n?_?(?:layers?|depths?|blocks?|stages?)$")
_LABELS = re.compile(r"(?:^|_)n?(?:um)?_?labels$")

#: Whatever the weights are: numbers of layers, of labels and of anything else that a config may state.
_LEAST = {_LAYERS: 256, _LABELS: 1 << 16}
_ELSE = 1 << 22

#: How much more than the weights a model may be: tied weights, tables of positions and masks are in no file.
_TIMES, _BESIDE = 8, 1 << 26


@dataclass(frozen=True)
class Weights:
    """What the headers of a folder's weights say.

    Attributes:
        tensors: How many there are.
        largest: The size of the longest axis.
        bytes: Of all files.
    """

    tensors: int
    largest: int
    bytes: int


def check_files(folder: Path) -> Weights:
    """Look at the files of a folder that transformers is going to read.

    Raises:
        ModelError: One is no regular file, or does not say what it should; names file and place.
    """
    weights = _weights(folder)
    for path in sorted(folder.glob("*.json")):
        _named(path, lambda path=path: _json(path, weights))
    return weights


def check_size(kind: type[PreTrainedModel], folder: Path, weights: Weights) -> None:
    """Whether the model that a folder's config asks for has about the size of its weights. Only shapes are made.

    Raises:
        ModelError: It is many times larger.
    """
    config: Any = kind.config_class
    # (QDQBERT's classes convert themselves, which changes no size: their base is transformers' own.)
    base = next((each for each in kind.__mro__ if each.__module__.startswith("transformers.")), kind)
    with torch.device("meta"):
        model = base(config.from_pretrained(folder, local_files_only=True))
    size = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
    if size > _TIMES * weights.bytes + _BESIDE:
        raise ModelError(
            f"{folder / 'config.json'} asks for a {kind.__name__} of {size / 1e6:.0f} MB, and the weights beside it "
            f"have {weights.bytes / 1e6:.0f} MB; they do not belong together"
        )


def _weights(folder: Path) -> Weights:
    tensors, largest, size = 0, 0, 0
    for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin"))):
        facts = _named(path, lambda path=path: _regular(path))
        size += facts
        if path.suffix == ".safetensors":
            shapes = _named(path, lambda path=path: _shapes(path))
            tensors += len(shapes)
            largest = max([largest, *(axis for shape in shapes for axis in shape)])
        else:  # a pickle has no header: its numbers are bounded by its size
            tensors, largest = tensors + facts // 64, max(largest, facts)
    return Weights(tensors, largest, size)


def _named(path: Path, read: Any) -> Any:
    try:
        return read()
    except (DamagedError, OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} cannot be read: {reason[:300]}") from None


def _regular(path: Path) -> int:
    if not path.is_file():
        raise DamagedError("it is no regular file")
    return path.stat().st_size


def _shapes(path: Path) -> list[list[int]]:
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _MOST_HEADER:
        raise DamagedError(f"its header has {length} bytes, more than {_MOST_HEADER}")
    with safe_open(path, framework="np") as opened:
        return [opened.get_slice(name).get_shape() for name in opened.keys()]  # noqa: SIM118 (it is no dict)


def _json(path: Path, weights: Weights) -> None:
    if path.name == "qdq_report.json":
        return  # loading needs none of it
    if path.name not in ("config.json", "generation_config.json") and not path.name.endswith(".index.json"):
        return  # a tokenizer's: as large as its vocabulary, and read by the tokenizer only
    item = parse_json(read_regular_file(path, _MOST_JSON), path.name, _MOST_JSON)
    if path.name.endswith(".index.json"):
        for name, file in item.entries().get("weight_map", Item({}, path.name)).entries().items():
            if Path(file.text()).name != file.value or not _regular(path.parent / file.value):
                raise DamagedError(f"{quoted(name)} is in {quoted(file.value)}, which is no file beside it")
        return
    _check_numbers(item, "", weights)


def _check_numbers(item: Item, key: str, weights: Weights, depth: int = 0) -> None:
    """Bound what a config asks for, but in its ``quantization_config``, which is read within bounds of its own."""
    if depth > 16:
        raise DamagedError(f"{item.where} is nested too deep")
    if isinstance(item.value, dict):
        for name, each in item.entries().items():
            if name != "quantization_config":
                _check_numbers(each, name, weights, depth + 1)
    elif isinstance(item.value, list):
        for each in item.items():
            _check_numbers(each, key, weights, depth + 1)
    elif type(item.value) is int:
        item.integer(-_ELSE, max(_bounds(key, weights)))
    elif depth == 0:
        item.refuse("a mapping")


def _bounds(key: str, weights: Weights) -> Iterable[int]:
    for pattern, least in _LEAST.items():
        if pattern.search(key):
            return least, weights.tensors if pattern is _LAYERS else weights.largest
    return _ELSE, weights.largest
