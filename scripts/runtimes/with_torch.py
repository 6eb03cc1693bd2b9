"""PyTorch: eager float, and torchao's PT2E quantization compiled by inductor."""

from __future__ import annotations

import contextlib
import copy
import importlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from runtimes.subjects import INPUTS, Batch
from runtimes.workspace import Contender, Prepared, Workspace, package, quiet, tensors

__all__ = ["CONTENDERS", "inductor_in", "quantize_by_pt2e"]

_CACHE = "TORCHINDUCTOR_CACHE_DIR"


class _Tuple(nn.Module):
    """The model with positional inputs and a tuple for output, as ``torch.export`` gives it to PT2E."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model(**dict(zip(INPUTS, inputs, strict=True)))
        return found.start_logits, found.end_logits


def _eager(workspace: Workspace) -> Prepared:
    model = copy.deepcopy(workspace.model)
    model.set_attn_implementation("sdpa")

    def run(batch: Batch) -> list[NDArray[np.float32]]:
        with torch.inference_mode():
            found = model(**tensors(batch))
        return [found.start_logits.numpy(), found.end_logits.numpy()]

    return Prepared(run)


@contextlib.contextmanager
def inductor_in(folder: Path) -> Iterator[None]:
    """Inductor with frozen weights, without which it makes no INT8 kernels, and its files in ``folder``."""
    inductor: Any = importlib.import_module("torch._inductor.config")
    before = os.environ.get(_CACHE)
    os.environ[_CACHE] = str(folder)
    try:
        with inductor.patch(freezing=True):
            yield
    finally:
        if before is None:
            del os.environ[_CACHE]
        else:
            os.environ[_CACHE] = before


def quantize_by_pt2e(module: nn.Module, examples: Sequence[tuple[Tensor, ...]]) -> nn.Module:
    """A module with torchao's static INT8 for inductor on x86, calibrated on ``examples`` of its positional inputs."""
    package("torchao")
    pt2e: Any = package("torchao.quantization.pt2e.quantize_pt2e")
    x86: Any = package("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    export: Any = torch.export.export
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with quiet(), torch.no_grad():
        exported = export(module, examples[0], dynamic_shapes=((free,) * len(examples[0]),))
        quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
        prepared = pt2e.prepare_pt2e(exported.module(), quantizer)
        for example in examples:
            prepared(*example)
        converted: nn.Module = pt2e.convert_pt2e(prepared)
    return converted


def _torchao(workspace: Workspace) -> Prepared:
    examples = [tuple(tensors(batch).values()) for batch in workspace.calibration]
    converted = quantize_by_pt2e(_Tuple(workspace.model), examples)
    compiled: Any = torch.compile(converted, dynamic=False)
    compiled_for: set[tuple[int, ...]] = set()

    def run(batch: Batch) -> list[NDArray[np.float32]]:
        inputs = tuple(tensors(batch).values())
        shape = tuple(inputs[0].shape)
        new = shape not in compiled_for
        with torch.no_grad(), inductor_in(workspace.folder / "inductor") if new else contextlib.nullcontext():
            found = compiled(*inputs)
        compiled_for.add(shape)
        return [each.numpy() for each in found]

    return Prepared(run)


CONTENDERS = (
    Contender("torch-fp32", "PyTorch eager, float", _eager),
    Contender("torchao", "PyTorch inductor, torchao's static INT8", _torchao),
)
