"""OpenVINO on the CPU: a file opened, run and probed."""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdq_surgery.errors import ModelError
from qdq_surgery.onnx_file.opened import OnnxFile
from qdq_surgery.targets.session import Arrays, Port, Session, taken
from qdq_surgery.targets.target import full_precision

__all__ = ["OpenVinoSession"]

#: OpenVINO's words for what it computes in.
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16"}


class OpenVinoSession(Session):
    """OpenVINO on the CPU, set for latency."""

    runtime = "openvino"
    extra = "openvino"
    precisions = tuple(_PRECISIONS)
    noise = re.compile(
        r"^[ \t]*(?:Exception from|Check '.*' failed at) \S+:\d+:[ \t]*$|^\s*Caught exception: ", re.MULTILINE
    )
    lacking = (re.compile(r"No conversion rule found for operations: (?:(?P<domain>[\w.]+)\.)?(?P<op>\w+)"),)

    def __init__(self, path: Path, threads: int | None = None, precision: str | None = None) -> None:
        super().__init__(path, threads, precision)
        core = self.package("running on OpenVINO").Core()
        self._options: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": self.threads}
        if precision is not None:
            if precision == "bfloat16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
                raise ModelError(
                    f"precision '{precision}' needs a CPU with bfloat16 instructions, which this one lacks; use "
                    "'float32'"
                )
            self._options["INFERENCE_PRECISION_HINT"] = _PRECISIONS[precision]
        self._lock = threading.Lock()
        try:
            model = core.read_model(str(path))
            self._compiled = core.compile_model(model, "CPU", self._options)
        except RuntimeError as error:
            raise self.unopened(path, error) from error
        if model.has_rt_info(["framework"]):  # where it keeps the metadata of an ONNX file
            self.metadata = {str(name): str(value) for name, value in model.get_rt_info(["framework"]).value.items()}
        self.precision = full_precision(self._compiled.get_property("INFERENCE_PRECISION_HINT").to_string())
        self.threads = int(self._compiled.get_property("INFERENCE_NUM_THREADS"))  # no more than there are cores
        try:
            self.inputs = tuple(map(_port, self._compiled.inputs))
            self.outputs = tuple(map(_port, self._compiled.outputs))
        except (RuntimeError, TypeError) as error:  # a port without a name, or of a type that NumPy lacks
            raise self.unopened(path, error) from error

    @property
    def compiled(self) -> Any:
        """The ``openvino.CompiledModel``."""
        with self._lock:
            if self._compiled is None:
                self.inspect()  # it may be another file by now
                core = self.package("running on OpenVINO").Core()
                self._compiled = core.compile_model(str(self.path), "CPU", self._options)
            return self._compiled

    def run(self, feed: Mapping[str, NDArray[Any]]) -> Arrays:
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
            raise self.failed(error) from error
        found = zip(self.outputs, request.output_tensors, strict=True)
        return {each.name: np.array(tensor.data) for each, tensor in found}

    @classmethod
    def probe(cls, file: OnnxFile, inputs: Mapping[str, NDArray[Any]], values: Sequence[str], _: bool) -> Arrays:
        """See the base."""
        core = cls.package("checking a file on OpenVINO").Core()
        model = core.read_model(file.path)
        if values:
            model.add_outputs(list(values))
        # By itself it computes what is not INT8 in bfloat16 where the CPU can, and rounds the float inputs of an int8
        # weight to integers, which is another model.
        options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
        compiled = core.compile_model(model, "CPU", options)
        found = compiled(taken(file.path, [each.any_name for each in compiled.inputs], inputs))
        # An output that is also a probe has both names.
        return {name: np.array(found[port]) for port in compiled.outputs for name in port.names}


def _port(found: Any) -> Port:
    rank = found.get_partial_shape().rank
    sizes = found.get_partial_shape() if rank.is_static else ()
    shape = tuple(None if size.is_dynamic else size.get_length() for size in sizes)
    return Port(found.get_any_name(), np.dtype(found.get_element_type().to_dtype()), shape)
