"""A file opened on a runtime: names and shapes of what goes in, arrays in, arrays out, and errors in words."""

from __future__ import annotations

import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from qdq_surgery.errors import ExportError, ModelError
from qdq_surgery.onnx_file.opened import OnnxFile
from qdq_surgery.onnx_file.reader import inspect_file, open_proto
from qdq_surgery.safety.untrusted import quoted
from qdq_surgery.text.optional_imports import require

__all__ = ["Arrays", "Port", "Session", "taken"]

Arrays = dict[str, NDArray[Any]]

#: How much a message holds of what a runtime says, in characters.
_LONGEST = 500
#: Where in its own sources a runtime stopped.
_PLACE = re.compile(r"(Check '[^']*' failed )?at \S+:\d+: ?")


@dataclass(frozen=True)
class Port:
    """An input or an output of the file.

    Attributes:
        shape: ``None`` for an axis that is open.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long, or a folder that one may not look into
        return False


class Session(ABC):
    """A file on a runtime. Calls from several threads at once are fine.

    Attributes:
        runtime: The runtime's name, which is that of its package.
        extra: Which extra of this package has it.
        modes: In which a file can be probed: ``False`` runs the graph as it is written, ``True`` may rewrite it. What
            rewrites least comes first.
        precisions: What it can be asked to compute in where the file does not ask for integers.
        noise: What its messages hold that says nothing.
        lacking: Where its messages name an operator that it lacks: groups ``op``, ``domain`` and ``node``.
        version: Its version.
        threads: How many it computes with.
        precision: What it computes in where the file does not ask for integers; ``None`` if in what the file says.
        metadata: The file's own.
        inputs: What the file takes.
        outputs: What it gives.
    """

    runtime: ClassVar[str]
    extra: ClassVar[str] = "onnx"
    modes: ClassVar[tuple[bool, ...]] = (True,)
    precisions: ClassVar[tuple[str, ...]] = ()
    noise: ClassVar[re.Pattern[str]]
    lacking: ClassVar[tuple[re.Pattern[str], ...]] = ()

    def __init__(self, path: Path, threads: int | None = None, precision: str | None = None) -> None:
        """Open a file.

        Args:
            path: An ONNX file.
            threads: To compute with; as many as PyTorch does if ``None``.
            precision: One of :attr:`precisions`; the runtime's own choice if ``None``.

        Raises:
            ModelError: No such file, the runtime is not installed, or it cannot run the file.
        """
        if threads is not None and threads < 1:
            raise ModelError(f"threads is {threads}; give 1 or more, or None for as many as PyTorch uses")
        if not _is_file(path):
            shown = quoted(path) if "\0" in str(path) else path
            raise ModelError(f"{shown} is no file; give one that qdq_surgery.export_onnx wrote")
        self.path = path
        self.inspect()
        self.version = self.installed()
        # PyTorch's number heeds OMP_NUM_THREADS and the cores that the process may use; the runtimes' own do not.
        self.threads = torch.get_num_threads() if threads is None else threads
        self.precision = precision
        self.metadata: dict[str, str] = {}
        self.inputs: tuple[Port, ...] = ()
        self.outputs: tuple[Port, ...] = ()

    @abstractmethod
    def run(self, feed: Mapping[str, NDArray[Any]]) -> Arrays:
        """The outputs by name, in arrays of their own.

        Args:
            feed: One array for each input, of its type.

        Raises:
            ModelError: The runtime cannot; says what it says.
        """

    @classmethod
    @abstractmethod
    def probe(
        cls, file: OnnxFile, inputs: Mapping[str, NDArray[Any]], values: Sequence[str], optimized: bool
    ) -> Arrays:
        """The file's outputs, and ``values`` inside it, by name; see :func:`qdq_surgery.serve.intermediates.probe`.

        Args:
            optimized: One of :attr:`modes`.

        Raises:
            Exception: Any of the runtime's own.
        """

    @classmethod
    def package(cls, what: str) -> ModuleType:
        """The runtime's package, for ``what``.

        Raises:
            ModelError: It is not installed.
        """
        return require(cls.runtime, what, cls.extra)

    @classmethod
    def installed(cls, what: str = "") -> str:
        """The version of the runtime's package.

        Raises:
            ModelError: It is not installed.
        """
        # OpenVINO's goes on with the commit it was built from.
        return str(cls.package(what or f"running on {cls.runtime}").__version__).partition("-")[0]

    def inspect(self) -> None:
        """Whether the runtime may be given the file.

        Raises:
            ModelError: It may not.
        """
        version = self.installed()
        try:
            inspect_file(self.path)
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else None
            raise ModelError(f"{self.path} cannot be opened by {self.runtime} {version}: {reason or error}") from error

    @classmethod
    def reason(cls, error: Exception) -> str:
        """What the runtime says went wrong, in one line, without the places in its sources."""
        lines = (line.strip() for line in cls.noise.sub("", str(error)).splitlines())
        return _PLACE.sub("", " ".join(filter(None, lines)))[:_LONGEST] or type(error).__name__

    @classmethod
    def unopened(cls, path: Path, error: Exception) -> ModelError:
        """Why a file could not be opened, with the node if it is an operator that the runtime lacks."""
        place = f"{path} cannot be opened by {cls.runtime} {cls.installed()}"
        found = next((match for pattern in cls.lacking if (match := pattern.search(str(error)))), None)
        if found is None:
            hint = "; a file of weights beside it is missing or damaged" if "external" in str(error).lower() else ""
            return ModelError(f"{place}: {cls.reason(error)}{hint}")
        parts = found.groupdict()
        op, domain = parts["op"], parts.get("domain") or ""
        node = parts.get("node") or _node_of(path, op, domain)
        operator = f"{f'{domain}:' if domain else ''}{op}{f' of node {node!r}' if node else ''}"
        return ModelError(
            f"{place}, which lacks the operator {operator}; use a newer version, or export for a runtime that has it"
        )

    def failed(self, error: Exception) -> ModelError:
        """Why a call failed."""
        return ModelError(f"{self.path} failed on {self.runtime} {self.version}: {self.reason(error)}")


def taken(path: Path, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """What a file takes of ``inputs``.

    Raises:
        ExportError: One is missing.
    """
    absent = [name for name in names if name not in inputs]
    if absent:
        raise ExportError(f"{path.name} takes {', '.join(absent)}, which the inputs lack ({', '.join(inputs)})")
    return {name: inputs[name] for name in names}


def _node_of(path: Path, op: str, domain: str) -> str | None:
    """Name of the first node with an operator, for a message; needs onnx, which a runtime does not."""
    if importlib.util.find_spec("onnx") is None:
        return None
    try:
        nodes = open_proto(path).graph.node
    except ExportError:
        return None
    for node in nodes:
        if node.op_type == op and node.domain.removeprefix("ai.onnx") == domain:
            return str(node.name)
    return None
