"""A block graph as a function: compiled to Python, with the guards that say which calls it holds for."""

from __future__ import annotations

import itertools
import linecache
import re
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import SELF, BlockGraph, Leaf
from qdq_surgery.safety.torch_private import set_grad_enabled
from qdq_surgery.safety.untrusted import quoted

__all__ = ["CompiledGraph", "compile_graph"]

#: What may stand in generated source: an identifier, or the number of a module in a list.
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9]+", re.ASCII)

_LABELS = itertools.count()


@dataclass(frozen=True, eq=False)
class CompiledGraph:
    """One compiled graph and what it holds for.

    Attributes:
        signature, paths: Description and path of each argument leaf.
        reads: Plain attributes that decided something: path of the module below the block, name, value.
        autocast: Whether autocast was on, and to what, if a dtype was asked for.
        wanted: Which argument leaves the function takes.
        decides: Whether the graph checks decisions, so that a run may end before its end.
        switches: Whether the graph switches gradients on or off, which a run that ends early must not leave so.
        source: The generated Python, for whoever debugs it.
    """

    signature: tuple[Leaf, ...]
    paths: tuple[str, ...]
    reads: tuple[tuple[str, str, Any], ...]
    autocast: tuple[bool, torch.dtype] | None
    wanted: tuple[int, ...]
    takes_self: bool
    decides: bool
    switches: bool
    function: Callable[..., Any]
    source: str

    def guards_hold(self, module: nn.Module, signature: tuple[Leaf, ...], paths: tuple[str, ...]) -> bool:
        """Whether the graph is that of a call of ``module`` with arguments of these descriptions and paths."""
        if signature != self.signature or paths != self.paths:
            return False
        for path, name, value in self.reads:
            owner = module if not path else module.get_submodule(path)
            if getattr(owner, name) != value:
                return False
        return self.autocast is None or self.autocast == _autocast(self.signature)

    def run(self, module: nn.Module, values: list[Any]) -> Any:
        """What the forward of ``module`` returns for these argument leaves.

        Raises:
            DecisionChangedError: They would take another path through the forward.
        """
        inputs = [values[index] for index in self.wanted]
        if self.takes_self:
            inputs = [module, *inputs]
        if not self.switches:
            return self.function(module, *inputs)
        before = torch.is_grad_enabled()
        try:
            return self.function(module, *inputs)
        except BaseException:
            set_grad_enabled(before)
            raise


def compile_graph(routine: BlockGraph) -> CompiledGraph:
    """Compile the graph of ``routine``, with the quantizers that were put into it.

    Raises:
        TraceError: It has a name that cannot stand in source.
    """
    graph = routine.graph
    _check_names(graph, type(routine.owner).__name__)
    code = graph.python_code("self")
    label = f"<qdq_surgery {type(routine.owner).__name__}.{routine.function} {next(_LABELS)}>"
    scope = dict(code.globals)
    exec(compile(code.src, label, "exec"), scope)
    # So that a traceback through the generated code shows its lines.
    linecache.cache[label] = (len(code.src), None, code.src.splitlines(keepends=True), label)
    positions = {
        node.name: index for index, node in enumerate(routine.inputs) if isinstance(node, Node) and node.target != SELF
    }
    names = [node.name for node in graph.nodes if node.op == "placeholder" and node.target != SELF]
    wanted = [positions[name] for name in names]
    variant = CompiledGraph(
        signature=routine.signature,
        paths=routine.argument_paths,
        reads=tuple((path, name, value) for (path, name), value in routine.reads.items()),
        autocast=_autocast(routine.signature) if routine.reads_dtype else None,
        wanted=tuple(wanted),
        decides=any(node.meta.get("op") == "expect" for node in graph.nodes),
        switches=any(node.meta.get("op") == "grad_mode" for node in graph.nodes),
        takes_self=any(node.op == "placeholder" and node.target == SELF for node in graph.nodes),
        function=scope["forward"],
        source=code.src,
    )
    weakref.finalize(variant, linecache.cache.pop, label, None)
    return variant


def _check_names(graph: Graph, owner: str) -> None:
    """The names of modules and arguments go into the source as they are: fx does not escape them."""
    for node in graph.nodes:
        path = "" if node.op == "call_function" else str(node.target)
        names = [*(path.split(".") if path else ()), *node.kwargs]
        for name in names:
            if not _WORD.fullmatch(name) or iskeyword(name):
                raise TraceError(f"{owner}: {quoted(name)} is a name that cannot stand in a graph; rename it")


def _autocast(signature: tuple[Leaf, ...]) -> tuple[bool, torch.dtype]:
    device = next((leaf[3].type for leaf in signature if leaf[0] == "tensor"), "cpu")
    return torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
