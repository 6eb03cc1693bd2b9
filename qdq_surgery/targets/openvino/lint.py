"""What OpenVINO makes of Q/DQ pairs on a CPU.

Each rule was held against the runtime model of OpenVINO 2026.4.1 (``tests/prove/test_lint.py`` does it again with the
version that is installed).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdq_surgery.onnx_graph.findings import Finding
from qdq_surgery.onnx_graph.graph import Attention
from qdq_surgery.onnx_graph.products import Product
from qdq_surgery.onnx_graph.qdq_pairs import Operand, Pair
from qdq_surgery.targets.lint_rules import LintRules, Verdict

__all__ = ["Rules"]

#: What between scores and softmax keeps the two products apart (DeBERTa's reshape does).
_APART = ("Reshape",)

_ATTENTION = "INT8 fused attention"
_PLACES = ("queries", "keys", "probabilities", "values")
_NO_ADDS = 'in the rule file: exclude: [{sites: "add_*", why: "the sum is float"}], or rules openvino'


class Rules(LintRules):
    """What OpenVINO does on a CPU."""

    moves = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity")
    factors = ("Mul", "Div")
    floats = False

    def refusal(self, pair: Pair) -> tuple[str, str, str] | None:
        """See the base."""
        if pair.axis is None or pair.quantize is None or pair.constant:
            return None
        reason = "OpenVINO refuses the file: activations have one scale each"
        return "the model", reason, "axis: null in the activations' spec"

    def operator(self, _: Pair, node: ir.Node) -> Verdict:
        """See the base."""
        if node in self.residuals:
            reason = "the sum feeds a LayerNormalization in float, so that rounding its inputs saves nothing"
            return "idle", "nothing", reason, _NO_ADDS
        reason = f"read by {node.op_type}, which is computed in float"
        return "idle", "nothing", reason, "leave the site out, by exclude in the rule file"

    def product(self, pair: Pair, product: Product) -> Verdict:
        """See the base."""
        if product.constant:
            return "idle", "nothing", "the product of two constants is computed once, when the file is opened", ""
        attention = self.attentions.get(product.node)
        apart = [] if attention is None else [node for node in attention.between if node.op_type in _APART]
        if attention is not None and not apart:
            return self._attention(pair, product, attention)
        fusion = "INT8 FullyConnected" if product.weighted else "INT8 MatMul"
        turned = next((each for each in product.operands if _turned_before(each)), None)
        if turned is not None:
            reason = "a Transpose stands between the stored integers and their DequantizeLinear: the GEMM runs in float"
            verdict = "blocks" if turned.pair is pair else "idle"
            return verdict, fusion, reason, "store the integers the way round in which the GEMM takes them"
        for which, operand in zip(("first", "second"), product.operands, strict=True):
            if operand.pair is None:
                reason = f"its {which} input comes from no DequantizeLinear: the GEMM runs in float"
                return "blocks", fusion, reason, "quantize both inputs of the GEMM, or neither"
        reason = "both inputs come from a DequantizeLinear"
        if apart:
            reason += f"; no fused attention, for a {apart[0].op_type} is between scores and softmax"
        first = product.operands[0].pair
        if first is pair and not pair.symmetric:
            return "enables", fusion, f"{reason}; a zero point other than 0 is one more pass", "activations='int8'"
        return "enables", fusion, reason, ""

    def _attention(self, pair: Pair, product: Product, attention: Attention) -> Verdict:
        pairs = [operand.pair for operand in (*attention.scores.operands, *attention.context.operands)]
        lopsided = [
            place
            for place, each in zip(_PLACES, pairs, strict=True)
            if place in ("queries", "probabilities") and each is not None and not each.symmetric
        ]
        if lopsided:
            guilty = [each for place, each in zip(_PLACES, pairs, strict=True) if place in lopsided]
            reason = f"the zero point of the {' and the '.join(lopsided)} is not 0: the attention runs in float"
            return "blocks" if pair in guilty else "idle", _ATTENTION, reason, "export_onnx(..., target='openvino')"
        if any(operand.pair is None for operand in product.operands):
            at = 0 if product is attention.scores else 2
            missing = " and ".join(
                place for place, each in zip(_PLACES[at : at + 2], pairs[at : at + 2], strict=True) if each is None
            )
            reason = f"the {missing} of the same product have no Q/DQ, so that it runs in float"
            return "blocks", _ATTENTION, reason, "quantize both inputs of the product, or neither"
        absent = [place for place, each in zip(_PLACES, pairs, strict=True) if each is None]
        if absent:
            reason = (
                f"this product is on integers; the other, of {' and '.join(absent)}, stays float in the same kernel"
            )
            return "enables", _ATTENTION, reason, ""
        return "enables", _ATTENTION, "queries, keys, probabilities and values are all quantized around zero", ""

    def whole(self) -> Iterator[Finding]:
        """See the base."""
        remedy = "in the rule file: share: [{sites: [...], why: one range}]"
        yield from self.requantized("idle", "one pass for all readers", "each with a pass of its own", remedy)
        yield from self.left_out("neither input comes from a DequantizeLinear; they run in float or bf16")


def _turned_before(operand: Operand) -> bool:
    """Whether a constant's integers are moved before they are dequantized."""
    if operand.pair is None or operand.pair.quantize is not None:
        return False
    integers = operand.pair.dequantize.inputs[0]
    return integers is not None and integers.producer() is not None and operand.pair.constant
