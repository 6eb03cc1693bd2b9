"""What runtimes say, in words for people."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdq_surgery.targets.onnxruntime.session import OnnxRuntimeSession
from qdq_surgery.targets.openvino.session import OpenVinoSession
from qdq_surgery.targets.session import Session

OPENVINO = """Exception from src/inference/src/cpp/core.cpp:109:
Exception from src/inference/src/dev/plugin.cpp:53:
Check 'shape.is_static()' failed at src/plugins/intel_cpu/src/node.cpp:12:
  FakeQuantize node with name 'x' has a scale of another rank at src/graph.cpp:7: here

"""


@pytest.mark.parametrize(
    ("session", "said", "reason"),
    [
        (OnnxRuntimeSession, "[ONNXRuntimeError] : 2 : FAIL : Got 41.\n Expected: 40", "Got 41. Expected: 40"),
        (OnnxRuntimeSession, "", "ValueError"),
        (OnnxRuntimeSession, "long " * 200, ("long " * 100)),
        (OpenVinoSession, OPENVINO, "FakeQuantize node with name 'x' has a scale of another rank here"),
        (OpenVinoSession, "Caught exception: Check 'a > b' failed at src/a.cpp:1: too small", "too small"),
    ],
)  # fmt: skip
def test_reasons_are_one_line_without_places_in_the_sources(session: type[Session], said: str, reason: str) -> None:
    assert session.reason(ValueError(said)) == reason


def test_what_a_runtime_lacks_is_named() -> None:
    said = "Could not find an implementation for Erf(13) node with name 'encoder/Erf'"
    pytest.importorskip("onnxruntime")
    message = str(OnnxRuntimeSession.unopened(Path("m.onnx"), RuntimeError(said)))
    assert message.startswith("m.onnx cannot be opened by onnxruntime ")
    assert ", which lacks the operator Erf of node 'encoder/Erf'; use a newer version" in message


def test_weights_that_are_missing_are_said_to_be() -> None:
    pytest.importorskip("openvino")
    message = str(OpenVinoSession.unopened(Path("m.onnx"), RuntimeError("no External data")))
    assert message.endswith(": no External data; a file of weights beside it is missing or damaged")
