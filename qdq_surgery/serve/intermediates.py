"""Running a file, with a look at values inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray

from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_file.opened import OnnxFile
from qdq_surgery.onnx_file.reader import check_file
from qdq_surgery.targets.registry import session_on
from qdq_surgery.targets.session import Arrays

__all__ = ["Runtime", "probe", "runtimes"]


@dataclass(frozen=True)
class Runtime:
    """A runtime in one of its modes.

    Attributes:
        name: Of a target that opens files.
        optimized: Whether it may rewrite the graph.
    """

    name: str
    optimized: bool

    @property
    def words(self) -> str:
        """For tables."""
        return self.name if self.optimized else f"{self.name}, optimisations off"

    @property
    def version(self) -> str:
        """Of the package."""
        return session_on(self.name).installed("checking a file")


def runtimes(name: str) -> tuple[Runtime, ...]:
    """The modes of a runtime, first the one that rewrites least."""
    return tuple(Runtime(name, optimized) for optimized in session_on(name).modes)


def probe(file: OnnxFile, inputs: Mapping[str, NDArray[Any]], values: Sequence[str], runtime: Runtime) -> Arrays:
    """The file's outputs, and ``values`` inside it, by name.

    Args:
        inputs: By name; those that the file does not take are left out.
        values: Names of values. That they are asked for keeps a runtime from fusing them away.

    Raises:
        ExportError: The file is none that can be opened, the runtime cannot run it, and says why, or an input is
            missing.
    """
    check_file(file.path)  # once more: it may be another one by now
    session = session_on(runtime.name)
    try:
        return session.probe(file, inputs, values, runtime.optimized)
    except ExportError:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        raise ExportError(f"{runtime.words} cannot run {file.path.name}: {session.reason(error)}") from error
