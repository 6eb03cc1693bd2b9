"""A Q/DQ pair of the file, in the words of the PyTorch model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

__all__ = ["METADATA", "Site", "dump_sites", "load_sites"]

#: Keys of the file's metadata begin with this.
METADATA = "qdq_surgery."


@dataclass
class Site:
    """One pair of QuantizeLinear and DequantizeLinear, or an int8 weight and its DequantizeLinear.

    Attributes:
        quantizers: Qualified names of the PyTorch quantizers that it stands for: more than one where they read one
            tensor with one scale.
        role: ``"input"`` or ``"weight"``.
        quantize: Name of the QuantizeLinear; ``None`` for a weight, which is stored as integers.
        dequantize: Name of the DequantizeLinear.
        value: Name of what the DequantizeLinear gives.
        factor: That value is ``factor`` times the fake-quantized value of PyTorch: not 1 where a scale of the
            attention was folded in.
        transposed: Whether a weight is stored as (in, out) rather than PyTorch's (out, in).
    """

    quantizers: list[str]
    role: str
    quantize: str | None
    dequantize: str
    value: str
    factor: float = 1.0
    transposed: bool = field(default=False)

    @property
    def name(self) -> str:
        """The first of its quantizers."""
        return self.quantizers[0]


def dump_sites(sites: Sequence[Site]) -> str:
    """As JSON, for the file's metadata."""
    return json.dumps([asdict(site) for site in sites])


def load_sites(text: str) -> list[Site]:
    """What :func:`dump_sites` wrote."""
    return [Site(**entry) for entry in json.loads(text)]
