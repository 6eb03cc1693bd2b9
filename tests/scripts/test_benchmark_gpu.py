"""The GPU's benchmark on a CPU: its contenders are made and run, on tiny models and with a clock that tells nothing."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gpu_kernels import take_kernel
from rich.console import Console
from torch import nn

import benchmark_gpu
from qdq_surgery.freeze.linear import IntegerLinear

TINY = {"vocab_size": 30000, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    """Where the benchmark prints; everything that it puts on a GPU stays where it is."""
    take_kernel("_int_mm", monkeypatch)
    for kind in (torch.Tensor, nn.Module):
        monkeypatch.setattr(kind, "cuda", lambda self: self)
    monkeypatch.setattr(benchmark_gpu, "SIZES", {"tiny": {**TINY, "intermediate_size": 64}})
    monkeypatch.setattr(benchmark_gpu, "_milliseconds", lambda *_: 1.0)
    for cached in (benchmark_gpu._weights, benchmark_gpu._calibrated, benchmark_gpu.batch_of):
        cached.cache_clear()
    return Console(file=io.StringIO(), width=150)


def task(console: Console, seconds: float) -> benchmark_gpu.Task:
    return benchmark_gpu.Task(console, 1, time.monotonic() + seconds, ["tiny"], ["2x9", "1x3"])


def test_contenders_run_and_who_cannot_is_named(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    def compile_nothing(model: nn.Module, **_: Any) -> nn.Module:
        compiled.append(model)
        return model

    def not_here(_: str) -> Callable[..., Any]:
        raise ImportError("No module named 'torchao'")

    monkeypatch.setattr(torch, "compile", compile_nothing)
    contenders = {
        name: not_here if name.startswith("torchao") else make for name, make in benchmark_gpu.CONTENDERS.items()
    }
    monkeypatch.setattr(benchmark_gpu, "CONTENDERS", contenders)
    figures = dict(benchmark_gpu.inference(task(console, 60)))
    assert figures.keys() == {"tiny 2x9", "tiny 1x3"}
    wanted = {name for name in contenders if not name.startswith("torchao")}
    assert {"ours, frozen, bf16 eager", "ours, frozen, bf16 compiled", "ours, frozen, float16 compiled"} <= wanted
    assert all(each.keys() == wanted for each in figures.values())
    frozen = [each for each in compiled if any(isinstance(module, IntegerLinear) for module in each.modules())]
    assert {next(each.parameters()).dtype for each in frozen} == {torch.bfloat16, torch.float16}
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert "torchao static INT8, compiled: left out (ImportError: No module named 'torchao')" in printed
    assert "ours, frozen, bf16 compiled" in printed


def test_when_the_time_is_up_the_rest_is_left_out(console: Console, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_gpu, "CONTENDERS", {"ours, frozen, bf16 eager": benchmark_gpu._frozen})
    assert dict(benchmark_gpu.inference(task(console, -1))) == {}
    assert "ours, frozen, bf16 eager: left out, the time is up" in console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an NVIDIA GPU")
def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark_gpu.py"])
    with pytest.raises(SystemExit, match="needs an NVIDIA GPU, and torch sees none"):
        benchmark_gpu.main()


@pytest.mark.parametrize("shape", ["32", "x128", "0x8", "32x128x2", "a lot"])
def test_what_is_no_shape_is_refused(
    shape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["benchmark_gpu.py", "--shapes", shape])
    with pytest.raises(SystemExit):
        benchmark_gpu.main()
    assert f"'{shape}' is no shape; give rows and tokens, such as 32x128" in capsys.readouterr().err
