"""The placement linter: which fusion each Q/DQ enables or blocks on a runtime, before anything is built or run.

It looks at the graph alone. What the runtime did in the end is told by :mod:`qdq_surgery.prove.receipt`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_file.graph_checks import check_structure
from qdq_surgery.onnx_file.opened import OnnxFile, open_file
from qdq_surgery.onnx_graph.findings import VERDICTS, Finding, Findings
from qdq_surgery.safety.given_path import given_path
from qdq_surgery.targets.registry import TARGETS, get_target
from qdq_surgery.text.optional_imports import require

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["Finding", "Findings", "lint"]


def lint(path_or_model: str | Path | onnx.ModelProto | ir.Model | OnnxFile, target: str | None = None) -> Findings:
    """Say for each Q/DQ of an ONNX file which fusion it enables or blocks on a runtime, and why.

    Args:
        path_or_model: A file that ``export_onnx`` wrote, or any other with QuantizeLinear and DequantizeLinear, whose
            sites are then called after their nodes; or such a model that is loaded already. Weights are not read.
        target: ``onnxruntime``, ``openvino`` or ``tensorrt``; the one that the file was exported for if left out.

    Returns:
        The findings, what blocks first. Print them, or use ``to_text`` and ``to_json``.

    Raises:
        ExportError: There is no such file or target, it is no ONNX file, or it does not tell its target.
        ModelError: onnx_ir is not installed.
    """
    file = _opened(path_or_model)
    metadata, graph = file.metadata, file.model.graph
    if target is None and "target" not in metadata:
        *others, last = map(repr, TARGETS)
        raise ExportError(
            f"{file.path} does not tell what it was exported for; give target={', '.join(others)} or {last}"
        )
    chosen = get_target(metadata["target"] if target is None else target)
    try:
        found = list(chosen.rules().check(file))
    except (OSError, ValueError) as error:  # of NumPy and onnx_ir: a constant is not what it says
        raise ExportError(f"{file.path} has a constant that cannot be read: {error}") from error
    merged = sorted(_merged(found), key=lambda finding: VERDICTS.index(finding.verdict))
    pairs = sum(node.op_type == "DequantizeLinear" for node in graph)
    return Findings(metadata.get("class") or graph.name or "the model", chosen.name, pairs, tuple(merged))


def _opened(path_or_model: Any) -> OnnxFile:
    if isinstance(path_or_model, OnnxFile):
        return path_or_model
    if not hasattr(path_or_model, "graph"):
        return open_file(given_path(path_or_model, "an ONNX file"))
    onnx_ir = require("onnx_ir", "looking at an ONNX file")
    if isinstance(path_or_model, onnx_ir.Model):
        return OnnxFile(path_or_model)
    try:
        check_structure(path_or_model)
        return OnnxFile(onnx_ir.from_proto(path_or_model))
    except ValueError as error:
        raise ExportError(f"this model is no ONNX graph that can be looked at: {error}") from error


def _merged(findings: list[Finding]) -> list[Finding]:
    """One finding for all nodes that a site serves alike."""
    groups: dict[tuple[Any, ...], Finding] = {}
    for finding in findings:
        key = (finding.verdict, finding.fusion, finding.reason, finding.remedy, finding.sites or finding.nodes)
        known = groups.get(key)
        nodes = finding.nodes if known is None else tuple(dict.fromkeys((*known.nodes, *finding.nodes)))
        groups[key] = Finding(finding.verdict, finding.fusion, finding.reason, finding.remedy, finding.sites, nodes)
    return list(groups.values())
