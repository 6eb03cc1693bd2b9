"""A file opened on a runtime: names and shapes of what goes in, arrays in, arrays out."""

from __future__ import annotations

import importlib.util
import re
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from qdq_surgery.errors import ExportError, ModelError
from qdq_surgery.onnx_file.reader import inspect_file, open_proto
from qdq_surgery.safety.untrusted import quoted
from qdq_surgery.text.optional_imports import require

__all__ = ["PRECISIONS", "RUNTIMES", "Engine", "Port", "open_engine"]

#: What OpenVINO can compute what is not INT8 in.
PRECISIONS = ("f32", "bf16")

_ONNX_TYPES = {
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
}

#: Where the runtimes' messages name an operator they lack, and the node.
_LACKING = (
    re.compile(
        r'In Node, \("(?P<node>[^"]*)", (?P<op>[^,]+), "(?P<domain>[^"]*)", -?\d+\).*No Op registered', re.DOTALL
    ),
    re.compile(r"Fatal error: (?P<domain>[\w.]*):(?P<op>\w+)\(-?\d+\) is not a registered function/op"),
    re.compile(r"Could not find an implementation for (?P<op>\w+)\(\d+\) node with name '(?P<node>[^']*)'"),
    re.compile(r"No conversion rule found for operations: (?:(?P<domain>[\w.]+)\.)?(?P<op>\w+)"),
)


@dataclass(frozen=True)
class Port:
    """An input or an output of the file.

    Attributes:
        shape: ``None`` for an axis that is open.
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]


class Engine(ABC):
    """A file on a runtime. Calls from several threads at once are fine.

    Attributes:
        runtime: The runtime's name.
        version: Its version.
        threads: How many it computes with.
        precision: What it computes in where the file does not ask for integers; ``None`` if in what the file says.
        metadata: The file's own.
        inputs: What the file takes.
        outputs: What it gives.
    """

    runtime: ClassVar[str]

    def __init__(self, path: Path, threads: int) -> None:
        self.path, self.threads = path, threads
        self.version = ""
        self.precision: str | None = None
        self.metadata: dict[str, str] = {}
        self.inputs: tuple[Port, ...] = ()
        self.outputs: tuple[Port, ...] = ()

    @abstractmethod
    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """The outputs by name, in arrays of their own.

        Args:
            feed: One array for each input, of its type.

        Raises:
            ModelError: The runtime cannot; says what it says.
        """

    def _refused(self, error: Exception) -> ModelError:
        return ModelError(f"{self.path} failed on {self.runtime} {self.version}: {_reason(error)}")


class OnnxRuntimeEngine(Engine):
    """ONNX Runtime on the CPU, with all its optimizations."""

    runtime = "onnxruntime"

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(path, threads)
        runtime = require("onnxruntime", "running on ONNX Runtime")
        self.version = str(runtime.__version__)
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4  # errors come as exceptions, too
        try:
            self.session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its exceptions share no base
            raise _unopened(self, error) from error
        try:
            self.metadata = dict(self.session.get_modelmeta().custom_metadata_map)
        except UnicodeDecodeError as error:
            raise _unopened(self, error) from error
        self.inputs = tuple(_onnx_port(path, each) for each in self.session.get_inputs())
        self.outputs = tuple(_onnx_port(path, each) for each in self.session.get_outputs())

    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See the base."""
        try:
            found = self.session.run(None, dict(feed))
        except Exception as error:
            raise self._refused(error) from error
        return {each.name: array for each, array in zip(self.outputs, found, strict=True)}


class OpenVinoEngine(Engine):
    """OpenVINO on the CPU, set for latency."""

    runtime = "openvino"

    def __init__(self, path: Path, threads: int, precision: str | None) -> None:
        super().__init__(path, threads)
        self._openvino = require("openvino", "running on OpenVINO")
        self.version = str(self._openvino.__version__).split("-")[0]
        self._core = self._openvino.Core()
        self._options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        if precision is not None:
            able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            if precision == "bf16" and "BF16" not in able:
                raise ModelError(
                    "precision 'bf16' needs a CPU with bfloat16 instructions, which this one lacks; use 'f32'"
                )
            self._options["INFERENCE_PRECISION_HINT"] = precision
        self._lock = threading.Lock()
        try:
            model = self._core.read_model(str(path))
            self._compiled = self._core.compile_model(model, "CPU", self._options)
        except RuntimeError as error:
            raise _unopened(self, error) from error
        if model.has_rt_info(["framework"]):  # where it keeps the metadata of an ONNX file
            self.metadata = {str(name): str(value) for name, value in model.get_rt_info(["framework"]).value.items()}
        self.precision = {"float32": "f32", "bfloat16": "bf16"}.get(
            name := self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string(), name
        )
        self.threads = int(self._compiled.get_property("INFERENCE_NUM_THREADS"))  # no more than there are cores
        try:
            self.inputs = tuple(map(_openvino_port, self._compiled.inputs))
            self.outputs = tuple(map(_openvino_port, self._compiled.outputs))
        except (RuntimeError, TypeError) as error:  # a port without a name, or of a type that NumPy lacks
            raise _unopened(self, error) from error

    @property
    def compiled(self) -> Any:
        """The ``openvino.CompiledModel``."""
        with self._lock:
            if self._compiled is None:
                _inspect(self.path, self.runtime)  # it may be another one by now
                self._compiled = self._core.compile_model(str(self.path), "CPU", self._options)
            return self._compiled

    def run(self, feed: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """See the base."""
        compiled = self.compiled
        # A request of its own for each call: it costs some ten microseconds, and a request that failed keeps the
        # outputs of the call before. With one thread, infer() gives those and says nothing; wait() raises.
        request = compiled.create_infer_request()
        try:
            request.start_async(dict(feed))
            request.wait()
        except RuntimeError as error:
            # What has failed once over a shape fails ever after, whatever it is given.
            with self._lock:
                if self._compiled is compiled:
                    self._compiled = None
            raise self._refused(error) from error
        found = zip(self.outputs, request.output_tensors, strict=True)
        return {each.name: np.array(tensor.data) for each, tensor in found}


RUNTIMES = (OnnxRuntimeEngine.runtime, OpenVinoEngine.runtime)


def open_engine(path: Path, runtime: str, threads: int | None, precision: str | None) -> Engine:
    """Open a file.

    Args:
        path: An ONNX file.
        runtime: One of :data:`RUNTIMES`.
        threads: To compute with; as many as PyTorch does if ``None``.
        precision: For OpenVINO, one of :data:`PRECISIONS`; its own choice if ``None``.

    Raises:
        ModelError: No such file or runtime, one that is not installed, or that cannot run the file.
    """
    if runtime not in RUNTIMES:
        raise ModelError(
            f"there is no runtime '{runtime}'; use {' or '.join(map(repr, RUNTIMES))} (TensorRT builds an engine from "
            "the file, and runs that)"
        )
    if precision is not None and runtime != OpenVinoEngine.runtime:
        raise ModelError(f"precision is for openvino; {runtime} computes in what the file says, so leave it out")
    if precision is not None and precision not in PRECISIONS:
        raise ModelError(f"there is no precision '{precision}'; use {' or '.join(map(repr, PRECISIONS))}")
    if threads is not None and threads < 1:
        raise ModelError(f"threads is {threads}; give 1 or more, or None for as many as PyTorch uses")
    if not path.is_file():
        shown = quoted(path) if "\0" in str(path) else path
        raise ModelError(f"{shown} is no file; give one that qdq_surgery.export_onnx wrote")
    _inspect(path, runtime)
    # PyTorch's number heeds OMP_NUM_THREADS and the cores that the process may use; the runtimes' own do not always.
    count = torch.get_num_threads() if threads is None else threads
    if runtime == OpenVinoEngine.runtime:
        return OpenVinoEngine(path, count, precision)
    return OnnxRuntimeEngine(path, count)


def _inspect(path: Path, runtime: str) -> None:
    """Whether a runtime may be given a file."""
    version = str(require(runtime, f"running on {runtime}").__version__).split("-")[0]
    try:
        inspect_file(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        raise ModelError(f"{path} cannot be opened by {runtime} {version}: {reason or error}") from error


def _onnx_port(path: Path, found: Any) -> Port:
    if found.type not in _ONNX_TYPES:
        raise ModelError(f"{path} has '{found.name}' of type {found.type}, which no file of qdq_surgery has")
    shape = tuple(size if isinstance(size, int) else None for size in found.shape)
    return Port(found.name, np.dtype(_ONNX_TYPES[found.type]), shape)


def _openvino_port(found: Any) -> Port:
    rank = found.get_partial_shape().rank
    sizes = found.get_partial_shape() if rank.is_static else ()
    shape = tuple(None if size.is_dynamic else size.get_length() for size in sizes)
    return Port(found.get_any_name(), np.dtype(found.get_element_type().to_dtype()), shape)


def _unopened(engine: Engine, error: Exception) -> ModelError:
    """Why a file could not be opened, with the node if it is an operator that the runtime lacks."""
    place = f"{engine.path} cannot be opened by {engine.runtime} {engine.version}"
    found = next((match for pattern in _LACKING if (match := pattern.search(str(error)))), None)
    if found is None:
        hint = "; a file of weights beside it is missing or damaged" if "external" in str(error).lower() else ""
        return ModelError(f"{place}: {_reason(error)}{hint}")
    parts = found.groupdict()
    op, domain = parts["op"], parts.get("domain") or ""
    node = parts.get("node") or _node_of(engine.path, op, domain)
    operator = f"{f'{domain}:' if domain else ''}{op}{f' of node {node!r}' if node else ''}"
    return ModelError(
        f"{place}, which lacks the operator {operator}; use a newer version, or export for a runtime that has it"
    )


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


def _reason(error: Exception) -> str:
    """What a runtime says went wrong, without the places in its sources."""
    lines = [line.strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line and not re.match(r"(Exception from|Check '.*' failed at) \S+:\d+:$", line)]
    text = " ".join(lines).removeprefix("Caught exception: ")
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    text = re.sub(r"(Check '[^']*' failed )?at \S+:\d+: ?", "", text)
    return text[:500] or type(error).__name__
