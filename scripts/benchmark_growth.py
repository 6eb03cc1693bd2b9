"""Cost as it grows: time and memory against batch, length, layers and width; prints the tables of docs/benchmarks.md.

    python scripts/benchmark_growth.py [--axis batch length layers width] [--rounds 5] [--threads 2]

One axis is varied at a time, from a BERT with random weights of 6 layers, width 384 (heads of 64) and 8 x 128 tokens.
Every figure comes from a process of its own that does nothing else: seconds, and by how many MB its memory grew at
most. Making is done once, conversion and calibration (two batches) by the rules ``onnxruntime``. What runs is timed as
the median of rounds (those that other processes disturb least, and fewer where a round takes seconds), and its memory
counts from before the model was loaded.

The limit is that of the products alone, by PyTorch's plain kernels, in turns with the run, with as many weights and of
the same shapes: oneDNN's INT8 linear with nothing before or behind it (attention's products, for which PyTorch has no
such kernel, at the same multiply-adds in a second), and ``torch.matmul`` where the run computes in float. The share is
the products' time by the time of the run: 100 % would be a model that is nothing but products. A runtime whose own
kernels are faster may pass it.
"""

from __future__ import annotations

import argparse
import importlib
import pickle
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from absl import logging as absl_logging
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs
from runtimes.timing import PATIENCE, Watch, interleaved

_HEAD = 64
_SECONDS = 20  # seconds for what runs at a point, of each kind
_FOUR = 4  # BERT's feed-forward width by its own

AXES = {
    "batch": (1, 4, 8, 16, 64),
    "length": (16, 64, 128, 256, 512),
    "layers": (1, 3, 6, 12),
    "width": (192, 384, 768),
}
RUNS = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO", "frozen": "frozen", "float": "float"}
_MAKING = ("convert", "calibrate", "export onnxruntime", "export openvino")

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Point:
    """A model and what it is given."""

    batch: int = 8
    length: int = 128
    layers: int = 6
    width: int = 384

    @property
    def name(self) -> str:
        """Of the model's files."""
        return f"{self.layers}x{self.width}"

    def model(self) -> BertModel:
        """The float model."""
        torch.manual_seed(0)
        sizes = {"hidden_size": self.width, "intermediate_size": _FOUR * self.width}
        config = BertConfig(num_hidden_layers=self.layers, num_attention_heads=self.width // _HEAD, **sizes)
        return BertModel(config).eval()

    def inputs(self) -> dict[str, Tensor]:
        """Tokens without padding."""
        ids = torch.randint(1000, 20000, (self.batch, self.length), generator=torch.Generator().manual_seed(0))
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def linears(self) -> list[tuple[int, int]]:
        """(in, out) of the linears of a layer."""
        return [(self.width, self.width)] * 4 + [(self.width, _FOUR * self.width), (_FOUR * self.width, self.width)]

    def adds(self) -> tuple[int, int]:
        """Multiply-adds of the linears, and of attention's products."""
        tokens = self.batch * self.length
        linear = self.layers * tokens * sum(wide * high for wide, high in self.linears())
        return linear, self.layers * 2 * tokens * self.length * self.width


@dataclass(frozen=True)
class Cost:
    """Seconds, MB at most, and the share of the cores that other processes took meanwhile."""

    seconds: float
    megabytes: float
    others: float


@dataclass(frozen=True)
class Run:
    """What runs: its cost, its share of the limit, and 10^9 multiply-adds in a second of its linears' plain kernel."""

    cost: Cost
    share: float
    speed: float


def _status(name: str) -> float:
    """A size in /proc/self/status, in MB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(each.split()[1]) for each in lines if each.startswith(f"{name}:")) * 1024 / 1e6


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # proc(5): resets VmHWM


def once(action: Callable[[], _Made]) -> tuple[_Made, Cost]:
    """Do something, and what it cost."""
    before, watch = _status("VmRSS"), Watch()
    _forget_peak()
    watch.start()
    start = time.perf_counter()
    made = action()
    return made, Cost(time.perf_counter() - start, _status("VmHWM") - before, watch.stop())


def quiet(threads: int) -> None:
    """In each process: nothing but results, and so many threads."""
    warnings.simplefilter("ignore")
    absl_logging.set_verbosity(absl_logging.ERROR)
    transformers_logging.set_verbosity_error()
    torch.set_num_threads(threads)


def making(point: Point, folder: Path | None) -> dict[str, Cost]:
    """Convert and calibrate; with a folder, write the model's files into it, too."""
    small = replace(point, layers=1, width=_HEAD, batch=1, length=8)
    qs.calibrate(qs.convert(small.model(), "onnxruntime"), [small.inputs()])  # imports and first calls
    if folder is not None:
        for target in ("onnx", "onnxscript", "onnxruntime", "openvino"):
            importlib.import_module(target)
    model, batches = point.model(), [point.inputs()] * 2
    qmodel, convert = once(lambda: qs.convert(model, "onnxruntime"))
    _, calibrate = once(lambda: qs.calibrate(qmodel, batches))
    costs = {"convert": convert, "calibrate": calibrate}
    if folder is not None:
        for target in ("onnxruntime", "openvino"):
            each = qs.convert(model, target)
            qs.calibrate(each, batches[:1])
            path = folder / f"{point.name}-{target}.onnx"
            costs[f"export {target}"] = _export(each, path, target)
        each = qs.convert(model, "pytorch")
        qs.calibrate(each, batches[:1])
        (folder / f"{point.name}-frozen.pickle").write_bytes(pickle.dumps(qs.freeze(each)))
    return costs


def _export(qmodel: Any, path: Path, target: str) -> Cost:
    return once(lambda: qs.export_onnx(qmodel, path, target=target))[1]


def running(point: Point, kind: str, folder: Path, rounds: int) -> Run:
    """What a forward costs, in turns with its products by plain kernels."""
    inputs, before = point.inputs(), _status("VmRSS")
    model: Any
    if kind == "float":
        model = point.model()
    elif kind == "frozen":
        model = pickle.loads((folder / f"{point.name}-frozen.pickle").read_bytes())
    else:
        importlib.import_module(kind)
        before = _status("VmRSS")
        model = qs.load_onnx(folder / f"{point.name}-{kind}.onnx", kind)
    _forget_peak()
    with torch.inference_mode():
        model(**inputs)
        model(**inputs)
        peak = _status("VmHWM") - before
        turns: dict[str, Any] = {"run": lambda _: model(**inputs), **products(point, kind)}
        found = interleaved(turns, {}, min(rounds, _affordable(turns)), Watch())
    seconds = {name: statistics.median(each.seconds[name] for each in found) for name in turns}
    limit = seconds["linears"] + seconds.get("attention", 0.0)
    linear, own = point.adds()
    if "attention" not in turns:
        limit *= 1 + own / linear
    cost = Cost(seconds["run"], peak, max(each.others for each in found))
    return Run(cost, limit / seconds["run"], linear / seconds["linears"] / 1e9)


def _affordable(turns: dict[str, Any]) -> int:
    """How many rounds there is time for, should others disturb them all."""
    start = time.perf_counter()
    for turn in turns.values():
        turn({})
    # (In its turn each runs twice.)
    return max(1, int(_SECONDS / (2 * PATIENCE * (time.perf_counter() - start))))


def products(point: Point, kind: str) -> dict[str, Callable[[Any], object]]:
    """The model's products and nothing else: linears, and attention where the run has it in float."""
    rows, generator = point.batch * point.length, torch.Generator().manual_seed(0)
    given = {size: torch.randn(rows, size, generator=generator) for size in (point.width, _FOUR * point.width)}
    shapes = [(high, wide) for wide, high in point.linears() * point.layers]
    if kind == "float":
        linears = [_float_product(given[shape[1]], torch.randn(shape, generator=generator)) for shape in shapes]
    else:
        integers = {size: (each * 40 + 128).clamp(0, 255).to(torch.uint8) for size, each in given.items()}
        weights = [torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator) for shape in shapes]
        linears = [_int8_product(integers[each.shape[1]], each) for each in weights]
    found = {"linears": _all(linears)}
    if kind in ("float", "frozen"):
        heads = point.batch, point.width // _HEAD, point.length, _HEAD
        queries, keys = (torch.randn(heads, generator=generator) for _ in range(2))
        scores = torch.randn((*heads[:3], point.length), generator=generator)
        found["attention"] = _all([_product(queries, keys.mT), _product(scores, keys)] * point.layers)
    return found


def _all(work: Sequence[Callable[[], Tensor]]) -> Callable[[Any], object]:
    return lambda _: [None for each in work if each() is None]  # no result is kept


def _product(one: Tensor, other: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.matmul(one, other)


def _float_product(given: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return _product(given, weight.t())


def _int8_product(given: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    packed, scale = torch.ops.onednn.qlinear_prepack(weight, None), torch.full((len(weight),), 0.01)
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    kernel = torch.ops.onednn.qlinear_pointwise.default
    return lambda: kernel(given, 0.02, 128, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")


class Bench:
    """Runs every measurement in a new process, which has imported and done nothing else."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self._folder, self._options = folder, options
        self._written: dict[str, dict[str, Cost]] = {}
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "transformers", "qdq_surgery", "runtimes.timing"])
        self.others: list[float] = []

    def making(self, point: Point) -> dict[str, Cost]:
        """Costs of convert and calibrate, and of the exports of a model that had none yet."""
        first = point.name not in self._written
        found = self._alone(making, point, self._folder if first else None)
        self._saw(found.values())
        self._written.setdefault(point.name, found)
        return found

    def running(self, point: Point) -> dict[str, Run]:
        """For each kind what a forward costs."""
        found = {kind: self._alone(running, point, kind, self._folder, self._options.rounds) for kind in RUNS}
        self._saw(each.cost for each in found.values())
        return found

    def _alone(self, action: Callable[..., _Made], *given: Any) -> _Made:
        with ProcessPoolExecutor(1, self._context, initializer=quiet, initargs=(self._options.threads,)) as pool:
            return pool.submit(action, *given).result()

    def _saw(self, costs: Any) -> None:
        self.others.extend(each.others for each in costs)


def say(line: str) -> None:
    """Progress: beside what is printed, not in it."""
    print(line, file=sys.stderr, flush=True)


def rows(bench: Bench, axes: Sequence[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """For each point its words, its cells of making, and its cells of running. The middle is measured once."""
    seen: dict[Point, tuple[list[str], list[str]]] = {}
    for axis in axes:
        for value in AXES[axis]:
            point = replace(Point(), **{axis: value})
            if point not in seen:
                made = bench.making(point)
                making_cells = [f"{made[each].seconds:.2f} s, {made[each].megabytes:.0f} MB" for each in made]
                making_cells += [""] * (len(_MAKING) - len(made))
                ran = bench.running(point).values()
                seen[point] = (
                    making_cells,
                    [
                        f"{1e3 * each.cost.seconds:.1f} ms, {each.cost.megabytes:.0f} MB, {each.share:.0%}"
                        for each in ran
                    ],
                )
                say("plain kernels, GMAC/s: " + ", ".join(f"{each.speed:.0f}" for each in ran))
            say(f"{axis} {value}: {' | '.join(seen[point][0])} | {' | '.join(seen[point][1])}")
            yield f"{axis} {value}", *seen[point]


def markdown(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table as the pages have it."""
    given = [columns, ["---", *["--:"] * (len(columns) - 1)], *lines]
    return "\n".join(f"| {' | '.join(each)} |" for each in given)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", nargs="+", choices=tuple(AXES), default=list(AXES), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="of what runs (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="(default: %(default)s)")
    options = parser.parse_args()
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), options)
        found = list(rows(bench, options.axis))
    print(markdown(("", *_MAKING), [(name, *cells) for name, cells, _ in found]), end="\n\n")
    print(markdown(("", *RUNS.values()), [(name, *cells) for name, _, cells in found]))
    busy = f"{statistics.median(bench.others):.0%} (at most {max(bench.others):.0%})"
    print(
        f"\n{options.threads} threads, {time.perf_counter() - start:.0f} s; others took {busy} of the cores' time",
        flush=True,
    )


if __name__ == "__main__":
    main()
