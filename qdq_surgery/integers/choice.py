"""Which kernel multiplies where, and whether it does on this machine."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qdq_surgery.integers.int_mm import IntMMProduct
from qdq_surgery.integers.onednn import OneDNNProduct
from qdq_surgery.integers.product import SIGNED, Product, words_of
from qdq_surgery.integers.triton_product import TritonProduct

__all__ = ["PLACES", "PRODUCTS", "make_product", "moved", "product_on", "unsupported"]

#: By the type of a device, the quickest first.
PRODUCTS: dict[str, tuple[type[Product], ...]] = {"cpu": (OneDNNProduct,), "cuda": (TritonProduct, IntMMProduct)}

#: The same for people.
PLACES = "a CPU or an NVIDIA GPU"


def product_on(device: torch.device) -> type[Product]:
    """The kind of product that is taken on this device: the first one that suits it and runs, or else the last.

    Raises:
        KeyError: There is none.
    """
    *others, last = PRODUCTS[device.type]
    right = (kind for kind in others if kind.suits(device) and _problem(kind, device, torch.float32) is None)
    return next(right, last)


def make_product(integers: Tensor, scale: Tensor, step: Tensor, zero_point: int) -> Product:
    """The product for the device that the tensors are on.

    Raises:
        KeyError: There is none, which :func:`unsupported` says with words.
    """
    return product_on(integers.device)(integers, scale, step, zero_point)


def moved(product: Product, device: torch.device) -> Product:
    """The same product on another device; itself if it is there, as the kernel of that device."""
    if product.device == device and isinstance(product, product_on(device)):
        return product
    integers, scale, step = (each.to(device) for each in (product.integers(), product.scale, product.step))
    return make_product(integers, scale, step, product.zero_point)


def unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why integer products do not run on ``device`` with results in ``dtype``; ``None`` if they do."""
    if device.type not in PRODUCTS:
        return f"integer products run on {PLACES}, not on {device.type}"
    kind = product_on(device)
    if dtype not in kind.dtypes:
        return f"their results are {words_of(kind.dtypes)}, not {str(dtype).removeprefix('torch.')}"
    return _problem(kind, device, dtype)


@functools.cache
def _problem(kind: type[Product], device: torch.device, dtype: torch.dtype) -> str | None:
    """What decides is a product of the largest integers there are: it must be right to the last integer."""
    try:
        right = _is_right(kind, device, dtype)
    except torch.OutOfMemoryError:
        raise  # says nothing of the machine, and is not to be remembered
    except Exception as error:  # no oneDNN in this torch, no GPU, or whatever a kernel's compiler raises
        words = " ".join(str(error).split())
        return f"{kind.missing.format(torch.__version__)} ({words[:200]})"
    return None if right else kind.inexact


def _is_right(kind: type[Product], device: torch.device, dtype: torch.dtype) -> bool:
    rows = torch.tensor([[255], [0], [3]], dtype=torch.uint8, device=device).expand(3, 64)
    columns = torch.tensor([[127], [-128], [5]], dtype=torch.int8, device=device).expand(3, 64)
    ones, one = (torch.ones(size, dtype=torch.float32, device=device) for size in ((3,), ()))
    product, less = kind(columns, ones, one, SIGNED), SIGNED if kind.stored == torch.int8 else 0
    stored = (rows.int() - less).to(kind.stored)
    found = product(stored, None, torch.float32, "").cpu()
    product(stored, None, dtype, "gelu")
    wanted = (rows.cpu().int() - SIGNED) @ columns.cpu().int().t()
    right = [torch.equal(found.int(), wanted)]
    if kind.rounds:  # from far below the least integer to far above the largest
        integers = product.rounded(stored, None, "", one / 4096, SIGNED).cpu().int() + less
        right.append(torch.equal(integers, ((wanted / 4096).round() + SIGNED).clamp(0, 255).int()))
    rounding = kind.rounding()
    if rounding is not None:
        values = torch.tensor([-500.0, -1.5, 0.5, 2.5, 7.0, 500.0], dtype=dtype, device=device)
        right.append(rounding(values, one, -32, 95, -5).tolist() == [-37, -7, -5, -3, 2, 90])
    return all(right)
