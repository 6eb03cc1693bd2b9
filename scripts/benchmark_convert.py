"""Time convert() against one float forward and against building the reference's model; print extra memory.

    python scripts/benchmark_convert.py [--runs 5] [--large]

Everything is measured in one process, interleaved, and given as medians; what counts are the ratios. "Building
QDQBERT" is what its users did instead: constructing the model with quantized linears and copying the weights into it.
The real class needs an old transformers, so its construction is timed with pytorch-quantization's QuantLinear and
TensorQuantizer in today's BertModel, which is the same number of the same modules.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from absl import logging as absl_logging
from pytorch_quantization import nn as quant_nn
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertModel
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs

SIZES = {
    "BERT-base": BertConfig(),
    "BERT-large": BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
}


def timed(action: Callable[[], object]) -> float:
    gc.collect()
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def forward(model: BertModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        model(ids)


def build_reference(model: BertModel) -> BertModel:
    """What constructing QDQBERT costs: every module again, 20 quantizers a layer, then the weights."""
    made = BertModel(model.config)
    for layer in made.encoder.layer:
        attention = layer.attention.self
        for name in ("q", "k", "v", "a"):
            attention.add_module(f"matmul_{name}_input_quantizer", quantizer())
        for block in (layer.attention.output, layer.output):
            block.add_local_input_quantizer, block.add_residual_input_quantizer = quantizer(), quantizer()
        for block, name in (
            (attention, "query"),
            (attention, "key"),
            (attention, "value"),
            (layer.attention.output, "dense"),
            (layer.intermediate, "dense"),
            (layer.output, "dense"),
        ):
            linear = getattr(block, name)
            setattr(block, name, quant_nn.QuantLinear(linear.in_features, linear.out_features))
    made.load_state_dict(model.state_dict(), strict=False)
    return made


def quantizer() -> quant_nn.TensorQuantizer:
    return quant_nn.TensorQuantizer(quant_nn.QuantLinear.default_quant_desc_input)


def resident() -> int:
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def peak_during(action: Callable[[], object]) -> int:
    """Largest growth of the resident set while ``action`` runs, sampled every millisecond."""
    gc.collect()
    before, peak, done = resident(), [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.001):
            peak[0] = max(peak[0], resident() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    action()
    done.set()
    watcher.join()
    return max(peak[0], resident() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--large", action="store_true", help="BERT-large, too (needs about 6 GB)")
    arguments = parser.parse_args()
    absl_logging.set_verbosity(absl_logging.ERROR)
    transformers_logging.set_verbosity_error()
    ids = torch.randint(1000, 20000, (8, 128))
    table = Table(
        title=f"medians of {arguments.runs} interleaved runs, {torch.get_num_threads()} threads", title_justify="left"
    )
    columns = (
        "model",
        "float forward 8x128",
        "convert",
        "convert in place",
        "build QDQBERT",
        "convert / forward",
        "memory in place",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    base_forward = 0.0
    for name in ("BERT-base", "BERT-large") if arguments.large else ("BERT-base",):
        torch.manual_seed(0)
        model = BertModel(SIZES[name]).eval()
        qs.convert(BertModel(BertConfig(num_hidden_layers=1, hidden_size=24)))  # imports and first calls
        forward(model, ids)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        extra = peak_during(lambda model=model: qs.convert(model, inplace=True))
        del model
        torch.manual_seed(0)
        model = BertModel(SIZES[name]).eval()
        forwards, converts, places, builds = [], [], [], []
        for _ in range(arguments.runs):
            forwards.append(timed(lambda model=model: forward(model, ids)))
            converts.append(timed(lambda model=model: qs.convert(model)))
            scratch = copy.deepcopy(model)
            places.append(timed(lambda scratch=scratch: qs.convert(scratch, inplace=True)))
            del scratch
            builds.append(timed(lambda model=model: build_reference(model)))
        median = [statistics.median(values) for values in (forwards, converts, places, builds)]
        base_forward = base_forward or median[0]
        ratio = f"{median[1] / median[0]:.2f}" + (
            "" if name == "BERT-base" else f" (base: {median[1] / base_forward:.2f})"
        )
        table.add_row(name, *(f"{value:.2f} s" for value in median), ratio, f"{extra / size:.1%} of {size >> 20} MB")
        del model
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
