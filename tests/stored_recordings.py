"""What is recorded of a model is kept while a process runs tests: models that are equal are recorded once in it.

A recording is nine tenths of a conversion. Here the two functions that look at a model are replaced by two that look
first whether an equal one was seen before: the same class, modules, attributes, configs and buffers, parameters of the
same kinds (a graph holds for all values of them), the same rules and examples. Plans are frozen, and graphs are given
away as copies, which conversion edits: all the rest of it is done every time. Whatever cannot be told from another (a
hook, a forward of its own) is recorded anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import types
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from qdq_surgery.graph.block_graph import PLAIN, BlockGraph
from qdq_surgery.match import analyze as real
from qdq_surgery.match.plan import Plan
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.trace.units import Survey

__all__ = ["fingerprint", "install"]

_MODULES = [
    importlib.import_module(f"qdq_surgery.{name}") for name in ("convert", "checkpoint.plugin", "qdqbert.classes")
]

_Recordings = dict[tuple[str, str], list[BlockGraph]]

#: Of a module and of a config: modules come by themselves, both modes are recorded with an attention of their own, and
#: no forward reads the rest, most of which loading leaves.
_IGNORED = frozenset(
    "_modules training name_or_path _name_or_path architectures dtype transformers_version quantization_config "
    "_is_hf_initialized _weight_conversions is_quantized quantization_method".split()
)

#: How many models are known at a time: what has been seen is mostly asked for soon.
_SIZE = 256


@dataclass
class _Seen:
    look: real.Look
    plan: Plan
    held: list[object]  # what the fingerprint knows by its id, which is one only while its object lives
    recordings: _Recordings | None = None


_store: OrderedDict[str, _Seen] = OrderedDict()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is undone, recordings come from the store."""
    for module in _MODULES:
        monkeypatch.setattr(module, "analyze", _analyze)
        monkeypatch.setattr(module, "recordings_of", _recordings_of)


def _analyze(
    model: PreTrainedModel, rules: RuleSet, example_inputs: Mapping[str, Any] | None
) -> tuple[real.Look, Plan]:
    held: list[object] = []
    key = fingerprint(model, rules, example_inputs, held)
    seen = None if key is None else _store.pop(key, None)
    if seen is None or seen.recordings is None:
        seen = _Seen(*real.analyze(model, rules, example_inputs), held)
    if key is not None:
        _store[key] = seen  # as the last
        while len(_store) > _SIZE:
            _store.popitem(last=False)
    return seen.look, seen.plan


def _recordings_of(model: PreTrainedModel, look: real.Look, plan: Plan) -> _Recordings:
    seen = next((each for each in reversed(_store.values()) if each.look is look), None)
    if seen is None:
        return real.recordings_of(model, look, plan)
    if seen.recordings is None:
        seen.recordings = _copies(real.recordings_of(model, look, plan))
        seen.look = real.Look({}, {}, Survey([]), Survey([]))  # it is known by its identity, and what is in it is large
    return _copies(seen.recordings)


def _copies(recordings: _Recordings) -> _Recordings:
    made: dict[int, BlockGraph] = {}  # layers that are alike share their graphs
    return {key: [_copy(each, made) for each in graphs] for key, graphs in recordings.items()}


def _copy(routine: BlockGraph, made: dict[int, BlockGraph]) -> BlockGraph:
    """The same graph again, down to the names that new nodes will get; without what calls it and what it calls."""
    if id(routine) not in made:
        values: dict[Node, Node] = {}
        graph = Graph()
        for node in routine.graph.nodes:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta.pop("callee", None)
        names, known = graph._graph_namespace, routine.graph._graph_namespace
        names._base_count, names._used_names = dict(known._base_count), set(known._used_names)
        inputs, output = map_arg((routine.inputs, routine.output), values.__getitem__)
        own = {"inputs": list(inputs), "output": output, "reads": dict(routine.reads)}
        made[id(routine)] = dataclasses.replace(routine, graph=graph, caller=None, call=None, children=[], **own)
    return made[id(routine)]


class _UnknownError(Exception):
    """The model holds something that cannot be compared."""


def fingerprint(model: Any, rules: RuleSet, example_inputs: Mapping[str, Any] | None, held: list[object]) -> str | None:
    """Of all that a recording depends on; ``None`` where there may be more.

    Args:
        held: Is given the classes and functions in it, which have to live as long as it is compared.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        made = _Fingerprint(held)
        for name, module in model.named_modules(remove_duplicate=False):
            made.add_module(name, module)
        made.add(rules, torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"))
        made.add_value(None if example_inputs is None else dict(example_inputs))
    except _UnknownError:
        return None
    return made.hash.hexdigest()


class _Fingerprint:
    def __init__(self, held: list[object]) -> None:
        self.hash = hashlib.sha256()
        self.held = held
        self.ids: dict[int, int] = {}  # what is shared inside one model is shared inside the other

    def add(self, *values: object) -> None:
        self.hash.update(repr(values).encode())

    def same(self, value: object) -> int:
        return self.ids.setdefault(id(value), len(self.ids))

    def add_object(self, value: object) -> None:
        """A class or a function: it is the very same, or another."""
        self.held.append(value)
        self.add(id(value))

    def add_module(self, name: str, module: nn.Module) -> None:
        self.add(name, self.same(module))
        self.add_object(type(module))
        for key, value in sorted(vars(module).items()):
            if key.endswith("_hooks") or "_hooks_" in key:
                if value:
                    raise _UnknownError
            elif key not in _IGNORED:
                self.add(key)
                self.add_value(value)

    def add_value(self, value: object) -> None:
        """Anything that an attribute of a module may be."""
        if isinstance(value, PLAIN):
            self.add(value)
        elif isinstance(value, Tensor):
            self._add_tensor(value)
        elif isinstance(value, nn.Module):
            self.add(self.same(value))
        elif isinstance(value, PreTrainedConfig):
            self.add_object(type(value))
            facts = {name: fact for name, fact in value.to_dict().items() if name not in _IGNORED}
            self.add(self.same(value), sorted(facts.items()))
        elif isinstance(value, GenerationConfig):
            self.add(value.to_json_string(use_diff=False))
        elif type(value) in (list, tuple, set, dict):
            self._add_items(value)
        elif isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
            self.add_object(value)
        else:
            raise _UnknownError

    def _add_items(self, value: Any) -> None:
        self.add(type(value), len(value))
        for item in value.items() if type(value) is dict else sorted(value) if type(value) is set else value:
            self.add_value(item)

    def _add_tensor(self, value: Tensor) -> None:
        if type(value) not in (Tensor, nn.Parameter) or value.device.type != "cpu" or value.layout != torch.strided:
            raise _UnknownError
        self.add(type(value), value.dtype, tuple(value.shape), value.stride(), value.requires_grad, self.same(value))
        if not isinstance(value, nn.Parameter):
            self.hash.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
