"""Arguments beyond text, made from a model's config: boxes, pixels, regions of an image.

Each maker belongs to one name of an argument, and says by the config whether the model cannot do without it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qdq_surgery.hf.arguments import named_arguments

__all__ = ["make_others", "make_pixels"]

#: (config, shape of the token ids, generator) -> a tensor, or ``None`` if the model does without.
Maker = Callable[[Any, tuple[int, ...], torch.Generator], "Tensor | None"]

#: Regions of an image, for a model that takes what a detector found.
_REGIONS = 3


def make_others(model: nn.Module, config: Any, size: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """What the forward of ``model`` needs beside its texts.

    Args:
        config: That of the texts.
        size: Shape of the token ids.
    """
    names = named_arguments(model)
    made = {name: maker(config, size, generator) for name, maker in _MAKERS.items() if name in names}
    if "pixel_values" in names and (_is_required(names["pixel_values"]) or _looks_at_images(model)):
        made["pixel_values"] = make_pixels(model.config, size[0], generator)
    return {name: value for name, value in made.items() if value is not None}


def make_pixels(config: Any, batch: int, generator: torch.Generator) -> Tensor | None:
    """Images, (batch, channels, height, width); ``None`` if the config does not say how large they are."""
    config = getattr(config, "vision_config", None) or getattr(config, "image_config", None) or config
    size = getattr(config, "image_size", None)
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if not isinstance(height, int) or not isinstance(width, int):
        return None
    return torch.randn(batch, getattr(config, "num_channels", 3), height, width, generator=generator)


def _is_required(argument: inspect.Parameter) -> bool:
    return argument.default is inspect.Parameter.empty


def _looks_at_images(model: nn.Module) -> bool:
    """Whether a text alone is not enough: two towers that are compared, or one stream of both."""
    towers = hasattr(model, "get_text_features") and hasattr(model, "get_image_features")
    return towers or getattr(model.config, "model_type", None) == "vilt"


def _boxes(config: Any, size: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    """Where each token stands on its page: left, top, right, bottom; no two of a row alike."""
    if isinstance(corners := getattr(config, "dim_bbox", None), int):  # BROS: all corners, as fractions of the page
        return torch.rand(*size, corners, generator=generator)
    if (limit := getattr(config, "max_2d_position_embeddings", None)) is None:
        return None
    fractions = getattr(config, "model_type", None) == "udop"
    half = max(1, min(limit, 1000) // 2)
    corner, extent = (torch.randint(half, (*size, 2), generator=generator) for _ in range(2))
    boxes = torch.cat([corner, corner + extent], dim=-1)
    return boxes / (2 * half) if fractions else boxes


def _regions(config: Any, size: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    width = getattr(config, "visual_feat_dim", None)
    return None if width is None else torch.randn(size[0], _REGIONS, width, generator=generator)


def _region_places(config: Any, size: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    width = getattr(config, "visual_pos_dim", None)
    return None if width is None else torch.rand(size[0], _REGIONS, width, generator=generator)


_MAKERS: dict[str, Maker] = {"bbox": _boxes, "visual_feats": _regions, "visual_pos": _region_places}
