"""Time BERT on an NVIDIA GPU: float, torchao's INT8, and what this package adds to training; prints three tables.

    python scripts/benchmark_gpu.py [--minutes 8] [--rounds 7] [--json FILE] [--sizes base] [--shapes 32x128]

Inference in bf16 against torchao's INT8 (skipped with a word where it is not installed) and this package's fake
quantization and frozen models (``qs.freeze`` by the rules ``pytorch``, the rest in bf16 or float16), eager and
compiled; training steps of QAT and collecting against the float model; and the rate of the
plain products, which nothing built from them can beat. Random weights. What is compared takes turns, and medians are
given. Compiling takes longest: what does not fit into ``--minutes`` is left out, and said so.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import json
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs
from qdq_surgery.integers.triton_product import TritonProduct

SIZES: dict[str, dict[str, int]] = {
    "base": {},
    "large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
SHAPES = ("32x128", "1x128", "8x512")

#: Milliseconds that one turn of a contender takes at least, so that the clock's own noise is small.
TURN = 20.0

Batch = dict[str, Tensor]
Run = Callable[[], object]
Figures = Iterator[tuple[str, dict[str, float]]]


class Task(NamedTuple):
    """What is to be measured, and how."""

    console: Console
    rounds: int
    #: By ``time.monotonic``: no other contender is started after it.
    end: float
    sizes: Sequence[str]
    shapes: Sequence[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="after which no other contender is started")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="a file for the figures, written after each part")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models of the forwards")
    parser.add_argument(
        "--shapes", nargs="+", default=SHAPES, type=_shape, metavar="ROWSxTOKENS", help="batches of the forwards"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmark_gpu.py needs an NVIDIA GPU, and torch sees none")
    transformers_logging.set_verbosity_error()
    end = time.monotonic() + 60 * arguments.minutes
    console = Console(highlight=False, width=150)
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, medians of {arguments.rounds} rounds")
    figures: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    for part in arguments.only:
        figures[part] = {}
        for name, values in PARTS[part](Task(console, arguments.rounds, end, arguments.sizes, arguments.shapes)):
            figures[part][name] = values
            if arguments.json is not None:
                arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def _shape(text: str) -> str:
    if re.fullmatch(r"[1-9]\d*x[1-9]\d*", text) is None:
        raise argparse.ArgumentTypeError(f"'{text}' is no shape; give rows and tokens, such as 32x128")
    return text


# The clock -----------------------------------------------------------------------------------------------------------


def interleaved(runs: Mapping[str, Run], rounds: int) -> dict[str, float]:
    """Median milliseconds of one run of each, by the GPU's clock; the runs take turns."""
    times = {name: max(1, int(TURN / max(_milliseconds(run, 2), 1e-3))) for name, run in runs.items()}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(_milliseconds(run, times[name]))
    return {name: statistics.median(each) for name, each in found.items()}


def _milliseconds(run: Run, times: int) -> float:
    run()
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()  # type: ignore[no-untyped-call]
    for _ in range(times):
        run()
    stop.record()  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    milliseconds: float = start.elapsed_time(stop)  # type: ignore[no-untyped-call]
    return milliseconds / times


# Products ------------------------------------------------------------------------------------------------------------


def products(task: Task) -> Figures:
    """10^12 operations per second of the encoder's products, alone, each launched as a CUDA graph.

    Triton's is the whole of a linear: it scales its sums, adds a bias, and gives bf16. It is left out where it is not
    for the GPU.
    """
    kinds = ["bf16", "int8", *(["Triton int8"] if TritonProduct.suits(torch.device("cuda")) else [])]
    over = [f"{kind} / bf16" for kind in kinds[1:]]
    table = Table("product, rows x in x out", *kinds, *over, title="plain products, Tops", box=None)
    for rows in (128, 4096):
        for width, out in ((768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024)):
            x, w = (torch.randn(*size, device="cuda", dtype=torch.bfloat16) for size in ((rows, width), (out, width)))
            i, j = ((each * 40).clamp(-127, 127).to(torch.int8) for each in (x, w))
            runs: dict[str, Run] = {
                "bf16": functools.partial(torch.mm, x, w.t()),
                "int8": functools.partial(torch._int_mm, i, j.t()),
            }
            if len(kinds) > len(runs):
                product = TritonProduct(j, torch.rand(out, device="cuda"), torch.tensor(1e-4, device="cuda"), 128)
                runs[kinds[-1]] = functools.partial(product, i, torch.randn(out, device="cuda"), torch.bfloat16, "")
            taken = interleaved({kind: _graph(run) for kind, run in runs.items()}, task.rounds)
            rate = {name: 2e-9 * rows * width * out / each for name, each in taken.items()}
            name = f"{rows} x {width} x {out}"
            quotients = (f"{rate[kind] / rate['bf16']:.2f}" for kind in kinds[1:])
            table.add_row(name, *(f"{rate[kind]:.0f}" for kind in kinds), *quotients)
            yield name, rate
    task.console.print(table)


def _graph(run: Run) -> Run:
    """The same without the time that Python takes to launch it."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # type: ignore[no-untyped-call]
        run()
    return graph.replay


# Training ------------------------------------------------------------------------------------------------------------


def training(task: Task) -> Figures:
    """Steps of QAT, and a calibration's batches, against the float model's."""
    size = (32, 128)
    batch, model = batch_of(*size), float_model("base")
    qmodel = qs.convert(model)
    qs.calibrate(qmodel, [batch], "max")
    learned = copy.deepcopy(qmodel)
    qs.learn_ranges(learned, weights=True)
    labelled = {**batch, "labels": torch.zeros(size[0], dtype=torch.long, device="cuda")}
    steps: dict[str, Run] = {}
    for name, each in {"float": model, "QAT": qmodel, "QAT, learned ranges": learned}.items():
        trained = copy.deepcopy(each).train()
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-6, fused=True)
        steps[f"{name} step, bf16"] = functools.partial(_step, trained, optimizer, labelled)
    batches = [batch] * 8
    passes: dict[str, Run] = {
        "float, 8 batches": functools.partial(_passes, model, batches),
        "fake quantization, 8 batches": functools.partial(_passes, qmodel, batches),
        "collect maxima of 8 batches": functools.partial(qs.collect, qmodel, batches, histograms=False),
        "collect histograms of 8 batches": functools.partial(qs.collect, qmodel, batches),
    }
    table = Table("BERT-base, 32 x 128", "ms", "x float", title="training and calibration", box=None)
    for title, group in (("steps", steps), ("passes", passes)):
        found = interleaved(group, task.rounds)
        first = next(iter(found.values()))
        for name, each in found.items():
            table.add_row(name, f"{each:.2f}", f"{each / first:.2f}")
        yield title, found
    task.console.print(table)


def _step(model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def _passes(model: Callable[..., Any], batches: list[Batch]) -> None:
    with torch.no_grad():
        for batch in batches:
            model(**batch)


# Inference -----------------------------------------------------------------------------------------------------------


def inference(task: Task) -> Figures:
    """Forwards of all contenders; a size and shape at a time, while there is time."""
    found: dict[str, dict[str, float]] = {}
    for size in task.sizes:
        made: dict[str, Callable[..., Any]] = {}
        for name, make in CONTENDERS.items():
            try:
                made[name] = make(size)
            except (ImportError, NotImplementedError, RuntimeError, qs.ModelError) as error:
                task.console.print(f"{name}: left out ({type(error).__name__}: {str(error).splitlines()[0]})")
        for shape in task.shapes:
            what = f"{size} {shape}"
            runs = _runs(task, made, what, batch_of(*map(int, shape.split("x"))))
            if runs:
                found[what] = interleaved(runs, task.rounds)
                yield what, found[what]
        torch.compiler.reset()
    table = Table("ms", *found, title="forward", box=None)
    for name in CONTENDERS:
        table.add_row(name, *(f"{each[name]:.2f}" if name in each else "-" for each in found.values()))
    task.console.print(table)


def _runs(task: Task, made: Mapping[str, Callable[..., Any]], what: str, batch: Batch) -> dict[str, Run]:
    """What runs on this batch, each run so often that it is compiled and its launches are recorded."""
    runs: dict[str, Run] = {}
    for name, model in made.items():
        if time.monotonic() > task.end:
            task.console.print(f"{what}, {name}: left out, the time is up")
            continue
        run = functools.partial(_passes, model, [batch])
        start = time.monotonic()
        try:
            for _ in range(3):
                run()
        except Exception as error:  # a peer's compiler may raise anything; the others go on
            task.console.print(f"{what}, {name}: left out ({type(error).__name__}: {str(error)[:200]})")
            continue
        if (seconds := time.monotonic() - start) > 2:
            task.console.print(f"{what}, {name}: {seconds:.0f} s to compile")
        runs[name] = run
    return runs


def _float32(size: str) -> nn.Module:
    return float_model(size)


def _bf16(size: str) -> nn.Module:
    return float_model(size).to(torch.bfloat16)


def _sdpa(size: str) -> nn.Module:
    model = _bf16(size)
    model.set_attn_implementation("sdpa")  # type: ignore[operator]
    return model


def _compiled(make: Callable[[str], nn.Module]) -> Callable[[str], Callable[..., Any]]:
    def made(size: str) -> Callable[..., Any]:
        # CUDA graphs: one row of 128 tokens would be measured by how fast Python launches kernels else.
        compiled: Callable[..., Any] = torch.compile(make(size), dynamic=False, mode="reduce-overhead")
        return compiled

    return made


def _torchao_dynamic(size: str) -> nn.Module:
    quantization = importlib.import_module("torchao.quantization")
    model = _sdpa(size)
    # (set_inductor_config would change how all the others are compiled, and make that take minutes.)
    config = quantization.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)
    quantization.quantize_(model, config, filter_fn=_in_encoder)
    return model


def _torchao_static(size: str) -> nn.Module:
    quantization = importlib.import_module("torchao.quantization")
    granularity = importlib.import_module("torchao.quantization.granularity")
    config = quantization.Int8StaticActivationInt8WeightConfig
    model = _sdpa(size)
    tops: dict[str, Tensor] = {}
    hooks = []
    for name, module in model.named_modules():
        if _in_encoder(module, name):

            def keep(_: nn.Module, given: tuple[Tensor], name: str = name) -> None:
                tops[name] = given[0].abs().amax()

            hooks.append(module.register_forward_pre_hook(keep))
    with torch.no_grad():
        model(**batch_of(32, 128))
    for hook in hooks:
        hook.remove()
    for name, top in tops.items():
        given = config(
            act_quant_scale=(top / 127).reshape(1, 1),
            granularity=[granularity.PerTensor(), granularity.PerRow()],
            set_inductor_config=False,
        )
        quantization.quantize_(model, given, filter_fn=lambda _, own, name=name: own == name)
    return model


def _in_encoder(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "encoder" in name


def _fake_quant(size: str) -> nn.Module:
    qmodel = qs.convert(float_model(size))
    qs.calibrate(qmodel, [batch_of(32, 128)], "max")
    return qmodel.to(torch.bfloat16)


@functools.cache
def _calibrated(size: str) -> PreTrainedModel:
    qmodel = qs.convert(float_model(size), "pytorch")
    qs.calibrate(qmodel, [batch_of(32, 128)], "max")
    return qmodel


def _frozen(size: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    model = qs.freeze(copy.deepcopy(_calibrated(size)).to(dtype), inplace=True)
    model.set_attn_implementation("sdpa")
    return model


CONTENDERS: dict[str, Callable[[str], Callable[..., Any]]] = {
    "float32 eager": _float32,
    "bf16 eager": _bf16,
    "ours, fake quantization, bf16 eager": _fake_quant,
    "bf16 sdpa compiled": _compiled(_sdpa),
    "ours, fake quantization, bf16 compiled": _compiled(_fake_quant),
    "ours, frozen, bf16 eager": _frozen,
    "ours, frozen, bf16 compiled": _compiled(_frozen),
    "torchao static INT8, compiled": _compiled(_torchao_static),
    "torchao dynamic INT8, compiled": _compiled(_torchao_dynamic),
    "ours, frozen, float16 compiled": _compiled(functools.partial(_frozen, dtype=torch.float16)),
}

PARTS: dict[str, Callable[[Task], Figures]] = {
    "products": products,
    "training": training,
    "inference": inference,
}


@functools.cache
def _weights(size: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = BertConfig(attn_implementation="eager", **SIZES[size])
    return BertForSequenceClassification(config).eval().cuda()


def float_model(size: str) -> PreTrainedModel:
    """A copy of BERT of this size, float32, in eval mode, on the GPU."""
    return copy.deepcopy(_weights(size))


@functools.cache
def batch_of(rows: int, tokens: int) -> Batch:
    """Ids without padding, on the GPU."""
    ids = torch.randint(1000, 30000, (rows, tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids.cuda(), "attention_mask": torch.ones_like(ids).cuda()}


if __name__ == "__main__":
    main()
