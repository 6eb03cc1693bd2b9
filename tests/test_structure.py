"""The layout: imports go downwards, names of libraries stay where they belong, files stay small."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "qdq_surgery"

#: From the bottom up: a module imports only from those before it.
LAYERS = [
    "starting",
    "version",
    "errors",
    "upstream",
    "untrusted",
    "limits",
    "positions",
    "render",
    "layered",
    "progress",
    "pattern_text",
    "pattern",
    "quant_spec",
    "spec",
    "rule_yaml",
    "rule_file",
    "rule_data",
    "operators",
    "transaction",
    "randomness",
    "facts",
    "targets",
    "places",
    "watch",
    "shadow",
    "symbols",
    "routine",
    "replay",
    "tidy",
    "stand_in",
    "recorder",
    "attention",
    "numerics",
    "tagging",
    "histogram",
    "ranges",
    "masks",
    "axes",
    "tables",
    "probing",
    "padding",
    "calibrator",
    "quantizer",
    "linear",
    "rewritten",
    "examples",
    "survey",
    "plan",
    "fitting",
    "expectations",
    "site_names",
    "sharing",
    "plan_data",
    "matching",
    "making",
    "surgery",
    "converted",
    "inside",
    "analysis",
    "gather",
    "collect",
    "calibrate",
    "pretrained.__init__",
    "pretrained.descriptors",
    "pretrained.record",
    "pretrained.config",
    "pretrained.hollow",
    "pretrained.lock",
    "pretrained.ranges",
    "pretrained.preflight",
    "pretrained.conversions",
    "pretrained.attentions",
    "pretrained.report",
    "pretrained.comparing",
    "pretrained.saving",
    "pretrained.plugin",
    "convert",
    "pretrained.head_mask",
    "pretrained.legacy_cache",
    "pretrained.qdqbert",
    "heads",
    "listing",
    "diff",
    "explain",
    "training",
    "trainer",
    "folder",
    "input_file",
    "samples",
    "vocabulary",
    "texts",
    "deploy.__init__",
    "deploy.extras",
    "deploy.targets",
    "deploy.wire",
    "deploy.structure",
    "deploy.opening",
    "deploy.sites",
    "deploy.described",
    "deploy.origin",
    "deploy.sample",
    "deploy.chunks",
    "deploy.grids",
    "deploy.half",
    "deploy.twin",
    "deploy.writing",
    "deploy.tracing",
    "deploy.lowering",
    "deploy.scores",
    "deploy.fusing",
    "deploy.naming",
    "deploy.building",
    "deploy.stored",
    "deploy.probing",
    "deploy.parity",
    "deploy.engines",
    "deploy.feeding",
    "deploy.runner",
    "deploy.findings",
    "deploy.placement",
    "deploy.lint_onnxruntime",
    "deploy.lint_openvino",
    "deploy.lint_tensorrt",
    "deploy.lint",
    "deploy.gemms",
    "deploy.executed",
    "deploy.multiply_adds",
    "deploy.optimized_onnxruntime",
    "deploy.optimized_openvino",
    "deploy.layers_tensorrt",
    "deploy.receipt",
    "deploy.export",
    "demo",
    "wording",
    "cli",
    "__init__",
    "__main__",
]

#: Libraries that only these modules may know.
HOMES = {
    "yaml": {"rule_yaml", "rule_file"},
    # At run time only through deploy.extras.
    "onnx": {"deploy.lint"},
    "onnx_ir": {
        "deploy.opening",
        "deploy.tracing",
        "deploy.lowering",
        "deploy.scores",
        "deploy.fusing",
        "deploy.naming",
        "deploy.building",
        "deploy.stored",
        "deploy.probing",
        "deploy.placement",
        "deploy.lint",
        "deploy.lint_onnxruntime",
        "deploy.lint_openvino",
        "deploy.lint_tensorrt",
        "deploy.export",
    },
    "onnxruntime": {"deploy.probing"},
    "transformers": {
        "attention",
        "examples",
        "survey",
        "matching",
        "making",
        "surgery",
        "analysis",
        "inside",
        "pretrained.conversions",
        "pretrained.config",
        "pretrained.hollow",
        "pretrained.lock",
        "pretrained.ranges",
        "pretrained.preflight",
        "pretrained.comparing",
        "pretrained.saving",
        "pretrained.report",
        "pretrained.plugin",
        "convert",
        "pretrained.legacy_cache",
        "pretrained.qdqbert",
        "diff",
        "collect",
        "calibrate",
        "trainer",
        "folder",
        "heads",
        "vocabulary",
        "texts",
        "deploy.origin",
        "deploy.sample",
        "deploy.twin",
        "deploy.grids",
        "deploy.half",
        "deploy.chunks",
        "deploy.tracing",
        "deploy.building",
        "deploy.parity",
        "deploy.export",
        "deploy.runner",
        "deploy.engines",
        "deploy.feeding",
        "demo",
        "cli",
    },
}


def imports(path: Path) -> set[str]:
    """All modules that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: imports are absolute"
            assert node.module is not None
            assert [alias.name for alias in node.names] != ["*"]
            if node.module in ("qdq_surgery", "qdq_surgery.deploy", "qdq_surgery.pretrained"):  # their modules, by name
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
            else:
                found.add(node.module)
    return found


def modules() -> list[str]:
    paths = sorted(path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return [".".join(path.parts) for path in paths]


def file_of(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def test_every_module_has_its_layer() -> None:
    assert sorted(LAYERS) == sorted(modules())


@pytest.mark.parametrize("name", LAYERS)
def test_imports_go_downwards(name: str) -> None:
    own = {module.removeprefix("qdq_surgery.") for module in imports(file_of(name)) if "qdq_surgery" in module}
    below = set(LAYERS[: LAYERS.index(name)])
    assert own <= below, f"{name} imports {sorted(own - below)}"


@pytest.mark.parametrize("library", HOMES)
def test_libraries_stay_in_their_modules(library: str) -> None:
    users = {
        name
        for name in modules()
        if any(module == library or module.startswith(library + ".") for module in imports(file_of(name)))
    }
    assert users <= HOMES[library]
    assert users


def test_files_hold_one_idea() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert max(lengths.values()) <= 520, max(lengths, key=lambda name: lengths[name])
    assert "utils.py" not in lengths


def test_every_module_says_what_it_is_for() -> None:
    for name in modules():
        assert ast.get_docstring(ast.parse(file_of(name).read_text())), name


def test_the_test_can_fail(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("def f():\n    from qdq_surgery.cli import main\n")
    assert imports(path) == {"qdq_surgery.cli"}
