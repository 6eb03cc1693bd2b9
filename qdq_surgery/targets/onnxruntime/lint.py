"""What ONNX Runtime makes of Q/DQ pairs on a CPU.

Each rule was held against the graph that ONNX Runtime 1.31.1 optimized (``tests/prove/test_lint.py`` does it again
with the version that is installed).
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdq_surgery.onnx_graph.findings import Finding
from qdq_surgery.onnx_graph.graph import OnnxGraph
from qdq_surgery.onnx_graph.products import Product
from qdq_surgery.onnx_graph.qdq_pairs import Operand, Pair
from qdq_surgery.targets.lint_rules import LintRules, Verdict
from qdq_surgery.targets.onnxruntime.session import on_x86

__all__ = ["Rules"]

#: Computed on integers if a Q follows.
_WITH_Q_BEHIND = {
    "Add": "QLinearAdd",
    "Mul": "QLinearMul",
    "Softmax": "QLinearSoftmax",
    "Sigmoid": "QLinearSigmoid",
    "LeakyRelu": "QLinearLeakyRelu",
    "Concat": "QLinearConcat",
}

_NO_ADDS = 'in the rule file: exclude: [{sites: "add_*", why: "the sum is float"}], or rules onnxruntime'


class Rules(LintRules):
    """What ONNX Runtime does on a CPU, which is another thing on x86."""

    moves = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Identity")

    def __init__(self, placement: OnnxGraph, opset: int) -> None:
        super().__init__(placement, opset)
        self.x86 = on_x86()

    def product(self, pair: Pair, product: Product) -> Verdict:
        """See the base."""
        fusion, guilty, reason, remedy = self._product(product)
        verdict = "enables" if guilty is None else "idle" if guilty and pair not in guilty else "blocks"
        if verdict == "idle":
            reason = f"the site of its other input stands in the way: {reason}"
        return verdict, fusion, reason, remedy

    def operator(self, pair: Pair, node: ir.Node) -> Verdict:
        """See the base."""
        if node.op_type != "QuantizeLinear":
            return self._operator(node)
        behind = next((each for each in self.placement.pairs if each.quantize is node), None)
        if behind is not None and _equal(pair, behind):
            return "enables", "integers passed on", "the next pair has the same grid", ""
        return "idle", "integers passed on", "the pair behind it has another scale", ""

    def _operator(self, node: ir.Node) -> Verdict:
        """Verdict, fusion, reason and remedy of what is no GEMM."""
        name, both = _WITH_Q_BEHIND.get(node.op_type), "quantize all of its inputs and its output, or none"
        dequantized = all(self.placement.operand(value).pair is not None for value in node.inputs)
        if name is not None and dequantized and _only_quantized(node):
            return "enables", name, "its inputs come from a DequantizeLinear and its output is quantized", ""
        if node in self.residuals:
            reason = "the sum of a residual add stays float, and QLinearAdd needs a Q behind: never fused"
            return "idle", "QLinearAdd", reason, _NO_ADDS
        if name is None:
            reason = f"read by {node.op_type}, which has no integer kernel"
            return "idle", "nothing", reason, "leave the site out, by exclude in the rule file"
        if not dequantized:
            return "idle", name, f"another input of the {node.op_type} comes from no DequantizeLinear", both
        return "idle", name, f"the output of the {node.op_type} is not quantized, or not only", both

    def _product(self, product: Product) -> tuple[str, tuple[Pair, ...] | None, str, str]:
        """The fusion, the pairs that stand in its way (``None``: nothing does), the reason, the remedy."""
        node = product.node
        if node.op_type == "Einsum":
            return "integer GEMM", (), "Einsum has no integer kernel", "leave the site out, by exclude"
        fusion = {"Gemm": "QGemm", "Conv": "QLinearConv"}.get(node.op_type, "MatMulIntegerToFloat")
        open_ends = [operand for operand in product.operands if operand.pair is None]
        if open_ends:
            return fusion, (), *_open_end(product, open_ends[0])
        if node.op_type != "MatMul":
            return fusion, *self._gemm(product)
        return self._matmul(product)

    def _gemm(self, product: Product) -> tuple[tuple[Pair, ...] | None, str, str]:
        node = product.node
        bias = self.placement.operand(node.inputs[2] if len(node.inputs) > 2 else None)
        if bias.source is not None and (bias.pair is None or bias.pair.integers != "int32"):
            what = f"the bias of the {node.op_type} is float; only one in int32 from a DequantizeLinear is taken"
            return (), what, "export again: export_onnx writes MatMul and Add"
        if node.op_type == "Conv" and not _only_quantized(node):
            return (
                (),
                "QLinearConv needs a Q behind, and the output of the Conv stays float",
                "leave it out, by exclude",
            )
        return None, "all of its inputs come straight from a DequantizeLinear", ""

    def _matmul(self, product: Product) -> tuple[str, tuple[Pair, ...] | None, str, str]:
        left, right = product.operands
        assert left.pair is not None
        assert right.pair is not None
        fusion = "MatMulIntegerToFloat"
        columns = None if right.source is None or right.source.shape is None else len(right.source.shape) - 1
        if left.axis is not None or right.axis not in (None, columns):
            guilty = left.pair if left.axis is not None else right.pair
            reason = "its scales are not along the output's columns; ONNX Runtime multiplies by them as if they were"
            return fusion, (guilty,), f"{reason}: wrong values", "axis: null for activations, axis: 0 for weights"
        if problem := self._signed(left, right):
            return fusion, *problem
        behind = self._behind(product.node, left.pair)
        if isinstance(behind, str):
            return "QLinearMatMul", self._above(product.node), behind, "leave that site out, by exclude"
        reason = "both of its inputs come straight from a DequantizeLinear"
        if behind:
            return "QLinearMatMul", None, f"{reason}, and its output is quantized", ""
        return fusion, None, reason, ""

    def _signed(self, left: Operand, right: Operand) -> tuple[tuple[Pair, ...], str, str] | None:
        """Why an int8 first operand keeps the MatMul in float."""
        pair = left.pair
        assert pair is not None
        assert right.pair is not None
        if pair.integers != "int8":
            return None
        if not self.x86:
            if right.pair.integers == "int8":
                return None
            return (right.pair,), "its first operand is int8 and this one is not", "activations='int8'"
        if pair.quantize is None:
            reason = "its first input is stored as int8, and x86 rewrites to uint8 only what a QuantizeLinear gives"
            return (pair,), reason, "compute the product of constants ahead, or leave both sites out, by exclude"
        if left.moves:  # a pair that is moved is a pair of its own
            return None
        if not pair.explicit or len(pair.quantize.inputs) < 3:
            return (pair,), "int8 without a zero point, which x86 needs to rewrite it to uint8", "export it again"
        count = sum(len(tuple(use.node.outputs[0].uses())) for use in pair.quantize.outputs[0].uses())
        if count > 1:
            reason = (
                f"int8 on x86 is rewritten to uint8 only where one node reads the pair, and {count} do (queries, keys "
                "and values share theirs, and so does a residual add)"
            )
            return (pair,), reason, "export_onnx(..., activations='uint8'), the default on x86"
        return None

    def _above(self, node: ir.Node) -> tuple[Pair, ...]:
        readers = {use.node for use in node.outputs[0].uses()}
        return tuple(pair for pair in self.placement.pairs if pair.quantize in readers)

    def _behind(self, node: ir.Node, left: Pair) -> bool | str:
        """Whether a Q follows the MatMul, which may then take it in; or why it may not."""
        value = node.outputs[0]
        uses = list(value.uses())
        quantized = [use.node for use in uses if use.node.op_type == "QuantizeLinear"]
        if quantized and (len(uses) > 1 or value.is_graph_output()):
            others = "it is an output of the model, too" if value.is_graph_output() else "others read it, too"
            return f"a Q stands right behind the MatMul, and {others}"
        while (
            len(uses) == 1 and not value.is_graph_output() and uses[0].node.op_type in self.moves and uses[0].idx == 0
        ):
            value = uses[0].node.outputs[0]
            uses = list(value.uses())
        if len(uses) != 1 or uses[0].node.op_type != "QuantizeLinear" or value.is_graph_output():
            return False
        behind = next((pair for pair in self.placement.pairs if pair.quantize is uses[0].node), None)
        if behind is not None and not self.x86 and behind.integers != left.integers:
            return f"the MatMul reads {left.integers} and is quantized to {behind.integers}"
        return True

    def whole(self) -> Iterator[Finding]:
        """See the base."""
        remedy = "in the rule file: share: [{sites: [...], why: one range}]"
        yield from self.requantized(
            "idle", "one QuantizeLinear for all readers", "each with a QuantizeLinear of its own", remedy
        )
        yield from self.left_out("neither input comes from a DequantizeLinear; they run in float")
        unsigned = any(pair.integers == "uint8" for product in self.placement.matmuls for pair in product.pairs)
        if unsigned and self.x86:
            yield Finding(
                "note",
                "uint8 times int8 on x86",
                "CPUs without VNNI (Intel before Cascade Lake, AMD before Zen 4) add products in 16 bits, which "
                "full-range weights overflow; activations='int8' is rewritten to the same kernels",
                "on such a CPU: session option session.x64quantprecision = 1 (slower and exact)",
            )
        yield Finding(
            "note",
            "CUDA",
            "these are fusions of the CPU; the CUDA provider makes none, and runs Q/DQ slower than float",
            "for NVIDIA GPUs: export_onnx(..., target='tensorrt')",
        )


def _open_end(product: Product, operand: Operand) -> tuple[str, str]:
    """The reason and the remedy, for an operand that comes from no pair."""
    above = None if operand.source is None else operand.source.producer()
    which = "first" if operand is product.operands[0] else "second"
    between = None
    if above is not None and any(
        value is not None and (node := value.producer()) is not None and node.op_type == "DequantizeLinear"
        for value in above.inputs
    ):
        between = f"a {above.op_type} stands between its {which} input and the DequantizeLinear"
    reason = between or f"its {which} input comes from no DequantizeLinear"
    if not operand.constant and product.node.op_type == "MatMul" and product.weighted:
        reason += "; the weight may become MatMulNBits: stored in 8 bits, multiplied in float"
    return reason, "quantize both inputs of the GEMM, or neither" if between is None else "take it out from between"


def _only_quantized(node: ir.Node) -> bool:
    uses = [use.node for value in node.outputs for use in value.uses()]
    return (
        bool(uses)
        and all(each.op_type == "QuantizeLinear" for each in uses)
        and not any(value.is_graph_output() for value in node.outputs)
    )


def _equal(one: Pair, other: Pair) -> bool:
    """Whether two pairs have the same grid."""
    scales, points = (one.scale, other.scale), (one.zero_point, other.zero_point)
    if scales[0] is None or scales[1] is None or one.integers != other.integers:
        return False
    alike = scales[0].tobytes() == scales[1].tobytes()
    return alike and (None if points[0] is None else points[0].tobytes()) == (
        None if points[1] is None else points[1].tobytes()
    )
