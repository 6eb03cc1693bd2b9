"""The arguments of a call, as a Hugging Face model takes them, made into what a file takes.

What a runtime would make something else of than PyTorch does is refused here: OpenVINO computes with a row of the
embedding that is not there, and with a mask of another length than the tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qdq_surgery.errors import ModelError
from qdq_surgery.hf.config_facts import max_tokens
from qdq_surgery.onnx_file.origin import Origin
from qdq_surgery.targets.session import Port

__all__ = ["make_feed"]

_IDS, _MASK, _TYPES, _POSITIONS, _EMBEDS = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "position_ids",
    "inputs_embeds",
)

#: Model types whose forward takes zeros where token_type_ids are not given.
_ZERO_TYPES = frozenset(
    (
        "albert",
        "bert",
        "camembert",
        "deberta-v2",
        "electra",
        "mobilebert",
        "roberta",
        "roberta-prelayernorm",
        "xlm-roberta",
    )
)


def make_feed(path: Path, ports: Sequence[Port], origin: Origin, given: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """An array for each input of the file.

    Args:
        path: Of the file, for messages.
        ports: Its inputs.
        given: Tensors or arrays by name; ``None`` is as good as left out.

    Raises:
        ModelError: Something is missing, or not what the file takes, or what it does not take.
    """
    wanted = {port.name: port for port in ports}
    arrays: dict[str, NDArray[Any]] = {}
    for name, value in given.items():
        if value is None:
            continue
        if name in wanted:
            arrays[name] = _array(path, wanted[name], value)
        elif not _is_neutral(origin, name, value):
            raise ModelError(_surplus(path, name, tuple(wanted)))
    lead = _lead(arrays)
    for name in wanted:
        if name not in arrays:
            arrays[name] = _left_out(path, wanted[name], lead, origin)
    for port in ports:
        _check_shape(path, port, arrays[port.name].shape)
    _check_tokens(path, origin, arrays, lead)
    return {name: np.ascontiguousarray(arrays[name]) for name in wanted}


def _array(path: Path, port: Port, value: Any) -> NDArray[Any]:
    if isinstance(value, Tensor):
        if value.device.type != "cpu":
            raise ModelError(f"'{port.name}' is on {value.device} and {path} runs on the CPU; move it with .to('cpu')")
        # NumPy has no bfloat16.
        value = (value.float() if value.dtype is torch.bfloat16 else value).detach().numpy()
    if not isinstance(value, np.ndarray):
        raise ModelError(f"'{port.name}' is a {type(value).__name__}; give a torch.Tensor or a numpy.ndarray")
    if not np.can_cast(value.dtype, port.dtype, casting="safe"):
        raise ModelError(f"'{port.name}' is of {value.dtype}, and {path} takes {port.dtype}; convert it first")
    return value.astype(port.dtype, copy=False)


def _lead(arrays: Mapping[str, NDArray[Any]]) -> tuple[int, ...] | None:
    """The shape of the tokens: batch and length, between them the number of choices if there are any."""
    if _IDS in arrays:
        return arrays[_IDS].shape
    return arrays[_EMBEDS].shape[:-1] if _EMBEDS in arrays else None


def _is_neutral(origin: Origin, name: str, value: Any) -> bool:
    """Whether the model would compute the same without this."""
    if name == "use_cache":
        return value is False
    try:
        numbers = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    if name == _TYPES:
        return origin.config.model_type in _ZERO_TYPES and not numbers.any()
    return name == _MASK and bool((numbers == 1).all())


def _surplus(path: Path, name: str, inputs: tuple[str, ...]) -> str:
    if "label" in name or name in ("start_positions", "end_positions"):
        return f"{path} computes no loss: leave '{name}' out, and compute the loss from what it returns"
    if name == "use_cache":
        return f"{path} keeps no cache; leave 'use_cache' out"
    return (
        f"{path} has no input '{name}'; it takes {', '.join(inputs)}. Leave it out, or export the model with "
        f"example_inputs that hold '{name}'"
    )


def _left_out(path: Path, port: Port, lead: tuple[int, ...] | None, origin: Origin) -> NDArray[Any]:
    """What the model itself takes for an argument that is not given."""
    if lead is not None and port.name == _MASK:
        return np.ones(lead, port.dtype)
    if lead is not None and port.name == _TYPES and origin.config.model_type in _ZERO_TYPES:
        return np.zeros(lead, port.dtype)
    raise ModelError(f"{path} needs '{port.name}', which is not given")


def _check_shape(path: Path, port: Port, shape: tuple[int, ...]) -> None:
    fits = len(shape) == len(port.shape) and all(
        size in (None, own) for size, own in zip(port.shape, shape, strict=True)
    )
    if not fits:
        takes = ", ".join("any" if size is None else str(size) for size in port.shape)
        fixed = "" if None in port.shape else "; export with dynamic=True for other sizes"
        raise ModelError(f"'{port.name}' has shape {shape}, and {path} takes ({takes}){fixed}")


def _check_tokens(path: Path, origin: Origin, arrays: Mapping[str, NDArray[Any]], lead: tuple[int, ...] | None) -> None:
    if lead is None:
        return
    for name in (_MASK, _TYPES, _POSITIONS):
        if name in arrays and arrays[name].shape != lead:
            raise ModelError(
                f"'{name}' has shape {arrays[name].shape}, and the tokens are {lead}; give one for each token"
            )
    longest = max_tokens(origin.config)
    if longest is not None and lead[-1] > longest:
        raise ModelError(f"{lead[-1]} tokens are given, and {path} knows {longest} positions; truncate the texts")
    for name, limit in ((_IDS, "vocab_size"), (_TYPES, "type_vocab_size")):
        size = getattr(origin.config, limit, None)
        if name in arrays and size and arrays[name].size:
            low, high = int(arrays[name].min()), int(arrays[name].max())
            if low < 0 or high >= size:
                found = low if low < 0 else high
                raise ModelError(
                    f"'{name}' holds {found}, and {path} knows 0 to {size - 1} ({limit} of its config); use the "
                    "model's own tokenizer"
                )
