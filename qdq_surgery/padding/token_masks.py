"""Which arguments of a model are rows of tokens, and which mask says what of them is padding.

A batch may bring several texts: a question and a passage, an encoder's and a decoder's, words and entities. Each has a
mask of its own, which is found by name (``passage_mask`` for ``passage_ids``), or by shape where only one fits. A wrong
pair cannot pass for a right one: :mod:`~qdq_surgery.padding.axis_probe` measures what padding reaches.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qdq_surgery.errors import CalibrationError

__all__ = [
    "Text",
    "check_decoder",
    "is_label",
    "padded",
    "resized",
    "rows_of",
    "texts_of",
    "token_means",
    "token_names",
    "trimmed",
    "with_padding",
]

#: Words that say what an argument holds, and not which text it belongs to.
_PLAIN = frozenset(
    "attention padding mask input inputs ids embeds hidden states token tokens type position positions values features "
    "task segment shape pronunciation lang langs".split()
)

#: Masks of something other than padding: heads to leave out, tokens that see all others, ...
_OTHER = frozenset({"head", "global", "special", "perm", "p"})

#: Arguments that hold pixels have rows of those.
_IMAGES = frozenset({"pixel", "image", "images"})

#: What a text itself is called; anything else of the same shape only goes with a text.
_CONTENT = frozenset({"ids", "input", "inputs", "embeds", "hidden"})


@dataclass(frozen=True)
class Text:
    """Rows of tokens among a model's arguments.

    Attributes:
        mask: Name of the argument that tells tokens from padding.
        content: Name of the argument with the tokens.
        names: All arguments with the same rows and tokens, the mask included.
        shape: (batch, tokens), or (batch, choices, tokens).
    """

    mask: str
    content: str
    names: tuple[str, ...]
    shape: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens in a row."""
        return self.shape[-1]

    @property
    def choices(self) -> int:
        """Rows of tokens for each row of the batch."""
        return int(torch.Size(self.shape[1:-1]).numel())


@functools.lru_cache(maxsize=1024)
def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z]+|\d+", str(name).lower()))


def _owner(name: str) -> frozenset[str]:
    return _words(name) - _PLAIN


def is_label(name: str) -> bool:
    """Whether an argument is what the loss compares with."""
    return "label" in str(name) or name in ("start_positions", "end_positions")


def rows_of(batch: Mapping[str, Any], texts: tuple[Text, ...]) -> int:
    """Rows of the batch; 1 if nothing in it has rows."""
    if texts:
        return texts[0].shape[0]
    content = next(_contents(batch), None)
    return 1 if content is None else content[1].shape[0]


def texts_of(batch: Mapping[str, Any]) -> tuple[Text, ...]:
    """The texts in a batch that have a mask.

    Raises:
        CalibrationError: A mask is no tensor, has not the shape of what it masks, holds something else than 0 and 1, or
            it cannot be told what it masks.
    """
    masks = {name: value for name, value in batch.items() if value is not None and _is_mask(name)}
    for name, mask in masks.items():
        if not isinstance(mask, Tensor):
            raise CalibrationError(f"{name} is a {type(mask).__name__}, wanted a tensor: 1 for a token, 0 for padding")
    contents = dict(_contents(batch))
    found: dict[str, str] = {}
    for name, mask in masks.items():
        own = [each for each in contents if _owner(each) == _owner(name)]
        if own:
            found[name] = own[0]
            _check(name, mask, own[0], contents[own[0]])
    for name, mask in masks.items():
        if name not in found and (content := _by_shape(name, mask, contents, found, masks)) is not None:
            found[name] = content
    for name in found:
        if bool(((masks[name] != 0) & (masks[name] != 1)).any()):
            raise CalibrationError(f"{name} holds something else than 0 and 1; wanted 1 for a token, 0 for padding")
    places = {name: tuple(masks[name].shape) for name in found}
    members = {name: [name] for name in found}
    for name, value in batch.items():
        mask_of = next((mask for mask, content in found.items() if content == name), None) or _companion(
            name, value, places
        )
        if mask_of is not None and name != mask_of:
            members[mask_of].append(name)
    return tuple(Text(name, content, tuple(members[name]), places[name]) for name, content in found.items())


def check_decoder(config: Any, batch: Mapping[str, Any]) -> None:
    """An encoder-decoder's own tokens may be padded with no mask that says so.

    Raises:
        CalibrationError: They are.
    """
    if not getattr(config, "is_encoder_decoder", False):
        return
    if batch.get("decoder_attention_mask") is not None or batch.get("decoder_inputs_embeds") is not None:
        return
    name = "labels" if batch.get("decoder_input_ids") is None else "decoder_input_ids"
    ids = batch.get(name)
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] < 2:
        return
    pad = getattr(config, "pad_token_id", None)
    ends = ids[:, -1] < 0 if pad is None else (ids[:, -1] < 0) | (ids[:, -1] == pad)
    if bool(ends.any()):
        raise CalibrationError(
            f"{name} ends in padding, and no decoder_attention_mask says so: it would be counted as text; add "
            "decoder_input_ids and decoder_attention_mask to the batch, 1 for a token, 0 for padding"
        )


def _is_mask(name: str) -> bool:
    return "mask" in _words(name) and not _words(name) & _OTHER


def _contents(batch: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """What can be a text, the likeliest first."""
    named = [
        (name, value)
        for name, value in batch.items()
        if isinstance(value, Tensor) and value.ndim >= 2 and "mask" not in _words(name) and not is_label(name)
        if not _words(name) & _IMAGES
    ]
    yield from sorted(named, key=lambda item: not _words(item[0]) & {"input", "inputs", "hidden", "embeds"})


def _lead(content: Tensor) -> tuple[int, ...]:
    """Rows and tokens of a text; the last axis of embeddings is neither."""
    vectors = content.is_floating_point() and content.ndim > 2
    return tuple(content.shape[:-1] if vectors else content.shape)


def _check(name: str, mask: Tensor, content: str, value: Tensor) -> None:
    if tuple(mask.shape) != _lead(value):
        raise CalibrationError(
            f"{name} has the shape {tuple(mask.shape)}, wanted {_lead(value)} as {content} has: 1 for a token, 0 for "
            "padding"
        )


def _by_shape(
    name: str, mask: Tensor, contents: Mapping[str, Tensor], found: Mapping[str, str], masks: Mapping[str, Tensor]
) -> str | None:
    """The only argument that ``mask`` fits; ``None`` if that has a mask already, or if the mask masks nothing."""
    fitting = [each for each, value in contents.items() if _lead(value) == tuple(mask.shape)]
    free = [each for each in fitting if each not in found.values() and _words(each) & _CONTENT]
    if len(free) == 1:
        return free[0]
    if not bool((mask == 0).any()) or (not free and any(masks[each].shape == mask.shape for each in found)):
        return None
    what = f"{' and '.join(free)} have that shape" if free else "no argument has such rows and tokens"
    raise CalibrationError(
        f"{name} has the shape {tuple(mask.shape)} and masks something, and it cannot be told what: {what}; name it "
        "after what it masks (passage_mask for passage_ids), or calibrate on batches without padding"
    )


def _companion(name: str, value: Any, places: Mapping[str, tuple[int, ...]]) -> str | None:
    """The mask of the text that an argument goes with, such as token types; ``None`` if that cannot be told."""
    if name in places:
        return name
    if not isinstance(value, Tensor) or is_label(name) or "head" in _words(name):
        return None
    fitting = [mask for mask, shape in places.items() if _like(value, shape)]
    if _words(name) & _CONTENT:
        fitting = [mask for mask in fitting if _owner(mask) == _owner(name)]
    if not fitting:
        return None

    def nearness(mask: str) -> tuple[int, int]:
        return len(_owner(mask) & _owner(name)), -len(_owner(mask) ^ _owner(name))

    best = max(map(nearness, fitting))
    nearest = [mask for mask in fitting if nearness(mask) == best]
    return nearest[0] if len(nearest) == 1 else None


def _like(value: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether ``value`` has rows (or one for all of them) and tokens as a mask of ``shape`` does."""
    own = tuple(value.shape[: len(shape)])
    return len(own) == len(shape) and own[0] in (1, shape[0]) and own[1:] == shape[1:]


def padded(batch: Mapping[str, Any], text: Text) -> Tensor | None:
    """(rows, tokens), true where padded; ``None`` if nothing is."""
    places: Tensor = (batch[text.mask] == 0).reshape(-1, text.length)
    return places if bool(places.any()) else None


def trimmed(batch: Mapping[str, Any], chunk: int = 1, labels: bool = True) -> dict[str, Any]:
    """The batch without the columns at its end that are padding in every row; the length is a multiple of ``chunk``.

    Args:
        labels: Whether labels of the same shape go with the text: those of an encoder-decoder do not.
    """
    try:
        text = next((each for each in texts_of(batch) if each.mask == "attention_mask"), None)
    except CalibrationError:
        return dict(batch)
    if text is None or not torch.Size(text.shape).numel() or not bool((batch[text.mask] != 0).any()):
        return dict(batch)
    used = (batch[text.mask] != 0).reshape(-1, text.length).any(0).nonzero()
    length = min(-(-(int(used.max()) + 1) // chunk) * chunk, text.length)
    if length == text.length:
        return dict(batch)
    narrowed, axis = token_names(batch, text) if labels else set(text.names), len(text.shape) - 1
    return {name: value.narrow(axis, 0, length) if name in narrowed else value for name, value in batch.items()}


def token_names(batch: Mapping[str, Any], text: Text) -> set[str]:
    """The arguments with an entry for each token of the text: labels that go with it, too."""
    labels = {name for name, value in batch.items() if is_label(name) and isinstance(value, Tensor)}
    return {*text.names, *(name for name in labels if _like(batch[name], text.shape))}


def resized(batch: Mapping[str, Any], texts: tuple[Text, ...], rows: int, lengths: tuple[int, ...]) -> dict[str, Any]:
    """The batch in another size, its entries repeated or left out, nothing masked, without labels."""
    before = rows_of(batch, texts)
    of = {
        name: (len(text.shape) - 1, length) for text, length in zip(texts, lengths, strict=True) for name in text.names
    }
    made: dict[str, Any] = {}
    for name, value in batch.items():
        if is_label(name):
            continue
        if isinstance(value, Tensor) and value.ndim:
            if value.shape[0] == before:  # one row, such as positions, is for all rows
                value = _repeated(value, 0, rows)
            if name in of:
                value = _repeated(value, *of[name])
        made[name] = value
    return {**made, **{text.mask: torch.ones_like(made[text.mask]) for text in texts}}


def _repeated(value: Tensor, axis: int, size: int) -> Tensor:
    return value.index_select(axis, torch.arange(size, device=value.device) % value.shape[axis])


def with_padding(
    resized: Mapping[str, Any], batch: Mapping[str, Any], text: Text, places: Tensor, content: int
) -> dict[str, Any]:
    """``resized`` with ``places`` of a text masked, and something else put there.

    Args:
        batch: Whose real tokens are put there.
        places: (rows, tokens).
        content: 0 or 1, for one filling or another, which differ wherever the text's arguments allow it.
    """
    made = dict(resized)
    mask = made[text.mask]
    shaped = places.reshape(mask.shape)
    made[text.mask] = mask.masked_fill(shaped, 0)
    for name in text.names:
        value = made[name]
        if name == text.mask or value.shape[0] != mask.shape[0]:
            continue
        filling = _fillings(batch[name], batch[text.mask], name == text.content)[content]
        wide = shaped.reshape(*shaped.shape, *[1] * (value.ndim - mask.ndim))
        made[name] = torch.where(wide, filling, value)
    return made


def _fillings(value: Tensor, mask: Tensor, must_differ: bool) -> tuple[Tensor, Tensor]:
    """Two entries of a text's argument for one token, taken from real tokens: so the model takes them."""
    entries = value.expand(*mask.shape, *value.shape[mask.ndim :])
    real = entries[mask != 0] if bool((mask != 0).any()) else entries.reshape(-1, *value.shape[mask.ndim :])
    first = real[0]
    other = (real != first).reshape(real.shape[0], -1).any(1).nonzero()
    if other.numel():
        return first, real[int(other[0])]
    if not must_differ:
        return first, first
    return first, first + 1 if value.is_floating_point() else torch.where(first == 0, 1, 0).to(value.dtype)


def token_means(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of what each text's tokens have, (texts, channels); of a text without a token it is NaN.

    Args:
        states: (texts, tokens, channels).
        mask: (texts, tokens), 0 for padding.
    """
    weights = mask.to(states).unsqueeze(-1)
    return (states * weights).sum(1) / weights.sum(1)
