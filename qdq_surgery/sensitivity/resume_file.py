"""The figures of a measurement as they grow, in memory and in a file from which an interrupted one goes on."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.errors import ExportError, OptionError
from qdq_surgery.match.site_names import STATE_SUFFIXES
from qdq_surgery.onnx_file.writer import replace_text
from qdq_surgery.safety.given_path import given_path
from qdq_surgery.safety.untrusted import DamagedError, parse_json, read_regular_file
from qdq_surgery.sensitivity.output_error import Sum
from qdq_surgery.surgery.model_state import plan_of, quantizers

__all__ = ["Figures", "digest", "identity", "open_figures"]

#: Seconds between two times that the file is written. What is done is written at an end of any kind, too.
_PAUSE = 1.0

_MOST_BYTES = 1 << 24
_MOST_BATCHES = 100_000


@dataclass
class Figures:
    """Sums by name, and over how many of the first batches.

    Attributes:
        path: The file; ``None``: there is none.
        subject: What the figures are of, see :func:`identity`.
        batches: Digests of the batches so far.
        sums: By name: sum, what it is divided by, number of batches.
    """

    path: Path | None
    subject: Mapping[str, str]
    batches: list[str] = field(default_factory=list)
    sums: dict[str, tuple[float, float, int]] = field(default_factory=dict)
    _written: float = 0.0

    def begin(self, index: int, inputs: Mapping[str, Any]) -> None:
        """The batch that comes next.

        Raises:
            OptionError: It is another one than in the file.
        """
        if self.path is None:
            return
        found = digest(inputs.items())
        if index == len(self.batches):
            self.batches.append(found)
        elif self.batches[index] != found:
            raise OptionError(
                f"{self.path} has figures of another batch {index}; give the same batches in the same order, or "
                "another file"
            )

    def end(self, count: int, names: Iterable[str]) -> None:
        """All ``count`` batches have come.

        Raises:
            OptionError: The file is of more batches.
        """
        most = max((self.sums[name][2] for name in names), default=0)
        if most > count:
            raise OptionError(f"{self.path} has figures of {most} batches, and {count} came; give all, or another file")

    def missing(self, index: int, names: Iterable[str]) -> list[str]:
        """Those of ``names`` that batch ``index`` is not in."""
        return [name for name in names if name not in self.sums or self.sums[name][2] <= index]

    def add(self, name: str, figure: Sum) -> None:
        """The figure of the next batch."""
        total, weight, batches = self.sums.get(name, (0.0, 0.0, 0))
        self.sums[name] = total + figure[0], weight + figure[1], batches + 1

    def value(self, name: str) -> float:
        """The figure over all batches."""
        total, weight, _ = self.sums[name]
        return total / weight if weight else total

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The file can be written, and holds what is known when this ends, however it ends.

        Raises:
            OptionError: It cannot be written.
        """
        self.write()
        try:
            yield
        finally:
            self.write()

    def write_at_times(self) -> None:
        """Write the file if that was a while ago."""
        if time.monotonic() - self._written > _PAUSE:
            self.write()

    def write(self) -> None:
        """Write the file, if there is one."""
        if self.path is None:
            return
        data = {"schema": 1, **self.subject, "batches": self.batches, "figures": self.sums}
        try:
            replace_text(self.path, json.dumps(data, indent=1) + "\n")
        except ExportError as error:
            raise OptionError(f"resume: {error}") from error
        self._written = time.monotonic()


def open_figures(path: str | Path | None, subject: Mapping[str, str]) -> Figures:
    """The figures in a file, or none yet.

    Raises:
        OptionError: The file cannot be read, or is of something else; says of what.
    """
    figures = Figures(None if path is None else given_path(path, "a file of figures (resume)"), subject)
    if "\0" in str(path):
        raise OptionError(f"resume: {str(path)!r} holds a NUL character; give another path")
    try:
        if figures.path is None or not figures.path.exists():
            return figures
        _read(figures, read_regular_file(figures.path, _MOST_BYTES))
    except OSError as error:
        raise OptionError(f"resume: {path} cannot be read: {error.strerror or error}") from error
    except DamagedError as error:
        raise OptionError(f"resume: {path} holds no figures of a sensitivity: {error}; give another file") from error
    return figures


def _read(figures: Figures, data: bytes) -> None:
    fields = parse_json(data, "it", _MOST_BYTES).fields(("schema", *figures.subject, "batches", "figures"))
    fields["schema"].one_of((1,))
    found = {name: fields[name].text() for name in figures.subject}
    others = [
        f"{name} {found[name]} there and {own} here" for name, own in figures.subject.items() if found[name] != own
    ]
    if others:
        raise OptionError(
            f"resume: {figures.path} has figures of something else: {', '.join(others)}; give another file"
        )
    figures.batches = [each.text() for each in fields["batches"].items(_MOST_BATCHES)]
    for name, item in fields["figures"].entries().items():
        numbers = item.items(3)
        if len(numbers) != 3:
            item.refuse("three numbers")
        total, weight = (each.number(-math.inf, math.inf) for each in numbers[:2])
        figures.sums[name] = total, weight, numbers[2].integer(1, len(figures.batches))


def identity(model: PreTrainedModel, metric: str, measured: Iterable[str]) -> dict[str, str]:
    """What figures depend on beside the batches, by what a message calls it.

    Args:
        measured: Names of the quantizers that quantize.
    """
    rules, names, tensors = plan_of(model).rules, set(measured), model.state_dict()
    ranges = {name: value for name, value in tensors.items() if name.endswith(STATE_SUFFIXES)}
    sites = {name: quantizer.spec for name, quantizer in quantizers(model).items() if name in names}
    return {
        "model": type(model).__name__,
        "rules": rules.name,
        "sites": digest(sites.items()),
        "weights": digest((name, value) for name, value in tensors.items() if name not in ranges),
        "ranges": digest(ranges.items()),
        "metric": metric,
    }


def digest(items: Iterable[tuple[str, Any]]) -> str:
    """A short text that is another one for other values."""
    made = hashlib.sha256()
    for name, value in items:
        if isinstance(value, Tensor):
            made.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
            made.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        else:
            made.update(f"{name} {value!r}\n".encode())
    return made.hexdigest()[:16]
