"""The registry: a target is a folder and an entry, and nobody else knows a runtime by its name."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from fresh_import import fresh_import
from repository import PACKAGE

import qdq_surgery as qs
from qdq_surgery.cli.commands import parser
from qdq_surgery.onnx_file.opened import OnnxFile
from qdq_surgery.onnx_graph.executed import Executed, Kernel
from qdq_surgery.onnx_graph.findings import Finding
from qdq_surgery.onnx_graph.graph import OnnxGraph
from qdq_surgery.targets import registry
from qdq_surgery.targets.onnxruntime.session import OnnxRuntimeSession
from qdq_surgery.targets.target import Target

RUNTIMES = ("onnxruntime", "openvino", "tensorrt")

#: Where a runtime's name decides something: compared, looked up, or a module to import.
DECIDED = """
if name == "openvino": pass
if name in ("onnxruntime", "other"): pass
found = {"tensorrt": 1}
match name:
    case "openvino": pass
import onnxruntime
from openvino import Core
"""


def deciding(source: str) -> Iterator[int]:
    """Lines in which a runtime's name decides something."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            places: list[ast.expr | None] = [node.left, *node.comparators]
        elif isinstance(node, ast.Dict):
            places = list(node.keys)
        elif isinstance(node, ast.Subscript):
            places = [node.slice]
        elif isinstance(node, ast.MatchValue):
            places = [node.value]
        elif isinstance(node, ast.Import):
            yield from (node.lineno for alias in node.names if alias.name.split(".")[0] in RUNTIMES)
            continue
        elif isinstance(node, ast.ImportFrom):
            yield from [node.lineno] * ((node.module or "").split(".")[0] in RUNTIMES)
            continue
        else:
            continue
        named = (each for place in places if place is not None for each in ast.walk(place))
        if any(isinstance(each, ast.Constant) and each.value in RUNTIMES for each in named):
            yield node.lineno


def test_only_targets_know_a_runtime_by_its_name() -> None:
    assert {
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in PACKAGE.rglob("*.py")
        if PACKAGE / "targets" not in path.parents
        for line in deciding(path.read_text())
    } == set()


def test_that_test_can_fail() -> None:
    assert sorted(deciding(DECIDED)) == [2, 3, 4, 6, 7, 8]


@pytest.mark.slow
def test_importing_the_package_imports_no_runtime() -> None:
    optional = (*RUNTIMES, "onnx", "onnx_ir", "onnxscript")
    assert "qdq_surgery.cli" in fresh_import().modules
    assert not fresh_import().modules.intersection(optional)


@pytest.mark.parametrize("name", RUNTIMES)
def test_an_entry_is_complete(name: str) -> None:
    pytest.importorskip("onnx_ir")
    target = registry.TARGETS[name]
    assert target.rules().__module__ == f"qdq_surgery.targets.{name}.lint"
    assert (target.session is None) == (name not in registry.runtimes())
    assert target.session is None or (target.session.runtime, target.session.modes[-1]) == (name, True)


@pytest.mark.parametrize(
    ("runtime", "asked", "full"),
    [
        ("openvino", "float32", "float32"),
        ("openvino", "f32", "float32"),
        ("openvino", "bfloat16", "bfloat16"),
        ("openvino", "bf16", "bfloat16"),
        ("openvino", None, None),
        ("onnxruntime", None, None),
    ],
)
def test_precisions_have_one_vocabulary(runtime: str, asked: str | None, full: str | None) -> None:
    assert registry.computed_in(runtime, asked) == full


@pytest.mark.parametrize(
    ("runtime", "asked", "said"),
    [
        ("openvino", "half", "there is no precision 'half'; use 'float32' or 'bfloat16'"),
        ("openvino", "float16", "precision 'float16' is not supported for openvino; use 'float32' or 'bfloat16'"),
        ("tensorrt", "f32", "precision is for openvino; tensorrt computes in what the file says, so leave it out"),
        (
            "onnxruntime",
            "f32",
            "precision is for openvino; onnxruntime computes in what the file says, so leave it out",
        ),
    ],
)
def test_what_a_runtime_does_not_compute_in(runtime: str, asked: str, said: str) -> None:
    with pytest.raises(qs.ModelError) as caught:
        registry.computed_in(runtime, asked)
    assert str(caught.value) == said


class ToySession(OnnxRuntimeSession):
    """ONNX Runtime by another name, whose outputs and probes are counted."""

    runtime = "toy"
    precisions = ("float16",)
    calls: list[str] = []  # noqa: RUF012

    @classmethod
    def package(cls, what: str) -> ModuleType:
        """The one that it is in truth."""
        return OnnxRuntimeSession.package(what)

    def run(self, feed: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """As the base does."""
        self.calls.append("run")
        return super().run(feed)

    @classmethod
    def probe(
        cls, file: OnnxFile, inputs: Mapping[str, np.ndarray[Any, Any]], values: Sequence[str], optimized: bool
    ) -> dict[str, np.ndarray[Any, Any]]:
        """As the base does."""
        cls.calls.append(f"probe {optimized}")
        return super().probe(file, inputs, values, optimized)


def toy_executed(graph: OnnxGraph, precision: str | None, _: object) -> Executed:
    """All in INT8."""
    assert precision in (None, "float16")
    return Executed("1.0", {gemm.name: Kernel("int8", "toys") for gemm in graph.products})


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Target:
    """A target that is registered, and nothing else."""
    from qdq_surgery.onnx_graph.qdq_pairs import Pair
    from qdq_surgery.targets.lint_rules import LintRules

    class Rules(LintRules):
        moves = ("Transpose",)

        def product(self, *_: object) -> tuple[str, str, str, str]:
            return "enables", "toy GEMM", "toys multiply integers", ""

        def operator(self, _: Pair, node: Any) -> tuple[str, str, str, str]:
            return "idle", "nothing", f"toys do not {node.op_type}", "leave it out"

        def whole(self) -> Iterator[Finding]:
            return self.left_out("they are no toys")

    module = ModuleType("toy_lint")
    vars(module)["Rules"] = Rules
    monkeypatch.setitem(sys.modules, "toy_lint", module)
    target = Target(
        "toy", "Toys", 20, (19, 20), ("uint8", "int8"), "toy_lint", toy_executed, ToySession, precisions=("float32",)
    )
    monkeypatch.setitem(registry.TARGETS, "toy", target)
    ToySession.calls.clear()
    return target


@pytest.mark.slow
def test_a_target_that_is_registered_goes_all_the_way(
    toy: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxscript")
    from exported import calibrated, inputs_for

    # The certificate asks what is installed.
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: real("sys" if name == "toy" else name, *a))
    model = calibrated("bert", num_hidden_layers=1)
    batch = inputs_for(model, (2, 9))
    made = qs.export_onnx(model, tmp_path / "toy.onnx", target=toy.name)
    assert (made.target, made.opset) == ("toy", 20)
    assert made.parity is not None
    assert [check.runtime for check in made.parity.checks][2:] == ["toy, optimisations off", "toy"]
    assert ToySession.calls == ["probe False", "probe True"]
    assert {finding.fusion for finding in qs.lint(made.path).findings} == {"toy GEMM", "nothing", "GEMMs without Q/DQ"}
    with pytest.raises(qs.ExportError, match="opset 21 is not supported for toy; choose one of 19 to 20"):
        qs.export_onnx(model, tmp_path / "no.onnx", batch, toy.name, opset=21)

    served = qs.load_onnx(made.path, "toy")
    assert (served.runtime, served.target) == ("toy", "toy")
    torch.testing.assert_close(  # a tie may be rounded the other way
        served(**batch).last_hidden_state, model(**batch).last_hidden_state, rtol=0, atol=0.05
    )
    assert ToySession.calls[-1] == "run"
    with pytest.raises(qs.ModelError, match="precision is for openvino or toy; onnxruntime computes"):
        qs.load_onnx(made.path, precision="f32")
    with pytest.raises(qs.ModelError, match="use 'onnxruntime', 'openvino', 'tensorrt', 'toy'"):
        qs.receipt(made.path, "nowhere")
    found = qs.receipt(made.path, shape=(1, 8), precision="float16")
    assert (found.runtime, found.version, found.total) == ("toy", "1.0", 1.0)


def test_the_command_line_asks_the_registry(toy: Target) -> None:
    words = ["export", "folder", "file.onnx", "--target", toy.name, "--precision"]
    for short, full in (("f32", "float32"), ("bf16", "bfloat16"), ("float16", "float16")):
        given = parser().parse_args([*words, short])
        assert (given.target, given.precision) == ("toy", full)
