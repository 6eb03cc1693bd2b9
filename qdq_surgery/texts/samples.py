"""Samples for calibration from a file or a datasets folder: texts, pairs of texts, tokens or token ids."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qdq_surgery.errors import CalibrationError
from qdq_surgery.text.optional_imports import require
from qdq_surgery.texts.input_file import printable, read_lines, read_text

__all__ = ["Sample", "read_samples"]

#: Columns that are taken if nobody names one, the first that is there.
_COLUMNS = ("text", "sentence")
#: What tokenized rows may hold; all but the first may be left out.
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_TOKENS = "tokens"

_TABLES = {".csv": ",", ".tsv": "\t"}
_ROWS = (".jsonl", ".ndjson")

#: Headers of tables that are met most, in a file that is called a text.
_HEADERS = frozenset("text sentence sentence1 sentence2 question premise hypothesis label labels id idx index".split())
#: Lines that are looked at to tell a format.
_LOOKED_AT = 50


@dataclass(frozen=True)
class Sample:
    """One row of data; one of the three is there.

    Attributes:
        place: ``FILE:LINE``.
        texts: A text, or a pair of them.
        tokens: A text that is split into tokens of the model's vocabulary.
        inputs: Token ids by the names of the model's arguments, ``input_ids`` at least.
    """

    place: str
    texts: tuple[str, ...] = ()
    tokens: tuple[str, ...] = ()
    inputs: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """In words."""
        if self.inputs:
            return " and ".join(f"'{name}'" for name in self.inputs)
        return "'tokens'" if self.tokens else "a text" if len(self.texts) == 1 else "a pair of texts"

    @property
    def words(self) -> str:
        """What it says, for a message."""
        return printable(" | ".join(self.texts) or " ".join(self.tokens) or str(list(self.inputs.get("input_ids", ()))))


def read_samples(path: str | Path, columns: Sequence[str] = ()) -> list[Sample]:
    """The rows of a file, or of a folder that ``Dataset.save_to_disk`` of datasets wrote.

    ``.jsonl``, ``.csv``, ``.tsv`` and datasets have columns; in any other file each line is a text.

    Args:
        columns: One, or two for pairs of texts. Left out: ``text`` or ``sentence``, and of ``.jsonl`` and datasets also
            ``input_ids`` (with ``attention_mask`` and ``token_type_ids``) or ``tokens``.

    Raises:
        CalibrationError: The file or a row cannot be used, says which and why.
        ModelError: It is a folder, and datasets is not installed.
    """
    if len(columns) > 2:
        raise CalibrationError(f"{len(columns)} columns are named; name one, or two for pairs of texts")
    suffix = Path(path).suffix.lower()
    if Path(path).is_dir():
        found = list(_dataset(path, columns))
    elif suffix in _ROWS:
        found = list(_json_rows(path, columns))
    elif suffix in _TABLES:
        found = list(_table(path, _TABLES[suffix], columns))
    else:
        found = list(_plain(path, suffix, columns))
    if not found:
        raise CalibrationError(f"{path} has no text; write one in each line")
    odd = next((sample for sample in found if sample.kind != found[0].kind), None)
    if odd is not None:
        raise CalibrationError(
            f"{odd.place} has {odd.kind}, but {found[0].place} has {found[0].kind}; keep to one kind"
        )
    return found


def _plain(path: str | Path, suffix: str, columns: Sequence[str]) -> Iterator[Sample]:
    if suffix == ".json":
        raise CalibrationError(f"{path} is one JSON document by its name; write a row in each line and call it .jsonl")
    lines = read_lines(path)
    looks = _looks_like([line for _, line in lines[:_LOOKED_AT]])
    if looks is not None:
        raise CalibrationError(f"{path} looks like {looks}, and each of its lines would be a text; name it so")
    if columns:
        raise CalibrationError(f"{path} has no columns, as it is no .jsonl, .csv or .tsv; leave --column out")
    for number, line in lines:
        yield Sample(f"{path}:{number}", texts=(line,))


def _looks_like(lines: Sequence[str]) -> str | None:
    """What lines that pass for plain text really are."""
    if lines and all(_is_row(line) for line in lines):
        return "rows of JSON (.jsonl)"
    if lines and lines[0] in ("[", "{"):
        return "a JSON document (write a row in each line, .jsonl)"
    if max(map(len, lines), default=0) > csv.field_size_limit():  # no table either, says the one that reads them
        return None
    for suffix, separator in _TABLES.items():
        counts = {len(row) for row in csv.reader(lines, delimiter=separator)}
        header = [name.strip().strip('"').lower() for name in lines[0].split(separator)] if lines else []
        named = all(re.fullmatch(r"\w+", name) for name in header) and not _HEADERS.isdisjoint(header)
        if len(header) > 1 and len(counts) == 1 and (named or (separator == "\t" and len(lines) > 1)):
            return f"a table with {len(header)} columns ({suffix})"
    return None


def _is_row(line: str) -> bool:
    try:
        return isinstance(json.loads(line), (dict, list)) if line[0] in "{[" else False
    except (ValueError, RecursionError):
        return False


def _json_rows(path: str | Path, columns: Sequence[str]) -> Iterator[Sample]:
    for number, line in read_lines(path):
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{place} is no JSON: {getattr(error, 'msg', 'nested too deep')}") from None
        if not isinstance(row, dict):
            raise CalibrationError(f'{place} is no JSON object such as {{"text": ...}}, but {printable(line)}')
        yield from _sample(place, row, columns)


def _sample(place: str, row: Mapping[str, Any], columns: Sequence[str]) -> Iterator[Sample]:
    if not columns and "input_ids" in row:
        yield Sample(place, inputs=_token_ids(place, row))
    elif not columns and _TOKENS in row:
        yield Sample(place, tokens=_tokens(place, row[_TOKENS]))
    else:
        names = _chosen(place, list(row), columns)
        texts = _texts(place, {name: row[name] for name in names})
        if texts:
            yield Sample(place, texts=texts)


def _dataset(path: str | Path, columns: Sequence[str]) -> Iterator[Sample]:
    datasets = require("datasets", f"the folder {path}", "datasets")
    try:
        found = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever pyarrow and datasets make of files that are damaged
        said = " ".join(str(error).split())[:200]
        raise CalibrationError(
            f"{path} is a folder that datasets cannot load ({printable(said)}); give one that Dataset.save_to_disk "
            "wrote, or a file"
        ) from None
    if not isinstance(found, datasets.Dataset):
        raise CalibrationError(f"{path} has several parts: {', '.join(map(printable, found))}; give the folder of one")
    known = {*(columns or (*_COLUMNS, *_INPUTS, _TOKENS))}
    if not known.isdisjoint(found.column_names):  # what else there is, such as sounds, is not decoded
        found = found.select_columns([name for name in found.column_names if name in known])
    for number, row in enumerate(found.with_format(None)):
        yield from _sample(f"{path}[{number}]", row, columns)


def _table(path: str | Path, separator: str, columns: Sequence[str]) -> Iterator[Sample]:
    # Quotes in tab-separated files are mostly just quotes.
    file = io.StringIO(read_text(path))
    reader = (
        csv.reader(file, delimiter=separator, strict=True)
        if separator == ","
        else csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE)
    )
    header: list[str] | None = None
    names: tuple[str, ...] = ()
    started = 1
    try:
        for row in reader:
            place, started = f"{path}:{started}", reader.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header is None:
                header = [name.strip() for name in row]
                names = _chosen(place, header, columns)
                continue
            if len(row) != len(header):
                raise CalibrationError(f"{place} has {len(row)} columns, but the header has {len(header)}")
            texts = _texts(place, {name: row[header.index(name)] for name in names})
            if texts:
                yield Sample(place, texts=texts)
    except csv.Error as error:
        raise CalibrationError(f"{path}:{reader.line_num} cannot be read as a table: {error}") from None


def _chosen(place: str, header: Sequence[str], columns: Sequence[str]) -> tuple[str, ...]:
    """The columns to take, which are there, each once."""
    names = tuple(columns) or tuple(name for name in _COLUMNS if name in header)[:1]
    listed = ", ".join(printable(name) for name in header[:20])
    if not names:
        raise CalibrationError(
            f"{place}: no column is called {' or '.join(_COLUMNS)}; say which has the texts: --column NAME, twice for "
            f"pairs; its columns are {listed}"
        )
    for name in names:
        if header.count(name) != 1:
            what = "no column" if name not in header else f"{header.count(name)} columns"
            raise CalibrationError(f"{place}: {what} called {printable(name)}; its columns are {listed}")
    return names


def _texts(place: str, cells: Mapping[str, Any]) -> tuple[str, ...]:
    """The text or the pair; nothing if all are empty, as lines of a text may be, too."""
    for name, value in cells.items():
        if not isinstance(value, str):
            raise CalibrationError(f"{place}: {printable(name)} is no text, but {printable(json.dumps(value))}")
        if "\0" in value:
            raise CalibrationError(f"{place}: {printable(name)} holds a NUL character, which no text has")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise CalibrationError(f"{place}: {printable(name)} holds half a character (a lone surrogate)") from None
    texts = tuple(value.strip() for value in cells.values())
    if any(texts) and not all(texts):
        empty = next(name for name, value in cells.items() if not value.strip())
        raise CalibrationError(f"{place}: {printable(empty)} is empty, so there is no pair")
    return texts if any(texts) else ()


def _tokens(place: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(token, str) and token for token in value):
        raise CalibrationError(f"{place}: 'tokens' is no list of texts, but {printable(json.dumps(value))}")
    return tuple(value)


def _token_ids(place: str, row: Mapping[str, Any]) -> dict[str, list[int]]:
    """The row's lists of numbers, all of one length, without the padding at their ends."""
    found: dict[str, list[int]] = {}
    for name in _INPUTS:
        value = row.get(name)
        if value is None and name != "input_ids":
            continue
        if not isinstance(value, list) or not value or not all(type(v) is int and v >= 0 for v in value):
            raise CalibrationError(
                f"{place}: '{name}' is no list of whole numbers from 0, but {printable(json.dumps(value))}"
            )
        found[name] = value
    lengths = {name: len(value) for name, value in found.items()}
    if len(set(lengths.values())) > 1:
        counted = ", ".join(f"{length} of '{name}'" for name, length in lengths.items())
        raise CalibrationError(f"{place}: the lists differ in length: {counted}")
    mask = found.get("attention_mask", [1])
    if not set(mask) <= {0, 1} or 1 not in mask:
        raise CalibrationError(f"{place}: 'attention_mask' is to be 1 for tokens and 0 for padding, and not all 0")
    end = max(index for index, value in enumerate(mask, 1) if value) if "attention_mask" in found else None
    return {name: value[:end] for name, value in found.items()}
