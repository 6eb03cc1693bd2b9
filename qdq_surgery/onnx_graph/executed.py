"""What a runtime made of a file, in the same words for every runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qdq_surgery.onnx_file.metadata import Site

__all__ = ["Executed", "Kernel", "Leftover", "named"]


@dataclass(frozen=True)
class Kernel:
    """What runs one product of the file.

    Attributes:
        precision: ``"int8"``: integers times integers. ``"weights"``: only the weight is kept in integers. ``"float"``.
            ``"constant"``: computed once, when the file is opened. ``"hidden"``: inside a kernel that does not tell.
            ``"unknown"``: not found.
        executed: The kernel and its types, in the runtime's words.
        why: What is to be said about it, for ``"hidden"`` and ``"unknown"``.
    """

    precision: str
    executed: str
    why: str = ""


@dataclass(frozen=True)
class Leftover:
    """A Q/DQ that the runtime still computes, and that no integer kernel needs.

    Attributes:
        quantizers: Names of the quantizers in PyTorch; none where the runtime does not tell.
        node: The runtime's name of the node.
        why: Why it is work for nothing.
    """

    quantizers: tuple[str, ...]
    node: str
    why: str


@dataclass(frozen=True)
class Executed:
    """What a runtime made of a file.

    Attributes:
        version: Of the runtime; empty where it is not told.
        kernels: By the name of the product in the file, for all of them.
        leftover: Q/DQ left over.
        steps: Quantizers whose rounding is a step of its own in front of an integer kernel.
        unclaimed: Products of the runtime that belong to none of the file.
    """

    version: str
    kernels: Mapping[str, Kernel]
    leftover: Sequence[Leftover] = field(default=())
    steps: Sequence[str] = field(default=())
    unclaimed: Sequence[str] = field(default=())


def named(site: Site | None, module: str = "") -> tuple[str, ...]:
    """The quantizers of a pair; of those that share it, the ones of the ``module`` that reads it, if there are any."""
    if site is None:
        return ()
    own = tuple(name for name in site.quantizers if name.rpartition(".")[0] == module)
    return own or tuple(site.quantizers)
