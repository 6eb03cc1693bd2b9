"""The receipt: what of a file runs in INT8, read from the graph that the runtime made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qdq_surgery.errors import ModelError, ReceiptError
from qdq_surgery.hf.config_facts import longest_text
from qdq_surgery.onnx_file.metadata import read_config
from qdq_surgery.onnx_graph.executed import Executed, Kernel, Leftover
from qdq_surgery.onnx_graph.products import KINDS, FileGemm, FileGraph
from qdq_surgery.prove.multiply_adds import count_multiply_adds
from qdq_surgery.targets.registry import DEFAULT, TARGETS, computed_in
from qdq_surgery.targets.target import Layers
from qdq_surgery.text.render import Rendered

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


@dataclass(frozen=True)
class Receipt(Rendered):
    """What of a file runs in INT8 on one runtime.

    Attributes:
        path: The file.
        runtime: ``"onnxruntime"``, ``"openvino"`` or ``"tensorrt"``.
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

    def __rich__(self) -> RenderableType:
        batch, tokens = self.shape
        parts: list[RenderableType] = [
            Text.assemble((self.path.name, "bold"), f" on {self._where()}, {batch} x {tokens} tokens"),
            self._shares(),
        ]
        if self.exceptions:
            parts.append(self._exceptions())
        if self.leftover:
            parts.append(self._leftover())
        once = sum(not gemm.int8 and gemm.reason is None for gemm in self.gemms)
        if once:
            parts.append(Text(f"{once} of the products are computed once, when the file is opened"))
        if self.steps:
            parts.append(Text(f"{len(self.steps)} quantizers are a pass of their own in front of an integer kernel"))
        if self.unclaimed:
            parts.append(Text(f"not in the file, but run: {', '.join(self.unclaimed)}"))
        return Group(*parts)

    def _where(self) -> str:
        return f"{self.runtime} {self.version}".strip()

    def _shares(self) -> Table:
        table = _table("", "products", "in INT8", "multiply-adds", "share in INT8")
        for kind in (*KINDS, None):
            of = [gemm for gemm in self.gemms if kind in (None, gemm.kind)]
            share = self.share(kind)
            if of:
                done = str(sum(gemm.int8 for gemm in of))
                macs = f"{sum(gemm.macs for gemm in of) / 1e6:,.1f} M"
                words = "all" if kind is None else _WORDS[kind]
                table.add_row(words, str(len(of)), done, macs, "" if share is None else _percent(share))
        return table

    def _exceptions(self) -> Table:
        table = _table("not in INT8", "products", "multiply-adds", "runs as", "why")
        every = sum(gemm.macs for gemm in self.gemms)
        for (name, reason), group in _grouped(
            (_starred(gemm.name), _starred(gemm.reason or ""), gemm) for gemm in self.exceptions
        ):
            share = _percent(sum(gemm.macs for gemm in group) / every) if every else ""
            runs = ", ".join(dict.fromkeys(gemm.executed for gemm in group))
            table.add_row(name, str(len(group)), share, runs, reason)
        return table

    def _leftover(self) -> Table:
        table = _table("left over", "places", "why")
        rows = ((_starred(", ".join(each.quantizers) or each.node), _starred(each.why), each) for each in self.leftover)
        for (name, why), group in _grouped(rows):
            table.add_row(name, str(len(group)), why)
        return table


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

    Raises:
        ExportError: The file was not written by ``export_onnx``, or ``layers`` are not what TensorRT writes.
        ModelError: There is no such runtime, it is not installed, it cannot open the file, or the model does not take
            that shape.
    """
    if shape is not None and (len(shape) != 2 or min(shape) < 1):
        raise ModelError(f"shape is {shape}; give batch and tokens, such as (1, 128)")
    graph = FileGraph(Path(path))
    asked = runtime or (_built() if layers is not None else graph.metadata.get("target", DEFAULT))
    executed = _executed(graph, asked, layers, precision)
    macs, counted = count_multiply_adds(graph, shape or (1, min(_TOKENS, _longest(graph) or _TOKENS)))
    return Receipt(
        graph.path,
        asked,
        executed.version,
        counted,
        tuple(_gemm(graph, gemm, executed.kernels[gemm.name], macs[gemm.name], asked) for gemm in graph.gemms),
        tuple(executed.leftover),
        tuple(executed.steps),
        tuple(executed.unclaimed),
    )


def _longest(graph: FileGraph) -> int | None:
    config = read_config(graph.metadata.get("config", "{}"), str(graph.path))
    pad = config.get("pad_token_id") or 0
    return longest_text(SimpleNamespace(**{"model_type": "", **config, "pad_token_id": pad}))


def _built() -> str:
    """The runtime whose engines are built elsewhere, and have layers."""
    return next(name for name, target in TARGETS.items() if target.session is None)


def _executed(graph: FileGraph, runtime: str, layers: Layers | None, precision: str | None) -> Executed:
    if runtime not in TARGETS:
        raise ModelError(f"there is no runtime '{runtime}'; use {', '.join(map(repr, TARGETS))}")
    target = TARGETS[runtime]
    if layers is not None and target.session is not None:
        owner = TARGETS[_built()].title
        raise ModelError(f"layers are of {owner}; {runtime} opens the file itself, so leave them out")
    return target.executed(graph, computed_in(runtime, precision), layers)


def _gemm(graph: FileGraph, gemm: FileGemm, kernel: Kernel, macs: int, runtime: str) -> Gemm:
    fixed = kernel.precision == "constant"
    fine = fixed or kernel.precision == "int8"
    reason = None if fine else _reason(graph, gemm, kernel, runtime)
    return Gemm(gemm.name, gemm.module, gemm.kind, 0 if fixed else macs, kernel.executed, not fixed and fine, reason)


def _reason(graph: FileGraph, gemm: FileGemm, kernel: Kernel, runtime: str) -> str:
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


def _starred(text: str) -> str:
    """Names without the numbers of layers and of repeated nodes."""
    return ".".join("*" if part.isdecimal() else part for part in text.split("."))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        number = column in ("products", "in INT8", "multiply-adds", "share in INT8", "places")
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table
