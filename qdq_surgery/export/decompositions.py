"""What torch decomposes before it translates a graph to ONNX, without a second trace where nothing much is to be done.

``torch.onnx.export`` takes an exported program apart by tracing all of it once more, operator by operator, the longer
half of an export. An encoder holds hardly anything to take apart: what casts, and names of operators that have another
one. These are replaced where they stand; a program with anything else in it is left to torch.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from qdq_surgery.safety.torch_private import OpOverload, to_copy

__all__ = ["decomposed_in_place"]

#: What torch translates as it is, or drops.
_TRANSLATED = frozenset(
    f"aten.{name}"
    for name in (
        "_assert_tensor_metadata.default abs.default add.Scalar add.Tensor amax.default arange.default "
        "arange.start argmax.default bitwise_not.default bmm.default cat.default ceil.default chunk.default "
        "clamp.default clone.default contiguous.default cos.default cumsum.default div.Scalar div.Tensor "
        "embedding.default eq.Scalar eq.Tensor exp.default expand.default full.default full_like.default "
        "gather.default ge.Scalar ge.Tensor gelu.default gt.Scalar gt.Tensor index.Tensor layer_norm.default "
        "le.Scalar le.Tensor linear.default log.default logical_not.default lt.Scalar lt.Tensor masked_fill.Scalar "
        "matmul.default mean.dim mul.Scalar mul.Tensor ne.Scalar ne.Tensor neg.default new_ones.default "
        "ones.default pad.default permute.default pow.Tensor_Scalar relu.default repeat.default reshape.default "
        "rsqrt.default scaled_dot_product_attention.default select.int sigmoid.default sign.default silu.default "
        "sin.default slice.Tensor softmax.int split.Tensor sqrt.default squeeze.dim sub.Scalar sub.Tensor "
        "sum.dim_IntList sym_size.int t.default tanh.default transpose.int unbind.int unsqueeze.default "
        "view.default where.ScalarOther where.self zeros.default zeros_like.default"
    ).split()
)

#: Operators by another name.
_SYNONYMS = {
    "aten.__and__.Tensor": torch.ops.aten.bitwise_and.Tensor,
    "aten.__or__.Tensor": torch.ops.aten.bitwise_or.Tensor,
    "aten.min.other": torch.ops.aten.minimum.default,
    "aten.max.other": torch.ops.aten.maximum.default,
}

#: What moves a tensor, or casts it.
_CASTS = frozenset({"aten.to.dtype", "aten.to.dtype_layout", "aten.to.device", "aten.to.other", "aten.type_as.default"})

#: What changes a tensor in place, by what makes a new one.
_IN_PLACE = {
    "aten.add_.Tensor": torch.ops.aten.add.Tensor,
    "aten.mul_.Tensor": torch.ops.aten.mul.Tensor,
    "aten.sub_.Tensor": torch.ops.aten.sub.Tensor,
}

#: Nothing but what it is given, where nothing is trained.
_DROPOUT = "aten.dropout.default"

#: What gives what it is given, or a copy of it. torch 2.11 fails where that is a constant, which gets a new name.
_SAME = frozenset({"aten.alias.default", "aten.detach_.default", "aten.lift_fresh_copy.default"})

#: Modules of functions on sizes, which are no operators.
_ON_SIZES = frozenset({"_operator", "math"})


def decomposed_in_place(program: ExportedProgram) -> ExportedProgram:
    """Let ``torch.onnx.export`` take this program without tracing it again, where that makes no difference.

    Returns:
        ``program``, which is changed when it is decomposed.
    """
    # torch.onnx asks the program itself to be decomposed; one that is asked in another way is decomposed by torch.
    vars(program)["run_decompositions"] = functools.partial(_decomposed, program)
    return program


def _decomposed(program: ExportedProgram, table: Mapping[Any, Any]) -> ExportedProgram:
    """The program without what ``table`` says how to take apart."""
    nodes = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    if not all(_is_simple(node, table) for node in nodes):
        made: ExportedProgram = ExportedProgram.run_decompositions(program, dict(table))
        return made
    for node in nodes:
        _simplify(node)
    program.graph_module.recompile()
    return program


def _is_simple(node: Node, table: Mapping[Any, Any]) -> bool:
    """Whether :func:`_simplify` leaves nothing of this node to be taken apart."""
    if not isinstance(node.target, OpOverload):
        return getattr(node.target, "__module__", None) in _ON_SIZES
    name = str(node.target)
    if name == _DROPOUT:
        return not node.args[2]
    if name in _IN_PLACE:
        return _is_alone(node)
    if name in _SYNONYMS or name in _CASTS or name in _SAME:
        return True
    # In another release torch may take apart what it translates in this one.
    return (name in _TRANSLATED or node.target.namespace == "onnx_symbolic") and node.target not in table


def _is_alone(node: Node) -> bool:
    """Whether nobody else sees the tensor that this node changes, and it would have this type as a new one, too."""
    given = node.args[0]
    if not isinstance(given, Node) or list(given.users) != [node] or not isinstance(given.target, OpOverload):
        return False
    name = str(given.target)
    # (Some give their argument itself, and no schema says so.)
    new = name not in {*_CASTS, *_SAME, _DROPOUT} and all(r.alias_info is None for r in given.target._schema.returns)
    others = (each.meta["val"] for each in node.all_input_nodes)
    return (new or name in _IN_PLACE) and all(
        not isinstance(each, Tensor) or each.dtype == given.meta["val"].dtype for each in others
    )


def _simplify(node: Node) -> None:
    name = str(node.target)
    if name in _SYNONYMS or name in _IN_PLACE:
        node.target = _SYNONYMS[name] if name in _SYNONYMS else _IN_PLACE[name]
    elif name == _DROPOUT or name in _SAME:
        _pass_on(node)
    elif name in _CASTS:
        given, dtype = node.args[0], node.meta["val"].dtype
        assert isinstance(given, Node)
        if given.meta["val"].dtype == dtype:
            _pass_on(node)
        else:
            node.target, node.args, node.kwargs = to_copy, (given,), {"dtype": dtype}


def _pass_on(node: Node) -> None:
    """What reads this node reads what it is given; but for an output, which has the node's name."""
    given = node.args[0]
    assert isinstance(given, Node)
    node.replace_all_uses_with(given, lambda user: user.op != "output")
    if node.users:
        node.target, node.args, node.kwargs = torch.ops.aten.clone.default, (given,), {}
    else:
        node.graph.erase_node(node)
