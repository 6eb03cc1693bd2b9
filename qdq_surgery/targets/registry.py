"""The targets by name. A new one is a folder here, a rule file of its name, and a line in this file."""

from __future__ import annotations

from qdq_surgery.errors import ExportError, ModelError
from qdq_surgery.targets.onnxruntime.profile import ONNXRUNTIME
from qdq_surgery.targets.onnxruntime.session import OnnxRuntimeSession
from qdq_surgery.targets.openvino.profile import OPENVINO
from qdq_surgery.targets.session import Session
from qdq_surgery.targets.target import PRECISIONS, Target, full_precision
from qdq_surgery.targets.tensorrt.profile import TENSORRT

__all__ = ["DEFAULT", "REFERENCE", "TARGETS", "computed_in", "get_target", "runtimes", "session_on"]

TARGETS: dict[str, Target] = {target.name: target for target in (ONNXRUNTIME, OPENVINO, TENSORRT)}

#: What is meant where no target and no runtime is named.
DEFAULT = ONNXRUNTIME.name

#: Runs any file as it is written: each is checked on it, and tells its shapes there, whatever its target.
REFERENCE = OnnxRuntimeSession


def get_target(name: str) -> Target:
    """The target of that name.

    Raises:
        ExportError: There is none.
    """
    if name not in TARGETS:
        raise ExportError(f"there is no target '{name}'; targets are {', '.join(TARGETS)}")
    return TARGETS[name]


def runtimes() -> tuple[str, ...]:
    """Names of the targets that open a file here."""
    return tuple(name for name, target in TARGETS.items() if target.session is not None)


def session_on(runtime: str) -> type[Session]:
    """What opens a file on a runtime.

    Raises:
        ModelError: There is no such runtime, or it does not open files.
    """
    found = TARGETS[runtime].session if runtime in TARGETS else None
    if found is None:
        built = [target.title for target in TARGETS.values() if target.session is None]
        others = f" ({' and '.join(built)} builds an engine from the file, and runs that)" if built else ""
        raise ModelError(f"there is no runtime '{runtime}'; use {_either(runtimes())}{others}")
    return found


def computed_in(runtime: str, precision: str | None) -> str | None:
    """The full name of what a runtime is asked to compute in where a file does not ask for integers.

    Args:
        runtime: The name of a target.
        precision: ``None`` for the runtime's own choice.

    Raises:
        ModelError: The runtime cannot be asked, or not for that.
    """
    if precision is None:
        return None
    able = {name: target.session.precisions for name, target in TARGETS.items() if target.session}
    if not able.get(runtime):
        free = " or ".join(name for name, precisions in able.items() if precisions)
        raise ModelError(f"precision is for {free}; {runtime} computes in what the file says, so leave it out")
    full = full_precision(precision)
    if full not in PRECISIONS:
        raise ModelError(f"there is no precision '{precision}'; use {_either(able[runtime])}")
    if full not in able[runtime]:
        raise ModelError(f"precision '{precision}' is not supported for {runtime}; use {_either(able[runtime])}")
    return full


def _either(names: tuple[str, ...]) -> str:
    return " or ".join(map(repr, names))
