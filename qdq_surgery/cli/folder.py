"""Model folders for the command line and the scripts: loaded with clear errors, written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from qdq_surgery.checkpoint.config import QUANT_METHOD
from qdq_surgery.checkpoint.preflight import check_files, check_size
from qdq_surgery.cli.heads import check_head, model_class
from qdq_surgery.errors import AlreadyConvertedError, ModelError, QdqSurgeryError
from qdq_surgery.match.site_names import STATE_SUFFIXES
from qdq_surgery.safety.untrusted import DamagedError, parse_json, read_regular_file
from qdq_surgery.safety.whole_folder import check_new, whole_folder
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.texts.tokenizers import copy_tokenizer

#: The longest config that is looked at, in bytes.
_MOST_CONFIG = 1 << 22

__all__ = ["is_converted", "load_model", "save_model"]


def load_model(
    folder: str | Path, kind: str | None = None, note: Callable[[str], None] | None = None
) -> PreTrainedModel:
    """Load a model with the head that it was saved with, in eval mode, from the folder alone.

    A folder of a converted model gives the converted model, with its ranges.

    Args:
        kind: The name of its class; left out, the one that its config names, or its type's if the weights have no head.
        note: Is told of weights that are left out.

    Raises:
        ModelError: The folder is none that ``save_pretrained`` wrote; says what is missing.
    """
    path = Path(folder)
    if not str(folder) or not path.is_dir():
        raise ModelError(f"{folder or 'an empty text'} is no folder; give one that model.save_pretrained(...) wrote")
    if not (path / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give a folder that model.save_pretrained(...) wrote")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise ModelError(f"{folder} has no weights (*.safetensors); save the model there with save_pretrained")
    before = transformers_logging.get_verbosity()
    try:
        transformers_logging.set_verbosity_error()  # what it would report is checked here
        cls = model_class(path, kind)
        check_size(cls, path, check_files(path))
        loaded = cls.from_pretrained(path, local_files_only=True, output_loading_info=True)
    except QdqSurgeryError:
        raise
    except Exception as error:  # whatever a damaged folder makes of transformers, torch and safetensors
        reason = str(error).strip().splitlines()
        raise ModelError(f"{folder} cannot be loaded: {reason[0] if reason else type(error).__name__}") from error
    finally:
        transformers_logging.set_verbosity(before)
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    unexpected = sorted(str(key) for key in info.get("unexpected_keys", ()))
    left = check_head(path, model, [key for key in unexpected if not key.endswith(STATE_SUFFIXES)], kind)
    _check_weights(folder, type(model).__name__, info)
    if left is not None and note is not None:
        note(left)
    model.eval()
    return model


def is_converted(folder: str | Path) -> bool:
    """Whether the model in a folder has quantizers, by its config."""
    try:
        config = parse_json(read_regular_file(Path(folder) / "config.json", _MOST_CONFIG), "config.json").entries()
        own = config["quantization_config"].entries()
        return bool(own["quant_method"].value == QUANT_METHOD)
    except (OSError, DamagedError, KeyError):
        return False


def _check_weights(folder: str | Path, name: str, info: dict[str, Any]) -> None:
    ranges = [str(key) for key in info.get("unexpected_keys", ()) if str(key).endswith(STATE_SUFFIXES)]
    if ranges:
        raise AlreadyConvertedError(
            f"{folder} holds ranges of {len(ranges)} quantizers (first: {ranges[0]}), but its config says nothing of "
            "them; give the float model"
        )
    for what in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(what, ()))
        if keys:
            raise ModelError(
                f"{folder} has no fitting weights for {len(keys)} parameters of {name} (first: {keys[0]}); save the "
                "model with the head that its config names"
            )


def save_model(qmodel: PreTrainedModel, folder: str | Path, source: str | Path | None = None) -> None:
    """Write a converted model with ``save_pretrained``, and the tokenizer of ``source`` beside it.

    The folder appears whole or not at all.

    Raises:
        ModelError: The model is not converted, or the folder exists and is not empty.
    """
    check_new(folder)
    plan_of(qmodel)
    with whole_folder(folder) as draft:
        qmodel.save_pretrained(draft)
        if source is not None:
            copy_tokenizer(source, draft)
