"""Which kernel multiplies where, and whether it does on this machine."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qdq_surgery.integers.int_mm import IntMMProduct
from qdq_surgery.integers.onednn import OneDNNProduct
from qdq_surgery.integers.product import SIGNED, Product, words_of

__all__ = ["PLACES", "PRODUCTS", "make_product", "moved", "unsupported"]

#: By the type of a device.
PRODUCTS: dict[str, type[Product]] = {"cpu": OneDNNProduct, "cuda": IntMMProduct}

#: The same for people.
PLACES = "a CPU or an NVIDIA GPU"


def make_product(integers: Tensor, scale: Tensor, step: Tensor, zero_point: int) -> Product:
    """The product for the device that the tensors are on.

    Raises:
        KeyError: There is none, which :func:`unsupported` says with words.
    """
    return PRODUCTS[integers.device.type](integers, scale, step, zero_point)


def moved(product: Product, device: torch.device) -> Product:
    """The same product on another device; itself if it is there, as the kernel of that device."""
    if product.device == device and isinstance(product, PRODUCTS[device.type]):
        return product
    integers, scale, step = (each.to(device) for each in (product.integers(), product.scale, product.step))
    return make_product(integers, scale, step, product.zero_point)


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why integer products do not run on ``device`` with results in ``dtype``; ``None`` if they do."""
    kind = PRODUCTS.get(device.type)
    if kind is None:
        return f"integer products run on {PLACES}, not on {device.type}"
    if dtype not in kind.dtypes:
        return f"their results are {words_of(kind.dtypes)}, not {str(dtype).removeprefix('torch.')}"
    return _problem(kind, device, dtype)


@functools.cache
def _problem(kind: type[Product], device: torch.device, dtype: torch.dtype) -> str | None:
    """What decides is a product of the largest integers there are: it must be right to the last integer."""
    try:
        rows = torch.tensor([[255], [0], [3]], dtype=torch.uint8, device=device).expand(3, 64)
        columns = torch.tensor([[127], [-128], [5]], dtype=torch.int8, device=device).expand(3, 64)
        ones, one = (torch.ones(size, dtype=torch.float32, device=device) for size in ((3,), ()))
        product = kind(columns, ones, one, SIGNED)
        stored = (rows.int() - (SIGNED if kind.stored == torch.int8 else 0)).to(kind.stored)
        found = product(stored, None, torch.float32, "").cpu()
        product(stored, None, dtype, "gelu")
    except torch.OutOfMemoryError:
        raise  # says nothing of the machine, and is not to be remembered
    except (RuntimeError, NotImplementedError, AttributeError, AssertionError) as error:
        # There is no oneDNN in this torch, no such kernel, no GPU (of which a torch without CUDA raises the last one).
        words = " ".join(str(error).split())
        return f"{kind.missing.format(torch.__version__)} ({words[:200]})"
    wanted = (rows.cpu().int() - SIGNED) @ columns.cpu().int().t()
    return None if torch.equal(found.int(), wanted) else kind.inexact
