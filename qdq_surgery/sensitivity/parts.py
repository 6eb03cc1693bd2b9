"""The parts of a model that are measured, each a set of quantizers: sites, kinds of sites, encoder layers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from torch import nn
from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import planned_name
from qdq_surgery.match.plan import Site
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.trace.units import find_units

__all__ = ["KIND", "LAYER", "SITE", "Part", "layer_paths", "parts_of", "sees_channels", "sites_of"]

SITE: Final = "site"
KIND: Final = "kind"
LAYER: Final = "layer"

#: Their operands have the model's channels on the last axis.
_WITH_CHANNELS = frozenset({"linear", "add"})


@dataclass(frozen=True)
class Part:
    """Quantizers that are measured together.

    Attributes:
        what: :data:`SITE`, :data:`KIND` or :data:`LAYER`.
        name: The quantizer's, that of its rule and operand, or the path of the layer.
        layer: Index of the encoder layer of a site or a layer.
        quantizers: Their names in the model.
        homes: Paths of the encoder layers that they are in; ``None`` where one is in none.
    """

    what: str
    name: str
    layer: int | None
    quantizers: tuple[str, ...]
    homes: frozenset[str] | None

    @property
    def alone(self) -> str:
        """The name of its figure where nothing else is in INT8."""
        return f"{self.what} {self.name} alone"

    @property
    def left(self) -> str:
        """The name of its figure where nothing else is in float."""
        return f"{self.what} {self.name} left"


def layer_paths(model: nn.Module) -> dict[str, int]:
    """Index of each encoder layer by its path, in the order of the model."""
    return {path: index for path, index in find_units(model) if index is not None}


def sees_channels(site: Site | None) -> bool:
    """Whether the last axis of what a quantizer sees are the model's channels."""
    return site is not None and site.role == "input" and site.operator in _WITH_CHANNELS


def sites_of(model: PreTrainedModel, measured: Mapping[str, TensorQuantizer]) -> dict[str, Site | None]:
    """The plan's site of each quantizer; ``None`` for one that the plan knows nothing of."""
    planned = {site.quantizer: site for site in plan_of(model).sites}
    return {name: planned.get(planned_name(name, quantizer)) for name, quantizer in measured.items()}


def parts_of(model: PreTrainedModel, measured: Mapping[str, TensorQuantizer], wanted: Iterable[str]) -> list[Part]:
    """The parts that are wanted, each in the order of the model.

    Args:
        measured: The quantizers that quantize, by their names in the model.
        wanted: Of :data:`SITE`, :data:`KIND` and :data:`LAYER`.
    """
    layers = layer_paths(model)
    homes = {name: _home(name, layers) for name in measured}
    groups: dict[tuple[str, str, int | None], list[str]] = {}
    for name, site in sites_of(model, measured).items():
        home = homes[name]
        groups.setdefault((SITE, name, None if home is None else layers[home]), []).append(name)
        groups.setdefault((KIND, _kind(site), None), []).append(name)
        if home is not None:
            groups.setdefault((LAYER, home, layers[home]), []).append(name)
    wanted = set(wanted)
    return [
        Part(what, name, layer, tuple(own), _homes(homes[each] for each in own))
        for (what, name, layer), own in groups.items()
        if what in wanted
    ]


def _kind(site: Site | None) -> str:
    return "others" if site is None else f"{site.rule}({site.capture})"


def _home(name: str, layers: Iterable[str]) -> str | None:
    return next((path for path in layers if name.startswith(f"{path}.")), None)


def _homes(found: Iterable[str | None]) -> frozenset[str] | None:
    homes = set(found)
    return None if None in homes else frozenset(home for home in homes if home is not None)
