"""What TensorRT makes of Q/DQ pairs, by its own guides: no engine is built here.

Sources: the pages on explicit quantization and on fused attention of the TensorRT documentation, and its maintainers in
NVIDIA/TensorRT#2981 and #4167 (INT8 fused attention), #3243 (where Q/DQ go), #1992 and #3270 (residual adds). TensorRT
may still decide otherwise by timing: ``receipt`` reads what it did.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from qdq_surgery.onnx_graph.findings import Finding
from qdq_surgery.onnx_graph.graph import Attention, OnnxGraph, Residual
from qdq_surgery.onnx_graph.products import Product
from qdq_surgery.onnx_graph.qdq_pairs import Operand, Pair
from qdq_surgery.targets.lint_rules import LintRules, Verdict

__all__ = ["HEAD_SIZES", "LONGEST", "Rules"]

#: INT8 fused attention takes heads of these sizes, and sequences up to this length.
HEAD_SIZES = (16, 32, 64)
LONGEST = 512

_GEMM, _ATTENTION = "INT8 GEMM", "INT8 fused attention"
_ADD = "residual add fused into the GEMM before it"
_ACTIVATIONS = ("Gelu", "Erf", "Relu", "Tanh", "Sigmoid", "Div", "Mul", "Pow")
_HALF_SCALES = 19


class Rules(LintRules):
    """What TensorRT does, by its guides."""

    moves = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity")

    def __init__(self, placement: OnnxGraph, opset: int) -> None:
        super().__init__(placement, opset)
        self.problems = {attention.scores.node: self._problems(attention) for attention in placement.attentions}

    def refusal(self, pair: Pair) -> tuple[str, str, str] | None:
        """See the base."""
        problem = _grid_problem(pair)
        return None if problem is None else ("any INT8 kernel", *problem)

    def operator(self, pair: Pair, node: ir.Node) -> Verdict:
        """See the base."""
        residual = self.residuals.get(node)
        if residual is not None:
            return _residual(pair, residual)
        remedy = "leave the site out, by exclude in the rule file"
        behind = self._fused_behind(pair, node)
        if behind is not None:
            reason = "a Q/DQ right on a GEMM's output ends the kernel there, and rounds what it would hand on in float"
            return "blocks", behind, reason, remedy
        return "idle", "nothing", f"read by {node.op_type}, which is computed in float", remedy

    def _fused_behind(self, pair: Pair, node: ir.Node) -> str | None:
        """What a GEMM would have taken in behind it, were the pair not between."""
        if pair.quantize is None or self.placement.gemm_behind(pair.value) is None:
            return None
        if node.op_type == "Add":
            return "bias fused into the GEMM before it"
        return "activation fused into the GEMM before it" if node.op_type in _ACTIVATIONS else None

    def product(self, pair: Pair, product: Product) -> Verdict:
        """See the base."""
        node = product.node
        if product.constant:
            return "idle", "nothing", "the product of two constants is computed once, when the engine is built", ""
        if node.op_type == "Einsum":
            return (
                "blocks",
                _GEMM,
                "Einsum is computed in float only",
                "leave the site out, by exclude in the rule file",
            )
        for which, operand in zip(("first", "second"), product.operands, strict=True):
            if operand.pair is None:
                reason = f"its {which} input {_why_open(operand)}; a GEMM needs Q/DQ on both"
                return "blocks", _GEMM, reason, "quantize both inputs of the GEMM, or neither"
            if operand.axis is not None and operand.axis != _channels(node, operand):
                if operand.pair is pair:
                    reason = "its scales are along what is summed over; only one for each output channel is taken"
                    return "blocks", _GEMM, reason, "axis: 0 in the weights' spec"
                return "idle", _GEMM, f"the scales of its {which} input are along what is summed over", ""
        attention = self.attentions.get(node)
        if attention is not None and not self.problems[attention.scores.node]:
            reason = "all of its conditions hold"
            if any(each.op_type == "Reshape" for each in attention.between):
                reason += ", but a Reshape between scores and softmax, of which the guides say nothing"
            return "enables", _ATTENTION, reason, ""
        return "enables", _GEMM if product.weighted else f"{_GEMM} (batched)", "both inputs have Q/DQ", ""

    def _problems(self, attention: Attention) -> list[tuple[str, str]]:
        """What keeps an attention from one INT8 kernel, each with its remedy."""
        q, k, a, v = (operand.pair for operand in (*attention.scores.operands, *attention.context.operands))
        places: dict[str, tuple[Pair | None, ...]] = {
            "before the first product": (q, k),
            "behind the softmax and on the values": (a, v),
        }
        places["behind the second product (the output projection's input)"] = (attention.output,)
        missing = [place for place, pairs in places.items() if None in pairs]
        found: list[tuple[str, str]] = []
        if missing:
            found.append((f"no Q/DQ {', nor '.join(missing)}", "rules tensorrt, or any that extend qdqbert"))
        if any(node.op_type in ("Mul", "Div") for node in attention.between):
            reason = "the scores are scaled behind the first product, not before it"
            found.append((reason, "export again: export_onnx moves a constant factor into the queries"))
        size = self._head_size(attention)
        if size is not None and size not in HEAD_SIZES:
            remedy = (
                'exclude: [{sites: "matmul_*", why: "..."}] leaves it to the fused FP16 kernel; INT8 GEMMs remain else'
            )
            found.append((f"heads have {size} values; {_either(HEAD_SIZES)} are taken", remedy))
        tokens = _fixed(attention.context.node.outputs[0], -2)
        if tokens is not None and tokens > LONGEST:
            found.append((f"{tokens} tokens; up to {LONGEST} are taken", f"export for up to {LONGEST} tokens"))
        return found

    def _head_size(self, attention: Attention) -> int | None:
        size = _fixed(attention.context.node.outputs[0], -1)
        if size is not None:
            return size
        width, heads = self.placement.config.get("hidden_size"), self.placement.config.get("num_attention_heads")
        return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None

    def whole(self) -> Iterator[Finding]:
        """See the base."""
        for attention in self.placement.attentions:
            yield from self._attention(attention)
        for residual in self.placement.residuals:
            if residual.identity is None and residual.local is None:
                reason = "the residual input is float, so the GEMM hands on float and adds in float: slower, most exact"
                remedy = "rules tensorrt, which quantizes the residual input"
                yield Finding("note", _ADD, reason, remedy, nodes=(residual.node.name or "",))
        remedy = 'in the rule file: share: [{sites: ["..."], why: "one tensor, one scale"}]'
        clause = "and pairs are merged or moved only where the scales are equal"
        yield from self.requantized("blocks", "one Q for all readers", clause, remedy)
        yield from self._precision()
        yield from self._operators()
        yield from self.left_out("they run in the file's float")

    def _attention(self, attention: Attention) -> Iterator[Finding]:
        products = (attention.scores, attention.context)
        pairs = [pair for product in products for pair in product.pairs]
        nodes = tuple(product.node.name or "" for product in products)
        if not pairs:
            reason = "queries, keys, probabilities and values have no Q/DQ: the attention is fused in half precision"
            yield Finding("note", _ATTENTION, reason, "rules tensorrt, for INT8", nodes=nodes)
            return
        names = tuple(name for pair in pairs for name in pair.names)
        for reason, remedy in self.problems[attention.scores.node]:
            yield Finding("blocks", _ATTENTION, reason, remedy, names, nodes)
        longest = self.placement.config.get("max_position_embeddings")
        open_ended = _fixed(attention.context.node.outputs[0], -2) is None
        if not self.problems[attention.scores.node] and open_ended and isinstance(longest, int) and longest > LONGEST:
            reason = f"only for up to {LONGEST} tokens, and the model takes {longest}; longer is slower than FP16"
            yield Finding("note", _ATTENTION, reason, f"build the engine with --maxShapes of {LONGEST} tokens at most")

    def _precision(self) -> Iterator[Finding]:
        scales = [pair.dequantize.inputs[1] for pair in self.placement.pairs]
        kinds = {scale.dtype for scale in scales if scale is not None}
        if ir.DataType.FLOAT16 in kinds and self.opset < _HALF_SCALES:
            since = f"which QuantizeLinear takes from opset {_HALF_SCALES} on; this is {self.opset}"
            yield Finding("blocks", "any INT8 kernel", f"scales are half precision, {since}", f"opset={_HALF_SCALES}")
        if ir.DataType.FLOAT in kinds:
            reason = "networks are strongly typed: what is not INT8 runs in FP32, as the file says, and not in FP16"
            yield Finding("note", "half precision", reason, "export_onnx(..., target='tensorrt', precision='float16')")

    def _operators(self) -> Iterator[Finding]:
        nodes = [
            node for node in self.placement.graph if node.op_type.startswith("QLinear") or "Integer" in node.op_type
        ]
        if nodes:
            names = tuple(node.name or node.op_type for node in nodes)
            reason = f"{nodes[0].op_type} and its like are not read by TensorRT's parser"
            yield Finding("blocks", "the model", reason, "give it the file with Q/DQ, as exported", nodes=names)


def _grid_problem(pair: Pair) -> tuple[str, str] | None:
    if pair.integers == "int32":  # a bias
        return None
    if pair.integers != "int8" or not pair.symmetric:
        reason = f"the grid is {pair.integers} with a zero point other than 0; TensorRT's is int8 around 0"
        if pair.symmetric:
            reason = f"the grid is {pair.integers}; TensorRT's is int8"
        return reason, "export_onnx(..., target='tensorrt'), with unsigned: false in the specs"
    scale = pair.scale
    if scale is not None and not (scale > 0).all():
        return "a scale is 0 or less, which TensorRT refuses", "calibrate again; export writes no such scale"
    if pair.axis is not None and not pair.constant:
        return "activations have one scale for each channel; TensorRT takes one scale", "axis: null in their spec"
    return None


def _residual(pair: Pair, residual: Residual) -> Verdict:
    split = 'exclude: [{sites: "add_local_*", why: "the sum is made in the GEMM"}], or rules tensorrt'
    if residual.local is pair and residual.identity is not pair:
        reason = "the GEMM's own output is rounded before the add, which splits the kernel into two"
        return "blocks", _ADD, reason, f"in the rule file: {split}"
    if residual.local is not None:
        return "idle", _ADD, "no use while the other input of the add, the GEMM's output, has Q/DQ too", split
    if pair.site.scaled:
        reason = (
            "the residual input is INT8, and a product with a scale for each channel stands between it and the add, of "
            "which the guides say nothing"
        )
        return "note", _ADD, reason, "build the engine: receipt tells what became of it"
    return "enables", _ADD, "the residual input is INT8, the GEMM's own output is not rounded before the add", ""


def _why_open(operand: Operand) -> str:
    node = None if operand.source is None else operand.source.producer()
    above = [] if node is None else [value.producer() for value in node.inputs if value is not None]
    if node is not None and any(each is not None and each.op_type == "DequantizeLinear" for each in above):
        return f"comes through a {node.op_type}"
    return "has none"


def _channels(node: ir.Node, operand: Operand) -> int | None:
    """The axis of the output channels in a GEMM's weights."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if node.attributes.get_int("transB", False) else 1
    value = operand.source
    return None if value is None or value.shape is None else len(value.shape) - 1


def _fixed(value: ir.Value, axis: int) -> int | None:
    if value.shape is None or len(value.shape) < -axis:
        return None
    size = value.shape[axis]
    return size if isinstance(size, int) else None


def _either(numbers: tuple[int, ...]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"
