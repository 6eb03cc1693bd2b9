"""ONNX Runtime on the CPU: a file opened, run, probed, and optimized."""

from __future__ import annotations

import platform
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdq_surgery.errors import ExportError, ModelError
from qdq_surgery.onnx_file.opened import OnnxFile
from qdq_surgery.onnx_file.writer import DATA_SUFFIX
from qdq_surgery.safety.untrusted import quoted
from qdq_surgery.targets.session import Arrays, Port, Session, taken

__all__ = ["OnnxRuntimeSession", "on_x86"]

#: Constants above this many bytes are kept out of a graph that is written.
_LARGE = 1024
_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}


class OnnxRuntimeSession(Session):
    """ONNX Runtime on the CPU, with all its optimizations."""

    runtime = "onnxruntime"
    modes = (False, True)
    noise = re.compile(r"\A\s*\[ONNXRuntimeError\] : \d+ : \w+ : ")
    lacking = (
        re.compile(
            r'In Node, \("(?P<node>[^"]*)", (?P<op>[^,]+), "(?P<domain>[^"]*)", -?\d+\).*No Op registered', re.DOTALL
        ),
        re.compile(r"Fatal error: (?P<domain>[\w.]*):(?P<op>\w+)\(-?\d+\) is not a registered function/op"),
        re.compile(r"Could not find an implementation for (?P<op>\w+)\(\d+\) node with name '(?P<node>[^']*)'"),
    )

    def __init__(self, path: Path, threads: int | None = None, precision: str | None = None) -> None:
        super().__init__(path, threads, precision)
        try:
            self.session = self.open(path, threads=self.threads)
            self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        except Exception as error:  # its exceptions share no base
            raise self.unopened(path, error) from error
        self.inputs = tuple(_port(path, each) for each in self.session.get_inputs())
        self.outputs = tuple(_port(path, each) for each in self.session.get_outputs())

    def run(self, feed: Mapping[str, NDArray[Any]]) -> Arrays:
        """See the base."""
        try:
            found = self.session.run(None, dict(feed))
        except Exception as error:
            raise self.failed(error) from error
        return {each.name: array for each, array in zip(self.outputs, found, strict=True)}

    @classmethod
    def probe(
        cls, file: OnnxFile, inputs: Mapping[str, NDArray[Any]], values: Sequence[str], optimized: bool
    ) -> Arrays:
        """See the base."""
        with tempfile.TemporaryDirectory(prefix="qdq-surgery-") as folder:
            path = _with_outputs(file, values, Path(folder)) if values else file.path
            session = cls.open(path, optimized=optimized)
            names = [each.name for each in session.get_outputs()]
            feed = taken(file.path, [each.name for each in session.get_inputs()], inputs)
            return dict(zip(names, session.run(names, feed), strict=True))

    @classmethod
    def open(
        cls,
        model: Path | bytes,
        *,
        optimized: bool = True,
        threads: int | None = None,
        folder: Path | None = None,
        written: Path | None = None,
    ) -> Any:
        """An ``onnxruntime.InferenceSession``; raises any of ONNX Runtime's own exceptions.

        Args:
            model: A file, or a model in memory.
            optimized: Whether it may rewrite the graph.
            threads: To compute with; its own choice if ``None``.
            folder: Has the weights of a model in memory.
            written: Where the graph goes that it runs; large constants go beside it.
        """
        runtime = cls.package("running on ONNX Runtime")
        options, level = runtime.SessionOptions(), runtime.GraphOptimizationLevel
        options.log_severity_level = 4  # errors come as exceptions, too
        options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
        if threads is not None:
            options.intra_op_num_threads = threads
        if folder is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if written is not None:
            options.optimized_model_filepath = str(written)
            stored = "session.optimized_model_external_initializers"
            options.add_session_config_entry(f"{stored}_file_name", "optimized.data")
            options.add_session_config_entry(f"{stored}_min_size_in_bytes", str(_LARGE))
        source = model if isinstance(model, bytes) else str(model)
        return runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def on_x86() -> bool:
    """Whether this machine's kernels are those for x86."""
    return platform.machine().lower() in ("x86_64", "amd64", "i386", "i686", "x86")


def _port(path: Path, found: Any) -> Port:
    if found.type not in _TYPES:
        raise ModelError(f"{path} has '{found.name}' of type {found.type}, which no file of qdq_surgery has")
    shape = tuple(size if isinstance(size, int) else None for size in found.shape)
    return Port(found.name, np.dtype(_TYPES[found.type]), shape)


def _with_outputs(file: OnnxFile, values: Sequence[str], folder: Path) -> Path:
    """A copy of the file in ``folder`` with ``values`` among its outputs."""
    graph, path = file.model.graph, folder / file.path.name
    made = {value.name: value for node in graph for value in node.outputs}
    absent = [name for name in values if name not in made]
    if absent:
        raise ExportError(f"{path.name} has no value {quoted(absent[0])}, which it says that it has")
    graph.outputs.extend(made[name] for name in values)
    try:
        file.save(path, f"{path.name}{DATA_SUFFIX}")
    finally:
        for _ in values:
            graph.outputs.pop()
    return path
