"""The receipt: what of a file runs in INT8, read from the graph that the runtime made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from qdq_surgery.errors import ExportError, ModelError, ReceiptError
from qdq_surgery.hf.config_facts import max_tokens
from qdq_surgery.onnx_file.opened import OnnxFile, open_exported
from qdq_surgery.onnx_graph.executed import Executed, Kernel, Leftover
from qdq_surgery.onnx_graph.graph import OnnxGraph
from qdq_surgery.onnx_graph.products import FACTORS, KINDS, Product
from qdq_surgery.prove.multiply_adds import count_multiply_adds
from qdq_surgery.targets.registry import DEFAULT, TARGETS, computed_in
from qdq_surgery.targets.target import Layers
from qdq_surgery.text.layer_names import star_numbers
from qdq_surgery.text.view import Column, Line, Part, Result, Table, line, number

__all__ = ["Gemm", "Leftover", "Receipt", "receipt"]

#: Tokens of the text that multiply-adds are counted for.
_TOKENS = 128

#: What floats may be off by when a share is put into words.
_ROUNDING = 1e-6

_WORDS = {
    "linear": "linears of the encoder",
    "attention": "products of the attention",
    "head": "head",
    "other": "others",
}


@dataclass(frozen=True)
class Gemm:
    """One matrix product of the file, and how it runs.

    Attributes:
        name: Of its node in the file.
        module: Path of its module in PyTorch; empty if it is not known.
        kind: ``"linear"``: of the encoder, or with a quantized weight. ``"attention"``: of two activations. ``"head"``:
            behind the encoder. ``"other"``.
        macs: Its multiply-adds in one run; 0 if it is computed once, when the file is opened.
        executed: The runtime's kernel and types, in its words.
        int8: Whether it multiplies integers by integers.
        reason: Why not, in words; ``None`` if it does, or if it is computed once.
    """

    name: str
    module: str
    kind: str
    macs: int
    executed: str
    int8: bool
    reason: str | None


@dataclass(frozen=True, repr=False)
class Receipt(Result):
    """What of a file runs in INT8 on one runtime.

    Attributes:
        path: The file; of a frozen model the name of its class.
        runtime: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"``; ``"pytorch"`` of a frozen model.
        version: Of the runtime; empty for TensorRT, whose layers do not tell.
        shape: Batch and tokens that the multiply-adds are for.
        gemms: All products of the file, in its order.
        leftover: Q/DQ that the runtime still computes, and that no integer kernel needs.
        steps: Quantizers whose rounding is a pass of its own in front of an integer kernel: work that has to be, but
            that other runtimes merge into the kernel before it.
        unclaimed: Products of the runtime that belong to none of the file.
    """

    path: Path
    runtime: str
    version: str
    shape: tuple[int, int]
    gemms: tuple[Gemm, ...]
    leftover: tuple[Leftover, ...]
    steps: tuple[str, ...]
    unclaimed: tuple[str, ...] = ()

    def share(self, kind: str | None = None) -> float | None:
        """Multiply-adds in INT8 over all, of one kind of product or of all; ``None`` if the file has none."""
        of = [gemm for gemm in self.gemms if kind in (None, gemm.kind)]
        total = sum(gemm.macs for gemm in of)
        return sum(gemm.macs for gemm in of if gemm.int8) / total if total else None

    @property
    def total(self) -> float | None:
        """Share of all multiply-adds in INT8."""
        return self.share()

    @property
    def linear(self) -> float | None:
        """Share of the multiply-adds of the encoder's linears in INT8."""
        return self.share("linear")

    @property
    def attention(self) -> float | None:
        """Share of the multiply-adds of the attention's products in INT8."""
        return self.share("attention")

    @property
    def exceptions(self) -> tuple[Gemm, ...]:
        """All products that do not run in INT8."""
        return tuple(gemm for gemm in self.gemms if gemm.reason is not None)

    def require(self, linear: float | None = 1.0, total: float | None = None, leftover: int | None = 0) -> None:
        """Nothing, if the runtime does what is asked for.

        Args:
            linear: The least share of the encoder's linears in INT8, 0 to 1; ``None`` asks for nothing.
            total: The least share of all multiply-adds.
            leftover: How many Q/DQ may be left over.

        Raises:
            ReceiptError: Names everything that is in the way.
        """
        found: list[str] = []
        for kind, least, words in (("linear", linear, "the encoder's linear"), (None, total, "all")):
            share = self.share(kind)
            if least is None or (share is not None and share >= least):
                continue
            has = "there are none" if share is None else f"{_percent(share, 4)} run in INT8"
            found.append(f"of {words} multiply-adds {has}, and {_percent(least, 4)} are asked for")
            found += [f"  {gemm.name}: {gemm.reason}" for gemm in self.exceptions if kind in (None, gemm.kind)]
        if leftover is not None and len(self.leftover) > leftover:
            found.append(f"{len(self.leftover)} Q/DQ are left over, and {leftover} are allowed")
            found += [f"  {', '.join(each.quantizers) or each.node}: {each.why}" for each in self.leftover]
        if found:
            raise ReceiptError("\n".join([f"{self.path} on {self._where()}:", *found]))

    def to_json(self) -> dict[str, Any]:
        """The receipt as plain data; ``schema`` is the version of this form."""
        return {
            "schema": 1,
            "path": str(self.path),
            "runtime": self.runtime,
            "version": self.version,
            "shape": list(self.shape),
            "shares": {"total": self.total, **{kind: self.share(kind) for kind in KINDS}},
            "gemms": [asdict(gemm) for gemm in self.gemms],
            "exceptions": [gemm.name for gemm in self.exceptions],
            "leftover": [{**asdict(each), "quantizers": list(each.quantizers)} for each in self.leftover],
            "steps": list(self.steps),
            "unclaimed": list(self.unclaimed),
        }

    def _title(self) -> Line:
        batch, tokens = self.shape
        return line((self.path.name, "bold"), f" on {self._where()}, {batch} x {tokens} tokens")

    def _parts(self) -> Iterable[Part]:
        yield self._shares()
        if self.exceptions:
            yield self._exceptions()
        if self.leftover:
            yield self._leftover()
        once = sum(not gemm.int8 and gemm.reason is None for gemm in self.gemms)
        if once:
            yield f"{once} of the products are computed once, when the file is opened"
        if self.steps:
            yield f"{len(self.steps)} quantizers are a pass of their own in front of an integer kernel"
        if self.unclaimed:
            yield f"not in the file, but run: {', '.join(self.unclaimed)}"

    def _where(self) -> str:
        return f"{self.runtime} {self.version}".strip()

    def _shares(self) -> Table:
        rows = []
        for kind in (*KINDS, None):
            of = [gemm for gemm in self.gemms if kind in (None, gemm.kind)]
            share = self.share(kind)
            if of:
                done = str(sum(gemm.int8 for gemm in of))
                macs = f"{sum(gemm.macs for gemm in of) / 1e6:,.1f} M"
                words = "all" if kind is None else _WORDS[kind]
                rows.append((words, str(len(of)), done, macs, "" if share is None else _percent(share)))
        counts = map(number, ("products", "in INT8", "multiply-adds", "share in INT8"))
        return Table((Column(""), *counts), tuple(rows))

    def _exceptions(self) -> Table:
        rows = []
        every = sum(gemm.macs for gemm in self.gemms)
        for (name, reason), group in _grouped(
            (star_numbers(gemm.name), star_numbers(gemm.reason or ""), gemm) for gemm in self.exceptions
        ):
            share = _percent(sum(gemm.macs for gemm in group) / every) if every else ""
            runs = ", ".join(dict.fromkeys(gemm.executed for gemm in group))
            rows.append((name, str(len(group)), share, runs, reason))
        counts = map(number, ("products", "multiply-adds"))
        return Table((Column("not in INT8"), *counts, Column("runs as"), Column("why")), tuple(rows))

    def _leftover(self) -> Table:
        named = (
            (star_numbers(", ".join(each.quantizers) or each.node), star_numbers(each.why), each)
            for each in self.leftover
        )
        rows = tuple((name, str(len(group)), why) for (name, why), group in _grouped(named))
        return Table((Column("left over"), number("places"), Column("why")), rows)


def receipt(
    path: str | Path,
    runtime: str | None = None,
    *,
    shape: tuple[int, int] | None = None,
    layers: Layers | None = None,
    precision: str | None = None,
) -> Receipt:
    """Open the graph that a runtime makes of a file, and say what of it runs in INT8.

    Args:
        path: A file that :func:`~qdq_surgery.export_onnx` wrote.
        runtime: ``"onnxruntime"`` or ``"openvino"``, which open the file on the CPU, or ``"tensorrt"``; the one that
            the file was made for if left out.
        shape: Batch and tokens to count multiply-adds for; (1, 128) if left out, or what the model takes. A file with
            fixed axes is counted as it is; a model that takes several choices gets two.
        layers: For TensorRT, what ``trtexec --exportLayerInfo=layers.json --profilingVerbosity=detailed`` wrote when it
            built the engine: the path, or the data.
        precision: For OpenVINO, what is not INT8 is computed in, as in :func:`~qdq_surgery.load_onnx`.

    Returns:
        Every product of the model with the kernel that runs it, and the share of the multiply-adds that is in INT8.

    Raises:
        ExportError: The file was not written by ``export_onnx``, or ``layers`` are not what TensorRT writes.
        ModelError: There is no such runtime, it is not installed, it cannot open the file, or the model does not take
            that shape.
    """
    if shape is not None and (len(shape) != 2 or min(shape) < 1):
        raise ModelError(f"shape is {shape}; give batch and tokens, such as (1, 128)")
    file = open_exported(path)
    graph = OnnxGraph(file)
    _check_countable(graph)
    asked = runtime or (_built() if layers is not None else file.metadata.get("target", DEFAULT))
    executed = _executed(graph, asked, layers, precision)
    macs, counted = count_multiply_adds(graph, shape or (1, min(_TOKENS, _longest(file) or _TOKENS)))
    return Receipt(
        graph.path,
        asked,
        executed.version,
        counted,
        tuple(_gemm(graph, gemm, executed.kernels[gemm.name], macs[gemm.name], asked) for gemm in graph.products),
        tuple(executed.leftover),
        tuple(executed.steps),
        tuple(executed.unclaimed),
    )


def _check_countable(graph: OnnxGraph) -> None:
    nested = [node.name for node in graph.graph if any(each.type.name == "GRAPH" for each in node.attributes.values())]
    functions = [function.name for function in graph.file.model.functions.values()]
    if nested or functions:
        where = f"the branch or loop '{nested[0]}'" if nested else f"the function '{functions[0]}'"
        raise ExportError(f"{graph.path} has {where}, in which a receipt cannot count; export the model again")
    unnamed = [node for node in graph.graph if node.op_type in FACTORS and not node.name]
    if unnamed or len(graph.nodes) != len(graph.graph):
        raise ExportError(f"{graph.path} has nodes without a name of their own; export the model again")


def _longest(file: OnnxFile) -> int | None:
    config = file.config.get("text_config") or file.config  # of a model of texts and images, the texts'
    pad = config.get("pad_token_id") or 0
    return max_tokens(SimpleNamespace(**{"model_type": "", **config, "pad_token_id": pad}))


def _built() -> str:
    """The runtime whose engines are built elsewhere, and have layers."""
    return next(name for name, target in TARGETS.items() if target.session is None)


def _executed(graph: OnnxGraph, runtime: str, layers: Layers | None, precision: str | None) -> Executed:
    if runtime not in TARGETS:
        raise ModelError(f"there is no runtime '{runtime}'; use {', '.join(map(repr, TARGETS))}")
    target = TARGETS[runtime]
    if layers is not None and target.session is not None:
        owner = TARGETS[_built()].title
        raise ModelError(f"layers are of {owner}; {runtime} opens the file itself, so leave them out")
    return target.executed(graph, computed_in(runtime, precision), layers)


def _gemm(graph: OnnxGraph, gemm: Product, kernel: Kernel, macs: int, runtime: str) -> Gemm:
    fixed = kernel.precision == "constant"
    fine = fixed or kernel.precision == "int8"
    reason = None if fine else _reason(graph, gemm, kernel, runtime)
    return Gemm(gemm.name, gemm.module, gemm.kind, 0 if fixed else macs, kernel.executed, not fixed and fine, reason)


def _reason(graph: OnnxGraph, gemm: Product, kernel: Kernel, runtime: str) -> str:
    if kernel.precision in ("unknown", "hidden"):
        return f"cannot be told, so it does not count: {kernel.why}"
    lost = graph.lost(gemm.module)
    if lost:
        return f"not quantized: the pair of {', '.join(lost)} is listed, and is not in the file"
    quantizers = [site.name for site in gemm.sites if site is not None]
    if not quantizers:
        return "not quantized: no quantizer on its inputs"
    if len(quantizers) < len(gemm.sites):
        return f"not quantized: of its inputs only {', '.join(quantizers)} is"
    if kernel.precision == "weights":
        return f"quantized, but {runtime} takes only the weight in INT8"
    return f"quantized, but float in {runtime}"


def _percent(share: float, digits: int = 1) -> str:
    """Rounded down, so that 100 % are all."""
    return f"{math.floor(100 * share * 10**digits + _ROUNDING) / 10**digits:.{digits}f} %"


def _grouped(rows: Iterable[tuple[str, Any, Any]]) -> Sequence[tuple[tuple[str, Any], list[Any]]]:
    """Rows of the same words, with what they are of."""
    groups: dict[tuple[str, Any], list[Any]] = {}
    for name, why, each in rows:
        groups.setdefault((name, why), []).append(each)
    return list(groups.items())
