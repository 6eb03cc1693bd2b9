"""Time a frozen model against float, bfloat16 and fake quantization, all in PyTorch on the CPU; prints one table.

    python scripts/benchmark_freeze.py [--rules linear-only qdqbert] [--runs 7] [--shapes 8x128 1x128]
        [--no-compile] [--layers 12] [--no-embeddings] [--profile] [--threads 2] [--least]

BERT-base with random weights. Everything is measured in one process, in turns, and given as medians (``--least``: as
the least of all turns, where other programs share the machine); what counts are the ratios to float32. Weights are
counted as bytes that the model holds: of the whole model, and of its quantized linears. The agreement is that of the
demo's checkpoint (scripts/demo.sh installs it): cosine of sentence embeddings to those of the float model, and the
share of texts whose nearest other text is the same.

With torchao installed (``pip install --no-deps --target FOLDER torchao``, and ``PYTHONPATH=FOLDER``) its static INT8
for inductor takes part, compiled with frozen weights as it is meant to be.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.cli.demo.files import checkpoint
from qdq_surgery.cli.demo.run import agreement, embed, token_batches
from qdq_surgery.freeze.linear import IntegerLinear
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.texts.standard_library import standard_library_texts
from runtimes.with_torch import inductor_in, quantize_by_pt2e
from runtimes.workspace import Missing

#: Seconds that are given to the machine after compiling, and calls that are not counted.
_WARM = 2

Batch = dict[str, torch.Tensor]


def base_model(layers: int) -> PreTrainedModel:
    """BERT-base with random weights."""
    torch.manual_seed(0)
    made: PreTrainedModel = BertModel(BertConfig(num_hidden_layers=layers)).eval()
    return made


def batch_of(shape: str) -> Batch:
    """Token ids without padding, such as 8x128."""
    rows, tokens = map(int, shape.split("x"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 20000, (rows, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of all parameters, buffers and packed integers; and of those of quantized linears alone."""
    whole = sum(each.numel() * each.element_size() for each in (*model.parameters(), *model.buffers()))
    linears = [each for each in model.modules() if isinstance(each, (IntegerLinear, QuantLinear))]
    own = sum(
        each.numel() * each.element_size() for linear in linears for each in (*linear.parameters(), *linear.buffers())
    )
    packed = sum(each.product.nbytes for each in linears if isinstance(each, IntegerLinear))
    return whole + packed, own + packed


def quantized(model: PreTrainedModel, rules: str, batches: list[Batch]) -> PreTrainedModel:
    """``model`` converted by ``rules`` and calibrated."""
    qmodel = qs.convert(model, rules)
    qs.calibrate(qmodel, batches)
    return qmodel


def in_turns(actions: dict[str, Callable[[], object]], runs: int, least: bool) -> dict[str, float]:
    """Seconds of each action, the median of ``runs`` turns, or their least."""
    found: dict[str, list[float]] = {name: [] for name in actions}
    with torch.inference_mode():
        for action in actions.values():
            for _ in range(_WARM):
                action()
        for _ in range(runs):
            for name, action in actions.items():
                start = time.perf_counter()
                action()
                found[name].append(time.perf_counter() - start)
    return {name: min(each) if least else statistics.median(each) for name, each in found.items()}


def _caller(model: Callable[..., Any], batch: Batch) -> Callable[[], object]:
    return lambda: model(**batch)


def compiled(model: PreTrainedModel, batch: Batch) -> Callable[..., Any]:
    """``model`` compiled for the shapes of ``batch``; called once before, for what has to be recorded."""
    with torch.inference_mode():
        model(**batch)
        made: Callable[..., Any] = torch.compile(model, dynamic=False)
        made(**batch)
    return made


class _Positional(nn.Module):
    """The model with positional inputs, as ``torch.export`` gives it to PT2E."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = self.model(**dict(zip(("input_ids", "attention_mask"), inputs, strict=True)))
        return found.last_hidden_state, found.pooler_output


def by_torchao(model: PreTrainedModel, batch: Batch, folder: Path) -> Callable[[], object]:
    """torchao's static INT8 of ``model``, compiled for the shapes of ``batch``.

    Raises:
        Missing: It is not installed.
    """  # noqa: D403
    inputs, examples = tuple(batch.values()), [tuple(batch_of("2x128").values())]
    made: Callable[..., Any] = torch.compile(quantize_by_pt2e(_Positional(model), examples), dynamic=False)

    def run() -> object:
        with torch.inference_mode(False), torch.no_grad():  # in another mode it is compiled anew, weights not frozen
            return made(*inputs)

    with inductor_in(folder):
        run()
    return run


def compare(options: argparse.Namespace, console: Console, folder: Path) -> None:
    """The table of times and of weights."""
    model = base_model(options.layers)
    half = copy.deepcopy(model).to(torch.bfloat16)
    fakes = {rules: quantized(model, rules, [batch_of("2x128")]) for rules in options.rules}
    frozen = {rules: qs.freeze(fake) for rules, fake in fakes.items()}
    half_rest = {f"{rules}, the rest in bfloat16": copy.deepcopy(fakes[rules]).to(torch.bfloat16) for rules in fakes}
    frozen |= {words: qs.freeze(fake, inplace=True) for words, fake in half_rest.items()}
    models = {"float32": model, "bfloat16": half}
    models |= {f"fake quantization, {rules}": each for rules, each in fakes.items()}
    models |= {f"frozen, {rules}": each for rules, each in frozen.items()}
    sizes = {name: weight_bytes(each) for name, each in models.items()}
    linears = next(sizes[name][1] for name in sizes if name.startswith("fake"))
    table = Table("PyTorch", *(f"{shape}, ms" for shape in options.shapes), "weights", "of the linears", box=None)
    times: dict[str, dict[str, float]] = {}
    for shape in options.shapes:
        batch = batch_of(shape)
        actions = {name: _caller(each, batch) for name, each in models.items()}
        if options.compile:
            torch._dynamo.reset()
            for name, each in models.items():
                if not name.startswith("fake"):
                    actions[f"{name}, compiled"] = _caller(compiled(each, batch), batch)
            try:
                actions["torchao, compiled"] = by_torchao(model, batch, folder)
            except Missing as missing:
                console.print(f"torchao is left out: {missing}")
        times[shape] = in_turns(actions, options.runs, options.least)
    for name in times[options.shapes[0]]:
        cells = []
        for shape in options.shapes:
            seconds, float32 = times[shape][name], times[shape]["float32"]
            cells.append(f"{1e3 * seconds:.1f}  {float32 / seconds:.2f} x")
        if name.startswith("torchao"):
            table.add_row(name, *cells)
            continue
        whole, own = sizes[name.removesuffix(", compiled")]
        part = f"{own / linears:.3f}" if name.startswith("frozen") else ""
        table.add_row(name, *cells, f"{whole / 1e6:.0f} MB  {whole / sizes['float32'][0]:.3f}", part)
    console.print(table)
    if options.profile:
        for rules, each in frozen.items():
            _profile(each, batch_of(options.shapes[0]), f"frozen, {rules}", console)


def _profile(model: PreTrainedModel, batch: Batch, title: str, console: Console) -> None:
    """Where the time of a call goes, by torch's operators."""
    with torch.inference_mode(), torch.profiler.profile() as profile:
        for _ in range(3):
            model(**batch)
    console.print(title)
    console.print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40))


def embeddings(rules: list[str], console: Console) -> None:
    """The table of agreement on the demo's checkpoint."""
    model = AutoModel.from_pretrained(checkpoint()).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint())
    texts = standard_library_texts(384)
    batches = [dict(batch) for batch in token_batches(tokenizer, texts[:128])]
    wanted = embed(model, tokenizer, texts[128:], "float")
    table = Table("embeddings", "cosine to float", "same nearest text", "to fake quantization", box=None)
    for name in rules:
        fake = quantized(model, name, batches)
        found = embed(fake, tokenizer, texts[128:], name)
        again = embed(qs.freeze(fake), tokenizer, texts[128:], f"{name}, frozen")
        for words, each in ((f"fake quantization, {name}", found), (f"frozen, {name}", again)):
            cosine, nearest = agreement(wanted, each)
            table.add_row(words, f"{cosine:.5f}", f"{nearest:.3f}", f"{agreement(found, each)[0]:.6f}")
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rules", nargs="+", default=["linear-only", "onnxruntime", "qdqbert"])
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--shapes", nargs="+", default=["8x128", "1x128"])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--embeddings", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--least", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=160)
    with tempfile.TemporaryDirectory() as folder:
        compare(options, console, Path(folder))
    if options.embeddings:
        embeddings(options.rules, console)


if __name__ == "__main__":
    main()
