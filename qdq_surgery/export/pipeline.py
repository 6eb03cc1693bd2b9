"""The graph for one target, from the traced one: passes in their order."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir.passes.common as common
from numpy.typing import NDArray
from transformers import PreTrainedModel

from qdq_surgery.export.onnx_trace import Traced
from qdq_surgery.export.passes.fold_channel_scales import fold_channel_scales
from qdq_surgery.export.passes.fold_score_scale import fold_score_factors
from qdq_surgery.export.passes.keep_scales_apart import keep_scales_apart
from qdq_surgery.export.passes.lower_qdq import lower
from qdq_surgery.export.passes.name_nodes import name_nodes
from qdq_surgery.export.passes.prevent_ort_fusions import plain_bias, plain_relu, plain_skip_norm
from qdq_surgery.export.passes.widen_embedding_factor import widen_embedding_factors
from qdq_surgery.export.qparams import QParams
from qdq_surgery.onnx_file.metadata import METADATA, dump_sites
from qdq_surgery.onnx_file.opened import OnnxFile
from qdq_surgery.onnx_file.origin import describe
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.targets.target import Target
from qdq_surgery.version import __version__

__all__ = ["build"]


def build(
    traced: Traced,
    qmodel: PreTrainedModel,
    qparams: Mapping[str, QParams],
    target: Target,
    activations: str,
    weights: Mapping[str, NDArray[np.float32]],
) -> OnnxFile:
    """Lower ``traced`` for ``target``, in place.

    Args:
        traced: From :func:`qdq_surgery.export.onnx_trace.trace`.
        qparams: By the quantizer's name.
        activations: ``"int8"`` or ``"uint8"``.
        weights: Float32 values of parameters that the traced graph holds in half precision.
    """
    model, graph = traced.model, traced.model.graph
    pairs = lower(graph, qparams, activations, weights)
    fold_score_factors(graph, pairs)
    fold_channel_scales(graph, pairs)
    if target.scales_apart:
        keep_scales_apart(graph)
        widen_embedding_factors(graph)
    if target.plain_bias:
        plain_bias(graph)
        plain_relu(graph)
    if target.plain_skip_norm:
        plain_skip_norm(graph)
    common.RemoveUnusedNodesPass()(model)
    common.RemoveUnusedOpsetsPass()(model)
    graph.sort()
    name_nodes(graph, {pair.site.rows for pair in pairs if pair.site.rows is not None})
    sites = tuple(pair.site for pair in pairs)
    model.producer_name, model.producer_version = "qdq_surgery", __version__
    model.doc_string = None
    model.metadata_props.clear()
    model.metadata_props.update(
        {
            f"{METADATA}version": __version__,
            f"{METADATA}target": target.name,
            f"{METADATA}rules": plan_of(qmodel).rules.name,
            **describe(qmodel, traced.output_class),
            f"{METADATA}sites": dump_sites(sites),
        }
    )
    return OnnxFile(model, sites=sites)
