"""The layers that TensorRT runs: the JSON that a user's machine wrote when it built the engine.

    trtexec --onnx=model.onnx --exportLayerInfo=layers.json --profilingVerbosity=detailed ...

``IEngineInspector`` gives the same. Each layer has a name, a ``LayerType``, ``Inputs`` and ``Outputs`` with a
``Format/Datatype``, mostly a ``TacticName``, and ``Metadata`` with the file's nodes: ``[ONNX Layer: name]`` for each,
put together plainly or with the separators 0x1e and 0x1f. Types are words in TensorRT 10 (``Int8``, ``Half``) and were
sentences before (``Row major Int8 format``). Weights are mostly not among the inputs. Written from NVIDIA's
documentation and from listings in its issues (NVIDIA/TensorRT#3737, #4020, #4397); TensorRT itself was not at hand.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qdq_surgery.errors import ExportError, ModelError
from qdq_surgery.onnx_graph.executed import Executed, Kernel, Leftover, named
from qdq_surgery.onnx_graph.graph import OnnxGraph
from qdq_surgery.onnx_graph.products import Product
from qdq_surgery.onnx_graph.qdq_pairs import MOVES
from qdq_surgery.safety.untrusted import quoted, read_json_text, read_regular_file

__all__ = ["run_by_tensorrt"]

_HOW = "write it with trtexec --exportLayerInfo=layers.json --profilingVerbosity=detailed"
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_TYPE = re.compile(r"\b(int8|half|fp16|float16|float|fp32|float32|bf16|bfloat16|fp8|int4|fp4)\b", re.IGNORECASE)
#: Types that are no numbers to be multiplied: shapes, masks, indices.
_OTHER = re.compile(r"\b(int32|int64|bool|uint8)\b", re.IGNORECASE)
#: What is multiplied, in names such as sm80_xmma_gemm_i8f32_i8i32_f32_tn_n_tilesize128x128x64.
_TACTIC = re.compile(r"gemm(?:_[a-z]+)*?_(i8|s8|u8|e4m3|e5m2|bf16|f16|f32|tf32)")
_INTEGER = ("i8", "s8", "u8")
#: In the type or tactic of a layer that multiplies matrices; others only read or write a product's values.
_MULTIPLIES = re.compile(r"gemm|matmul|matrix ?multiply|conv|correlation|mha|fully ?connected|__myl_fc", re.IGNORECASE)
#: Most bytes of the JSON; BERT-large has about two million.
_LARGEST = 2**26
_ATTENTION = re.compile(r"mha", re.IGNORECASE)


@dataclass(frozen=True)
class _Layer:
    """One layer of the engine.

    Attributes:
        nodes: The file's nodes in it.
        types: Of the numbers among its inputs, in TensorRT's words.
    """

    name: str
    kind: str
    tactic: str
    nodes: tuple[str, ...]
    types: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        return any(_MULTIPLIES.search(text) for text in (self.kind, self.tactic, self.own_name))

    @property
    def own_name(self) -> str:
        """A name that TensorRT made up; others are made of the file's names, which may say anything."""
        return self.name if self.name.startswith("_") else ""

    @property
    def opaque(self) -> bool:
        """Everything that TensorRT 8 and 9 hand to another compiler, in one layer."""
        return "ForeignNode" in self.name or self.kind == "Myelin"

    def words(self) -> str:
        return f"{' x '.join(self.types) or 'no type'} in {self.kind or 'layer'} {self.name}"


def run_by_tensorrt(graph: OnnxGraph, _: object, layers: str | Path | Mapping[str, Any] | None) -> Executed:
    """What TensorRT made of the file.

    Args:
        layers: The JSON, as a file or as what ``json.loads`` makes of it.

    Raises:
        ExportError: It is no such JSON, it has names only, or it is of another file.
        ModelError: There is none.
    """
    if layers is None:
        raise ModelError(
            f"a receipt of TensorRT for {graph.path} needs layers=: the JSON of trtexec --exportLayerInfo=layers.json "
            "--profilingVerbosity=detailed, from where the engine is built"
        )
    found = _read(layers)
    known = {node for layer in found for node in layer.nodes}
    if not known & set(graph.nodes):
        raise ExportError(f"the layers are not of {graph.path}: none of its nodes is in their Metadata; {_HOW}")
    kernels = {gemm.name: _kernel(gemm, found) for gemm in graph.products}
    pairs = {name: site for site in graph.sites for name in (site.quantize, site.dequantize) if name}
    leftover: list[Leftover] = []
    steps: list[str] = []
    for layer in found:
        rounding = [node for node in layer.nodes if node in pairs]
        others = [graph.nodes[node].op_type for node in layer.nodes if node in graph.nodes and node not in pairs]
        if not rounding or not MOVES.issuperset(others):
            continue  # no quantizer, or one that is part of a kernel that does other work
        names = tuple(dict.fromkeys(name for node in rounding for name in named(pairs[node])))
        if any(graph.nodes[node].op_type == "DequantizeLinear" for node in rounding if node in graph.nodes):
            leftover.append(Leftover(names, layer.name, f"dequantizes in a layer of its own ({layer.kind})"))
        else:
            steps.append(names[0])
    return Executed("", kernels, leftover, steps)


def _kernel(gemm: Product, layers: list[_Layer]) -> Kernel:
    having = [layer for layer in layers if gemm.name in layer.nodes]
    if not having:
        if gemm.constant:
            return Kernel("constant", "computed when the engine is built")
        return Kernel("unknown", "not found", "no layer has it in its Metadata")
    working = [layer for layer in having if layer.multiplies] or having
    words = "; ".join(layer.words() for layer in working)
    if any(layer.opaque for layer in working):
        return Kernel(
            "hidden", words, f"inside {working[0].name}, which this TensorRT does not open; build with 10 or later"
        )
    if len(working) > 1 and not all(layer.multiplies for layer in working):
        return Kernel(
            "unknown", words, f"{len(working)} layers have it in their Metadata, and none says that it multiplies"
        )
    verdicts = {_integer(layer) for layer in working}
    if verdicts == {True}:
        return Kernel("int8", words)
    if verdicts == {False}:
        return Kernel("float", words)
    return Kernel("hidden", words, "Int8 and other types go in, and no tactic tells which of them are multiplied")


def _integer(layer: _Layer) -> bool | None:
    """Whether it multiplies integers; ``None`` if that cannot be told."""
    tactic = _TACTIC.search(layer.tactic)
    if tactic is not None:
        return tactic[1] in _INTEGER
    integers = [each.lower() == "int8" for each in layer.types]
    if all(integers):
        return True if integers else None
    if not any(integers):
        return False
    # Queries, keys and values, or all in one; what is left is the mask.
    return True if _ATTENTION.search(f"{layer.own_name} {layer.tactic}") and sum(integers) >= 3 else None


def _read(layers: str | Path | Mapping[str, Any]) -> list[_Layer]:
    what = "the layers" if isinstance(layers, Mapping) else str(layers)
    if isinstance(layers, Mapping):
        data: Any = layers
    else:
        try:
            content = read_regular_file(layers, _LARGEST)
        except OSError as error:
            raise ExportError(f"{what} cannot be read: {error.strerror or error}; {_HOW}") from error
        except ValueError as error:
            shown = quoted(what) if "\0" in what else what
            raise ExportError(f"{shown} cannot be read: {error}; {_HOW}") from error
        try:
            data = read_json_text(content.decode("utf-8"), where="it")
        except ValueError as error:
            raise ExportError(f"{what} is no JSON: {error}; {_HOW}") from error
    found = data.get("Layers") if isinstance(data, Mapping) else data
    if not isinstance(found, list) or not found:
        raise ExportError(f"{what} has no list 'Layers', so it is no layer information of TensorRT; {_HOW}")
    if any(isinstance(layer, str) for layer in found):
        raise ExportError(
            f"{what} holds the names of the layers only; build the engine with --profilingVerbosity=detailed "
            "(in Python, config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED), which is off by default"
        )
    made = [_layer(what, at, layer) for at, layer in enumerate(found)]
    if not any(layer.nodes for layer in made):
        raise ExportError(f"{what} has no layer with '[ONNX Layer: ...]' in its Metadata; use TensorRT 8.6 or later")
    return made


def _layer(what: str, at: int, layer: Any) -> _Layer:
    if not isinstance(layer, Mapping) or "Name" not in layer or not isinstance(layer.get("Inputs", []), list):
        raise ExportError(f"{what} has something else than a layer as number {at}: {quoted(layer)}; {_HOW}")
    for key in ("Name", "LayerType", "TacticName", "Metadata"):
        if not isinstance(layer.get(key, ""), str):
            raise ExportError(f"{what} has no text as '{key}' of layer number {at}: {quoted(layer[key])}; {_HOW}")
    return _Layer(
        layer["Name"],
        layer.get("LayerType", ""),
        layer.get("TacticName", ""),
        tuple(dict.fromkeys(_NODE.findall(layer.get("Metadata", "")))),
        tuple(_types(what, layer)),
    )


def _types(what: str, layer: Mapping[str, Any]) -> Iterator[str]:
    for value in layer.get("Inputs", []):
        told = value.get("Format/Datatype", value.get("Datatype")) if isinstance(value, Mapping) else None
        if not isinstance(told, str):
            raise ExportError(f"{what} does not tell the type of an input of layer {quoted(layer['Name'])}; {_HOW}")
        if (found := _TYPE.search(told)) is not None:
            yield found[1]
        elif not _OTHER.search(told):
            raise ExportError(
                f"{what} has the type {quoted(told)} in layer {quoted(layer['Name'])}, which is not known here"
            )
