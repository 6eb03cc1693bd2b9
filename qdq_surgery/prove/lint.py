"""The placement linter: which fusion each Q/DQ enables or blocks on a runtime, before anything is built or run.

It looks at the graph alone. What the runtime did in the end is told by :mod:`qdq_surgery.prove.receipt`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_file.graph_checks import check_structure
from qdq_surgery.onnx_file.metadata import own_entries, read_config
from qdq_surgery.onnx_file.reader import open_graph
from qdq_surgery.onnx_file.sites import METADATA, check_sites, load_sites
from qdq_surgery.onnx_graph.findings import VERDICTS, Finding, Findings
from qdq_surgery.targets.registry import TARGETS, get_target
from qdq_surgery.text.optional_imports import require

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["Finding", "Findings", "lint"]


def lint(path_or_model: str | Path | onnx.ModelProto | ir.Model, target: str | None = None) -> Findings:
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
    model = _load(path_or_model)
    what = str(path_or_model) if isinstance(path_or_model, (str, Path)) else "this model"
    metadata = own_entries(model.metadata_props.items(), what)
    if target is None and "target" not in metadata:
        *others, last = map(repr, TARGETS)
        raise ExportError(
            f"this model does not tell what it was exported for; give target={', '.join(others)} or {last}"
        )
    chosen = get_target(metadata["target"] if target is None else target)
    sites = load_sites(metadata.get("sites", "[]"), f"{what}, '{METADATA}sites' of its metadata")
    nodes = {str(node.name): (node.op_type, [str(value.name) for value in node.outputs]) for node in model.graph}
    check_sites(sites, nodes, what)
    config = read_config(metadata.get("config", "{}"), what)
    try:
        found = list(chosen.rules().check(model, sites, config))
    except (OSError, ValueError) as error:  # of NumPy and onnx_ir: a constant is not what it says
        raise ExportError(f"{what} has a constant that cannot be read: {error}") from error
    merged = sorted(_merged(found), key=lambda finding: VERDICTS.index(finding.verdict))
    pairs = sum(node.op_type == "DequantizeLinear" for node in model.graph)
    return Findings(metadata.get("class") or model.graph.name or "the model", chosen.name, pairs, tuple(merged))


def _load(path_or_model: Any) -> ir.Model:
    onnx_ir = require("onnx_ir", "looking at an ONNX file")
    made: ir.Model
    if isinstance(path_or_model, onnx_ir.Model):
        made = path_or_model
    elif isinstance(path_or_model, (str, Path)):
        made = open_graph(path_or_model)
    else:
        try:
            check_structure(path_or_model)
            made = onnx_ir.from_proto(path_or_model)
        except ValueError as error:
            raise ExportError(f"this model is no ONNX graph that can be looked at: {error}") from error
    return made


def _merged(findings: list[Finding]) -> list[Finding]:
    """One finding for all nodes that a site serves alike."""
    groups: dict[tuple[Any, ...], Finding] = {}
    for finding in findings:
        key = (finding.verdict, finding.fusion, finding.reason, finding.remedy, finding.sites or finding.nodes)
        known = groups.get(key)
        nodes = finding.nodes if known is None else tuple(dict.fromkeys((*known.nodes, *finding.nodes)))
        groups[key] = Finding(finding.verdict, finding.fusion, finding.reason, finding.remedy, finding.sites, nodes)
    return list(groups.values())
