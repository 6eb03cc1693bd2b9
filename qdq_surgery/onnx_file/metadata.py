"""What a file says of itself: read under a budget, and of the types that those who use it rely on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from qdq_surgery.errors import ExportError
from qdq_surgery.safety.untrusted import quoted, read_json_text

__all__ = ["METADATA", "Site", "check_sites", "dump_sites", "load_sites", "own_entries", "read_config"]

#: Keys of the file's metadata begin with this.
METADATA = "qdq_surgery."
#: Numbers of a config that are computed with here.
_NUMBERS = (
    "hidden_size",
    "max_position_embeddings",
    "num_attention_heads",
    "pad_token_id",
    "type_vocab_size",
    "vocab_size",
)
_LARGEST = 2**40


@dataclass
class Site:
    """One pair of QuantizeLinear and DequantizeLinear; or an int8 weight, or looked up int8 rows, dequantized.

    Attributes:
        quantizers: Qualified names of the PyTorch quantizers that it stands for: more than one where they read one
            tensor with one scale.
        role: ``"input"`` or ``"weight"``.
        quantize: Name of the QuantizeLinear; ``None`` for a weight or a table, which is stored as integers.
        dequantize: Name of the DequantizeLinear.
        value: Name of what the DequantizeLinear gives; see ``rows``.
        factor: That value is ``factor`` times the fake-quantized value of PyTorch: not 1 where a scale of the
            attention was folded in.
        transposed: Whether a weight is stored as (in, out) rather than PyTorch's (out, in).
        scaled: Whether that value is the fake-quantized one divided by a scale for each channel.
        rows: Of a table of int8 rows that are looked up and dequantized then: name of the Mul by the rows' scales,
            behind the DequantizeLinear, which gives the value. ``None`` of all else.
        divided: Of a weight whose outputs are divided by the scales of another quantizer, which reads them: that one's
            name. The value is the fake-quantized one with its rows (of PyTorch's form) divided. ``None`` of all else.
    """

    quantizers: list[str]
    role: str
    quantize: str | None
    dequantize: str
    value: str
    factor: float = 1.0
    transposed: bool = field(default=False)
    scaled: bool = False
    rows: str | None = None
    divided: str | None = None

    @property
    def name(self) -> str:
        """The first of its quantizers."""
        return self.quantizers[0]


def dump_sites(sites: Sequence[Site]) -> str:
    """As JSON, for the file's metadata."""
    entries = [asdict(site) for site in sites]
    # Releases before the scales, before tables, and before scales in rows, read what has none.
    later = ("scaled", "rows", "divided")
    return json.dumps([{key: value for key, value in each.items() if key not in later or value} for each in entries])


def load_sites(text: str, where: str = "the list of sites") -> list[Site]:
    """What :func:`dump_sites` wrote.

    Args:
        where: What the text is, as the subject of a message.

    Raises:
        ExportError: It is something else; says which entry.
    """
    try:
        entries = read_json_text(text, where=where)
    except ValueError as error:
        raise ExportError(f"{error}; export the model again") from error
    if not isinstance(entries, list) or len(entries) > _MOST:
        raise ExportError(f"{where} is no list of at most {_MOST} sites; export the model again")
    return [_site(entry, f"{where}, entry {at}") for at, entry in enumerate(entries)]


def check_sites(sites: Sequence[Site], nodes: Mapping[str, tuple[str, Sequence[str]]], where: str) -> None:
    """Nothing, if the nodes that sites name are what they say; a node that is not there is for the reader to tell.

    Args:
        nodes: Operator and outputs, by the node's name.
        where: What the sites are of, as the subject of a message.

    Raises:
        ExportError: A name is that of another operator, or stands for two sites.
    """
    taken: set[str] = set()
    for site in sites:
        gives = site.dequantize if site.rows is None else site.rows
        for name, wanted in (
            (site.quantize, "QuantizeLinear"),
            (site.dequantize, "DequantizeLinear"),
            (site.rows, "Mul"),
        ):
            if name is None:
                continue
            if name in taken:
                raise ExportError(f"{where} has the node {quoted(name)} in two sites; export the model again")
            taken.add(name)
            operator, outputs = nodes.get(name, (wanted, (site.value,)))
            if operator != wanted:
                raise ExportError(
                    f"{where} has the node {quoted(name)} as a {wanted}, and it is {quoted(operator)}; export the "
                    "model again"
                )
            if name == gives and site.value not in outputs:
                raise ExportError(
                    f"{where} has {quoted(site.value)} as what the node {quoted(name)} makes, and it makes something "
                    "else; export the model again"
                )


def own_entries(properties: Iterable[tuple[str, str]], where: str) -> dict[str, str]:
    """The entries of a file's metadata that ``export_onnx`` wrote, without their prefix.

    Raises:
        ExportError: One stands twice.
    """
    found: dict[str, str] = {}
    for key, value in properties:
        name = key.removeprefix(METADATA)
        if name == key:
            continue
        if name in found:
            raise ExportError(f"{where} has {quoted(key)} twice in its metadata; export the model again")
        found[name] = value
    return found


def read_config(text: str, where: str) -> dict[str, Any]:
    """The config of the model.

    Args:
        where: What the text is of, as the subject of a message.

    Raises:
        ExportError: It is none.
    """
    try:
        config = read_json_text(text, where="it")
        _check_config(config)
    except ValueError as error:
        raise ExportError(f"{where} holds no config that can be read: {error}; export the model again") from error
    return dict(config)


def _check_config(config: Any) -> None:
    if not isinstance(config, dict):
        raise ValueError("it is no object")
    for name in _NUMBERS:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST):
            raise ValueError(f"'{name}' is {quoted(value)}")
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"'model_type' is {quoted(kind)}")


def _site(entry: Any, where: str) -> Site:
    if not isinstance(entry, dict):
        raise ExportError(f"{where} is {quoted(entry)}, no site; export the model again")
    wrong = sorted((_REQUIRED - entry.keys()) | (entry.keys() - _FIELDS.keys()))
    if wrong:
        raise ExportError(f"{where} lacks {quoted(wrong[0])}, or should not have it; export the model again")
    for key, value in entry.items():
        if not _FIELDS[key](value):
            raise ExportError(f"{where} has {quoted(value)} as '{key}'; export the model again")
    return Site(**entry)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable()


def _is_factor(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


#: Sites of a file, quantizers of a site, and characters of a name.
_MOST, _LONGEST = 100_000, 1_000
#: What each field of a site may be.
_FIELDS: dict[str, Callable[[Any], bool]] = {
    "quantizers": lambda value: isinstance(value, list) and 0 < len(value) <= _LONGEST and all(map(_is_name, value)),
    "role": lambda value: value in ("input", "weight"),
    "quantize": lambda value: value is None or _is_name(value),
    "dequantize": _is_name,
    "value": _is_name,
    "factor": _is_factor,
    "transposed": lambda value: isinstance(value, bool),
    "scaled": lambda value: isinstance(value, bool),
    "rows": lambda value: value is None or _is_name(value),
    "divided": lambda value: value is None or _is_name(value),
}
_REQUIRED = _FIELDS.keys() - {"factor", "transposed", "scaled", "rows", "divided"}
