"""Running a file, with a look at values inside it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_file.reader import check_file, open_graph
from qdq_surgery.onnx_file.writer import DATA_SUFFIX, LARGEST
from qdq_surgery.safety.untrusted import quoted
from qdq_surgery.text.optional_imports import require

__all__ = ["Runtime", "probe", "runtimes"]

Arrays = dict[str, NDArray[Any]]

#: How much a message holds of what a runtime says, in characters.
_LONGEST = 300


@dataclass(frozen=True)
class Runtime:
    """A runtime in one of its modes.

    Attributes:
        name: ``onnxruntime`` or ``openvino``.
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
        # OpenVINO's goes on with the commit it was built from.
        return str(require(self.name, "checking a file").__version__).partition("-")[0]


def runtimes(name: str) -> tuple[Runtime, ...]:
    """The modes of a runtime; OpenVINO always rewrites."""
    return tuple(Runtime(name, optimized) for optimized in ((False, True) if name == "onnxruntime" else (True,)))


def probe(path: Path, inputs: Mapping[str, NDArray[Any]], values: Sequence[str], runtime: Runtime) -> Arrays:
    """The file's outputs, and ``values`` inside it, by name.

    Args:
        inputs: By name; those that the file does not take are left out.
        values: Names of values. That they are asked for keeps a runtime from fusing them away.

    Raises:
        ExportError: The file is none that can be opened, the runtime cannot run it, and says why, or an input is
            missing.
    """
    check_file(path)
    run = _run_onnxruntime if runtime.name == "onnxruntime" else _run_openvino
    try:
        return run(path, inputs, values, runtime)
    except ExportError:
        raise
    except Exception as error:  # each runtime has exceptions of its own
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # OpenVINO says first where in its own sources it stopped.
        said = " ".join(line for line in lines if not line.startswith(("Exception from ", "Check '")))
        said = said if len(said) <= _LONGEST else f"{said[:_LONGEST]}..."
        raise ExportError(f"{runtime.words} cannot run {path.name}: {said or type(error).__name__}") from error


def _run_onnxruntime(path: Path, inputs: Mapping[str, NDArray[Any]], values: Sequence[str], runtime: Runtime) -> Arrays:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if runtime.optimized else level.ORT_DISABLE_ALL
    with tempfile.TemporaryDirectory(prefix="qdq-surgery-") as folder:
        file = _with_outputs(path, values, Path(folder)) if values else path
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        taken = _taken(path, [each.name for each in session.get_inputs()], inputs)
        names = [each.name for each in session.get_outputs()]
        return dict(zip(names, session.run(names, taken), strict=True))


def _taken(path: Path, names: Sequence[str], inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    absent = [name for name in names if name not in inputs]
    if absent:
        raise ExportError(f"{path.name} takes {', '.join(absent)}, which the inputs lack ({', '.join(inputs)})")
    return {name: inputs[name] for name in names}


def _with_outputs(path: Path, values: Sequence[str], folder: Path) -> Path:
    """A copy of the file in ``folder`` with ``values`` among its outputs."""
    import onnx_ir as ir

    model = open_graph(path)
    made = {value.name: value for node in model.graph for value in node.outputs}
    absent = [name for name in values if name not in made]
    if absent:
        raise ExportError(f"{path.name} has no value {quoted(absent[0])}, which it says that it has")
    model.graph.outputs.extend(made[name] for name in values)
    size = sum(each.const_value.nbytes for each in model.graph.initializers.values() if each.const_value)
    file = folder / path.name
    ir.save(model, file, external_data=f"{path.name}{DATA_SUFFIX}" if size > LARGEST else None)
    return file


def _run_openvino(path: Path, inputs: Mapping[str, NDArray[Any]], values: Sequence[str], _: Runtime) -> Arrays:
    openvino = require("openvino", "checking a file on OpenVINO")
    model = openvino.Core().read_model(path)
    if values:
        model.add_outputs(list(values))
    # By itself it computes what is not INT8 in bfloat16 where the CPU can, and rounds the float inputs of an int8
    # weight to integers, which is another model.
    options = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
    compiled = openvino.Core().compile_model(model, "CPU", options)
    taken = _taken(path, [each.any_name for each in compiled.inputs], inputs)
    found = compiled(taken)
    # An output that is also a probe has both names.
    return {name: np.array(found[port]) for port in compiled.outputs for name in port.names}
