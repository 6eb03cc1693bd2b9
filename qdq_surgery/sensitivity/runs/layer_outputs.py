"""Encoder layers that give again what they gave before, in place of being run.

A run in which only later layers differ from an earlier run has the same values up to there. Whether a model is one in
which nothing else depends on its layers being run is not guessed: one run that leaves them out is compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from qdq_surgery.safety.transaction import put_back_after

__all__ = ["LayerOutputs", "kept_outputs", "same_tensors", "without_running"]

_FORWARD = "forward"


@dataclass
class LayerOutputs:
    """What the encoder layers of a model gave in one run.

    Attributes:
        order: Paths of the layers, as they were called.
        outputs: By path.
    """

    order: list[str] = field(default_factory=list)
    outputs: dict[str, Any] = field(default_factory=dict)
    _versions: list[tuple[Tensor, int]] = field(default_factory=list)
    _known: bool = True

    def keep(self, path: str, output: Any) -> None:
        """Keep what a layer returns, and how often its tensors were written to."""
        tensors = _tensors(output)
        self._known = self._known and tensors is not None
        self._versions += [(each, each._version) for each in tensors or ()]
        self.order.append(path)
        self.outputs[path] = output

    @property
    def usable(self) -> bool:
        """Whether each layer was called once and returned tensors, and nothing has been written to them since."""
        once = len(self.order) == len(self.outputs)
        return once and self._known and all(each._version == version for each, version in self._versions)

    def before(self, homes: frozenset[str] | None) -> tuple[str, ...]:
        """The layers that ran before the first of ``homes``; none where some of these are in no layer, or did not run.

        Args:
            homes: As in :class:`~qdq_surgery.sensitivity.parts.Part`.
        """
        if not homes or not self.usable or not homes <= self.outputs.keys():
            return ()
        return tuple(self.order[: min(map(self.order.index, homes))])


@contextmanager
def kept_outputs(layers: Mapping[str, nn.Module]) -> Iterator[LayerOutputs]:
    """What ``layers`` return while this holds."""
    kept = LayerOutputs()

    def watched(path: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)
            kept.keep(path, output)
            return output

        return run

    with _in_place_of_forward(layers, watched):
        yield kept


@contextmanager
def without_running(layers: Mapping[str, nn.Module], kept: LayerOutputs, skipped: Iterable[str]) -> Iterator[None]:
    """While this holds, the ``skipped`` among ``layers`` are not run: they return what is kept of them."""

    def given(path: str, _: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *_, **__: kept.outputs[path]

    with _in_place_of_forward({path: layers[path] for path in skipped}, given):
        yield


@contextmanager
def _in_place_of_forward(
    layers: Mapping[str, nn.Module], make: Callable[[str, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Each layer has another forward of its own; its hooks run as they do."""
    before = {path: vars(layer).get(_FORWARD) for path, layer in layers.items()}

    def put_back() -> None:
        for path, own in before.items():
            if own is None:
                vars(layers[path]).pop(_FORWARD, None)
            else:
                vars(layers[path])[_FORWARD] = own

    with put_back_after(put_back):
        for path, layer in layers.items():
            vars(layer)[_FORWARD] = make(path, layer.forward)
        yield


def _tensors(value: Any) -> list[Tensor] | None:
    """All tensors in what a layer returned; ``None`` if it holds something of which that cannot be told."""
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return []
    if type(value) not in (tuple, list):
        return None
    parts = [_tensors(each) for each in value]
    return None if None in parts else [each for part in parts for each in part or ()]


def same_tensors(one: Any, other: Any) -> bool:
    """Whether two outputs of a model are equal to the bit; NaN is equal to nothing."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, Mapping):
        same = isinstance(other, Mapping) and list(one) == list(other)
        return same and all(same_tensors(value, other[name]) for name, value in one.items())
    if isinstance(one, (tuple, list)):
        same = isinstance(other, (tuple, list)) and len(one) == len(other)
        return same and all(map(same_tensors, one, other))
    return type(one) is type(other)
