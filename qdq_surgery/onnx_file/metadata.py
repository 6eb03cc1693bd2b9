"""The entries that a file has of us: read under a budget, and of the types that their readers rely on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_file.sites import METADATA
from qdq_surgery.safety.untrusted import quoted, read_json_text

__all__ = ["own_entries", "read_config"]

#: Numbers of a config that are computed with here.
_NUMBERS = (
    "hidden_size",
    "max_position_embeddings",
    "num_attention_heads",
    "pad_token_id",
    "type_vocab_size",
    "vocab_size",
)
_LARGEST = 2**40


def own_entries(properties: Iterable[tuple[str, str]], where: str) -> dict[str, str]:
    """The entries of a file's metadata that ``export_onnx`` wrote, without their prefix.

    Raises:
        ExportError: One stands twice.
    """
    found: dict[str, str] = {}
    for key, value in properties:
        name = key.removeprefix(METADATA)
        if name == key:
            continue
        if name in found:
            raise ExportError(f"{where} has {quoted(key)} twice in its metadata; export the model again")
        found[name] = value
    return found


def read_config(text: str, where: str) -> dict[str, Any]:
    """The config of the model.

    Args:
        where: What the text is of, as the subject of a message.

    Raises:
        ExportError: It is none.
    """
    try:
        config = read_json_text(text, where="it")
    except ValueError as error:
        raise ExportError(f"{where} holds no config that can be read: {error}; export the model again") from error
    if not isinstance(config, dict):
        raise ExportError(f"{where} holds no config that can be read: it is no object; export the model again")
    for name in _NUMBERS:
        value = config.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or abs(value) > _LARGEST):
            raise ExportError(
                f"{where} holds no config that can be read: '{name}' is {quoted(value)}; export the model again"
            )
    kind = config.get("model_type")
    if kind is not None and not isinstance(kind, str):
        raise ExportError(
            f"{where} holds no config that can be read: 'model_type' is {quoted(kind)}; export the model again"
        )
    return config
