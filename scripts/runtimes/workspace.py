"""What a contender is made from, and what it becomes."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from runtimes.subjects import INPUTS, Batch

__all__ = ["Contender", "Missing", "Prepared", "Run", "Workspace", "package", "quiet", "tensors", "write_float_onnx"]

#: From a batch to the start and end logits.
Run = Callable[[Batch], list[NDArray[np.float32]]]

#: Of the float ONNX file: the first with Gelu as one operator.
OPSET = 20


class Missing(Exception):
    """A contender cannot take part here; the message says what it needs."""


@dataclass(frozen=True)
class Prepared:
    """A contender ready to run, and the files that hold its model (none: it has no file)."""

    run: Run
    files: Sequence[Path] = ()

    @property
    def megabytes(self) -> float | None:
        """Size of the files in 10^6 bytes."""
        return sum(file.stat().st_size for file in self.files) / 1e6 if self.files else None


@dataclass
class Workspace:
    """One float model, a folder to write to, and what preparing needs.

    Attributes:
        calibration: The same batches for everyone who calibrates.
        reference: Python of the environment that has the real QDQBERT.
    """

    model: PreTrainedModel
    folder: Path
    threads: int
    calibration: Sequence[Batch]
    reference: Path | None = None

    @cached_property
    def float_onnx(self) -> Path:
        """The float model as an ONNX file."""
        path = self.folder / "float.onnx"
        return write_float_onnx(self.model, tensors(self.calibration[0]), path, ["start_logits", "end_logits"])


@dataclass(frozen=True)
class Contender:
    """A way to run the model: its name on the command line, its words in tables, how it is made."""

    name: str
    words: str
    prepare: Callable[[Workspace], Prepared]


def package(name: str) -> Any:
    """An imported package. Raises :class:`Missing` if it is not installed."""
    try:
        with quiet():
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != name.partition(".")[0]:
            raise
        raise Missing(f"{error.name} is not installed; pip install {error.name}") from error


def tensors(batch: Batch) -> dict[str, Tensor]:
    """The same values for PyTorch."""
    return {name: torch.from_numpy(value) for name, value in batch.items()}


def write_float_onnx(model: PreTrainedModel, batch: dict[str, Tensor], path: Path, outputs: Sequence[str]) -> Path:
    """A float model as an ONNX file, number of rows and length open; its path."""
    for name in ("onnx", "onnxscript"):
        package(name)
    batch = {name: batch[name] for name in INPUTS if name in batch}  # in the order in which their names are given
    shapes = {name: {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC} for name in batch}
    with torch.no_grad(), quiet():
        program = torch.onnx.export(
            model,
            (),
            kwargs=batch,
            dynamo=True,
            opset_version=OPSET,
            dynamic_shapes=shapes,
            input_names=list(batch),
            output_names=list(outputs),
            verbose=False,
        )
        assert program is not None
        program.save(path)
    return path


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings, logs or progress bars of other tools. What fails still raises."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
