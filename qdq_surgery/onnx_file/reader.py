"""The one way in which an ONNX file is opened: looked through before any parser or runtime sees it.

An ONNX file is data from a stranger. It may be a FIFO that nobody writes to, bytes that a parser makes gigabytes of,
or a graph whose weights lie in ``/etc/passwd``. ONNX Runtime and OpenVINO take a location with ``_ORT_MEM_ADDR_`` for
an address in memory; OpenVINO crashes on it. A runtime chooses its parser by the ending of the name, so there is one
ending.
"""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import TYPE_CHECKING, Any

from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_file.graph_checks import check_structure
from qdq_surgery.onnx_file.wire_format import Field, Walk
from qdq_surgery.safety.given_path import given_path
from qdq_surgery.safety.untrusted import open_regular_file, quoted, read_regular_file
from qdq_surgery.text.optional_imports import require

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["ENDING", "check_file", "inspect_file", "open_graph", "open_proto"]

ENDING = ".onnx"

#: Protobuf's own limit.
_LARGEST_FILE = 2**31
#: Bytes that are no numbers of a tensor: a parser makes up to fifty of one.
_LARGEST_STRUCTURE = 2**26
_MOST_FIELDS, _DEEPEST = 2_000_000, 32
_LONGEST_TEXT = 2**12

#: Which fields of a message hold messages that can hold a tensor; :mod:`onnx` has them by name, and a test compares.
MESSAGES: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
    "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
    "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
    "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
    "NodeProto": {5: "AttributeProto"},
    "AttributeProto": {
        5: "TensorProto",
        6: "GraphProto",
        10: "TensorProto",
        11: "GraphProto",
        22: "SparseTensorProto",
        23: "SparseTensorProto",
    },
    "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
    "TensorProto": {},
}
#: All fields of ModelProto: a file with another one is no ONNX file, or of a version that is not known here.
_MODEL_FIELDS = frozenset((1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26))
_GRAPH, _METADATA = 7, 14
_LONGEST_ENTRY = 2**25
#: Of TensorProto.
_DIMS, _TYPE, _FLOATS, _NAME, _RAW, _DOUBLES, _EXTERNAL = 1, 2, 4, 8, 9, 10, 13
#: Bits of an element, by ONNX's number of the type.
_BITS = {
    **dict.fromkeys((1, 6, 12), 32),
    **dict.fromkeys((2, 3, 9, 17, 18, 19, 20, 24), 8),
    **dict.fromkeys((4, 5, 10, 16), 16),
    **dict.fromkeys((7, 11, 13, 14), 64),
    15: 128,
    **dict.fromkeys((21, 22, 23), 4),
    **dict.fromkeys((25, 26), 2),
}
_ENTRIES = ("location", "offset", "length", "checksum")
_MEMORY = "_ORT_MEM_ADDR_"


def check_file(path: str | Path) -> Path:
    """``path``, if an ONNX file is there that can be handed to a runtime.

    Raises:
        ExportError: There is none, it is no regular file or no ONNX file, or its weights lie where they must not; says
            which.
    """
    given_path(path, "an ONNX file")
    try:
        inspect_file(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ExportError(f"there is no file {path}") from error
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        shown = quoted(path) if "\0" in str(path) else path
        raise ExportError(f"{shown} is no ONNX file that can be opened: {error}") from error
    return Path(path)


def inspect_file(path: str | Path) -> None:
    """Nothing, if an ONNX file is there that can be handed to a runtime.

    Raises:
        OSError: It cannot be read.
        ValueError: What is wrong with it, as the reason in a message.
    """
    with open_regular_file(path) as file:
        if Path(path).suffix != ENDING:
            raise ValueError(f"its name does not end in {ENDING}")
        size = os.fstat(file.fileno()).st_size
        if size > _LARGEST_FILE:
            raise ValueError(f"it has {size} bytes, more than ONNX allows in one file")
        _Inspection(Walk(file, _MOST_FIELDS), Path(path)).model(size)


def open_proto(path: str | Path) -> Any:
    """The ``onnx.ModelProto`` of a checked file, without the weights that are stored beside it.

    Raises:
        ExportError: See :func:`check_file`; or the graph is not in order.
    """
    onnx = require("onnx", "looking at an ONNX file")
    file = check_file(path)
    try:
        model = onnx.load_model_from_string(read_regular_file(file, _LARGEST_FILE))
        check_structure(model)
    except OSError as error:
        raise ExportError(f"{path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # protobuf has its own
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{path} is no ONNX file that can be opened: {what}") from error
    return model


def open_graph(path: str | Path) -> ir.Model:
    """The same as onnx_ir has it; weights beside the file are read when they are asked for."""
    onnx_ir = require("onnx_ir", "looking at an ONNX file")
    proto = open_proto(path)
    try:
        model: ir.Model = onnx_ir.from_proto(proto)
    except Exception as error:  # whatever it makes of a graph that cannot be
        what = (str(error).splitlines() or [type(error).__name__])[0]
        raise ExportError(f"{path} is no ONNX file that can be opened: {what}") from error
    onnx_ir.external_data.set_base_dir(model.graph, Path(path).parent)
    return model


@dataclass
class _Tensor:
    """What a tensor says of itself."""

    name: str = ""
    dims: list[int] = field(default_factory=list)
    kind: int = 0
    raw: int | None = None
    entries: dict[str, str] = field(default_factory=dict)

    def stored(self) -> int | None:
        """Bytes of its numbers; ``None`` if they have no such form."""
        if self.kind not in _BITS or any(axis >= 2**63 for axis in self.dims):
            return None
        return -(-math.prod(self.dims) * _BITS[self.kind] // 8)


class _Inspection:
    def __init__(self, walk: Walk, path: Path) -> None:
        self._walk = walk
        self._structure = 0
        # A link may stand for the file, as in the cache of Hugging Face's hub; the weights then lie beside either.
        self._folder = path.parent
        self._inside = (path.parent.resolve(), path.resolve().parent)
        self._seen: dict[str, int] = {}

    def model(self, size: int) -> None:
        graphs = 0
        self._structure += size
        for each in self._walk.fields(0, size):
            if each.number not in _MODEL_FIELDS:
                raise ValueError(f"a model has no field {each.number} (byte {each.start})")
            graphs += each.number == _GRAPH and each.nested
            if each.number == _METADATA and each.nested:
                for text in self._walk.fields(each.start, each.end):
                    self._walk.text(text, _LONGEST_ENTRY)  # a runtime hands it out as it is
            self._child("ModelProto", each, 1)
        if graphs != 1:
            raise ValueError(f"it holds {graphs} graphs")
        if self._structure > _LARGEST_STRUCTURE:
            raise ValueError(f"it has {self._structure} bytes beside its weights, more than {_LARGEST_STRUCTURE}")

    def _child(self, kind: str, each: Field, depth: int) -> None:
        inner = MESSAGES[kind].get(each.number)
        if inner is None or not each.nested:
            return
        if depth > _DEEPEST * 3:  # a graph in an attribute of a node of a graph
            raise ValueError(f"its graphs are nested deeper than {_DEEPEST} levels")
        if inner == "TensorProto":
            self._tensor(each)
            return
        for further in self._walk.fields(each.start, each.end):
            self._child(inner, further, depth + 1)

    def _tensor(self, message: Field) -> None:
        made = _Tensor()
        for each in self._walk.fields(message.start, message.end):
            if each.number in (_RAW, _FLOATS, _DOUBLES) and each.nested:
                self._structure -= each.end - each.start
                made.raw = each.end - each.start if each.number == _RAW else made.raw
            elif each.number == _TYPE:
                made.kind = each.value
            elif each.number == _NAME and each.nested:
                made.name = self._walk.text(each, _LONGEST_TEXT)
            elif each.number == _EXTERNAL and each.nested:
                self._entry(made, each)
            elif each.number == _DIMS:
                made.dims.extend(self._walk.packed(each) if each.nested else [each.value])
        if made.raw is not None and not made.entries and made.raw != made.stored():
            raise ValueError(
                f"the weights {quoted(made.name)} have {made.raw} bytes, which are not those of their shape and type"
            )
        if made.entries:
            try:
                self._external(made)
            except ValueError as error:
                raise ValueError(f"the weights {quoted(made.name)} lie in a file beside it, and {error}") from None

    def _entry(self, made: _Tensor, message: Field) -> None:
        found = {1: "", 2: ""}
        for each in self._walk.fields(message.start, message.end):
            if each.number in found and each.nested:
                found[each.number] = self._walk.text(each, _LONGEST_TEXT)
        if found[1] not in _ENTRIES or found[1] in made.entries:
            raise ValueError(f"the weights {quoted(made.name)} say {quoted(found[1])} twice, or should not say it")
        made.entries[found[1]] = found[2]

    def _external(self, made: _Tensor) -> None:
        size = self._size_of(made.entries.get("location", ""))
        offset, length = (_number(made.entries.get(key, "0"), key) for key in ("offset", "length"))
        stored = made.stored()
        if stored is None:
            raise ValueError("an axis is negative, or they are of a type that cannot lie there")
        if offset + max(length, stored) > size:
            raise ValueError(
                f"they need bytes {offset} to {offset + max(length, stored)} of its {size}; a file of weights beside "
                "it is missing or damaged"
            )

    def _size_of(self, location: str) -> int:
        """Bytes of a file of weights; each is looked at once."""
        if location not in self._seen:
            self._seen[location] = self._look(location)
        return self._seen[location]

    def _look(self, location: str) -> int:
        shown = quoted(location)
        parts = location.split("/")
        if _MEMORY in location or "*" in parts:
            raise ValueError(f"its location {shown} stands for an address in memory")
        if not location or any(ord(each) < 32 for each in location):
            raise ValueError(f"its location {shown} is no path")
        windows = PureWindowsPath(location)
        if windows.drive or windows.root or "\\" in location:
            raise ValueError(f"its location {shown} is not relative to the folder of the file")
        place = self._folder / location
        try:
            real = place.resolve(strict=True)
            found = os.stat(real)
        except (OSError, RuntimeError):  # a loop of links
            if ".." in parts:
                raise ValueError(f"its location {shown} is not inside the folder of the file") from None
            raise ValueError(f"there is none at {shown}; a file of weights beside it is missing or damaged") from None
        if not any(real.is_relative_to(folder) for folder in self._inside):
            raise ValueError(f"its location {shown} is not inside the folder of the file")
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"at its location {shown} is no regular file")
        return found.st_size


def _number(text: str, what: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ValueError(f"its {what} {quoted(text)} is no number of bytes")
    return int(text)
