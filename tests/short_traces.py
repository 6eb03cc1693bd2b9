"""What torch does twice, or for nobody, while it traces for tests: left out, as a trace is most of an export's time.

The file is the same to the byte: tests/project/test_short_traces.py.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest
import torch.fx
from onnxscript.rewriter._rewrite_rule import RewriteRule
from torch.fx import Node
from torch.onnx._internal.fx.passes import type_promotion

__all__ = ["install", "uninstall"]

_Interpreter = type_promotion._TypePromotionInterpreter
_run_node = _Interpreter.run_node
_try_rewrite = RewriteRule.try_rewrite
_emits_none = torch.fx.config.do_not_emit_stack_traces


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is undone, traces are short."""
    # Nodes keep where they were made, with the lines of all functions up to pytest's; nobody reads it here.
    monkeypatch.setattr(torch.fx.config, "do_not_emit_stack_traces", True)
    monkeypatch.setattr(_Interpreter, "run_node", _promoted)
    monkeypatch.setattr(RewriteRule, "try_rewrite", _tried)


def uninstall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is undone, they are whole."""
    monkeypatch.setattr(torch.fx.config, "do_not_emit_stack_traces", _emits_none)
    monkeypatch.setattr(_Interpreter, "run_node", _run_node)
    monkeypatch.setattr(RewriteRule, "try_rewrite", _try_rewrite)


def _promoted(self: Any, node: Node) -> Any:
    """Types are promoted, and what a node gives is what the trace has kept of it: torch runs each node once more."""
    if node.op != "call_function" or "val" not in node.meta:
        return _run_node(self, node)
    with self._set_current_node(node):
        if rule := type_promotion.get_type_promotion_rule(node, self.type_promotion_table):
            self._maybe_promote_node(node, rule)
    return node.meta["val"]


def _tried(self: RewriteRule, model: ir.Model, graph: ir.Graph, node: ir.Node, **options: Any) -> Any:
    """onnxscript tries each of a hundred rules on each node: here those that are for another operator fail at once."""
    wanted = self._target_pattern.output_nodes[0].op_identifier()
    if wanted is not None and wanted[:2] != (node.domain, node.op_type):
        return None
    return _try_rewrite(self, model, graph, node, **options)
