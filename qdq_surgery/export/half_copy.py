"""A copy of the model in half precision, for files whose every tensor is typed."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from qdq_surgery.errors import ExportError
from qdq_surgery.export.qparams import QParams

__all__ = ["half_copy"]

#: How many names a message holds.
_SHOWN = 12

#: Transformers' name for the frequencies of rotary positions, in whatever it is part of. The model computes angles in
#: float32 from them; from rounded frequencies they would be off by up to 1.3 radians at ModernBERT's 8192nd token.
_FREQUENCIES = "inv_freq"


def half_copy(qmodel: PreTrainedModel, qparams: Mapping[str, QParams]) -> PreTrainedModel:
    """A copy of ``qmodel`` in float16; rotary frequencies stay as they are.

    Args:
        qparams: By the quantizer's name.

    Raises:
        ExportError: Ranges or weights exceed the largest number that float16 has; names them all.
    """
    largest = torch.finfo(torch.float16).max
    ranges = [name for name, each in qparams.items() if each.largest() > largest]
    weights = [name for name, value in qmodel.named_parameters() if float(value.detach().abs().max()) > largest]
    for what, names in (("ranges of the quantizers", ranges), ("weights", weights)):
        if names:
            shown = ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "")
            raise ExportError(
                f"the {what} {shown} exceed {largest:.0f}, the largest number of half precision; export with "
                "precision='float32'"
            )
    made = copy.deepcopy(qmodel).half()
    kept = dict(qmodel.named_buffers())
    for path, module in made.named_modules():
        for name in [name for name in module._buffers if _FREQUENCIES in name]:
            module._buffers[name] = kept[f"{path}.{name}" if path else name].clone()
    return made
