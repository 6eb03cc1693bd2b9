"""Which class a model folder is loaded as, so that no head in its weights is lost."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from qdq_surgery.errors import ModelError
from qdq_surgery.qdqbert import classes as qdqbert
from qdq_surgery.safety.untrusted import DamagedError, parse_json, quoted, read_regular_file

__all__ = ["check_head", "model_class"]

#: The longest config that is read.
_MOST_BYTES = 1 << 22


def model_class(path: Path, name: str | None = None) -> type[PreTrainedModel]:
    """The class to load a folder as: the one asked for, or that its config names, or the base model of its type.

    Raises:
        ModelError: The config names none, or transformers has no such class.
    """
    config = _read(path)
    names = config.get("architectures") or []
    if name is None and isinstance(names, list) and names and isinstance(names[0], str):
        return _known(names[0], f"{path}/config.json names the class {quoted(names[0])}")
    if name is not None:
        return _known(name, f"the class '{name}' is asked for")
    kind = config.get("model_type")
    if not kind or not isinstance(kind, str):
        raise ModelError(
            f"{path}/config.json names no class under 'architectures' and no 'model_type'; say which class the "
            "model is, such as BertModel (--class CLASS), or save it again with save_pretrained"
        )
    try:
        base = MODEL_MAPPING[type(AutoConfig.from_pretrained(path, local_files_only=True))]
    except KeyError:
        base = None
    if isinstance(base, tuple):  # a type with several base models
        base = base[0]
    if base is None:
        raise ModelError(
            f"{path}/config.json names no class under 'architectures', and transformers has no base model of the type "
            f"{quoted(kind)}; say which class the model is (--class CLASS)"
        )
    found: type[PreTrainedModel] = base
    return found


def check_head(path: Path, model: PreTrainedModel, unexpected: list[str], name: str | None = None) -> str | None:
    """Refuse weights with a head that a class lacks which nobody named.

    Args:
        unexpected: Names of weights that the class does not have.
        name: The class that was asked for.

    Returns:
        A word on weights that a class lacks which somebody named.

    Raises:
        ModelError: There are such weights, and nobody named the class; names them, and the classes that have them.
    """
    if not unexpected:
        return None
    if name is not None or _read(path).get("architectures"):
        lost = f"{len(unexpected)} weights that {type(model).__name__} lacks ({_listed(unexpected)})"
        return f"{path} has {lost}; they are left out"
    fitting = _fitting(model, unexpected)
    classes = f"such as {', '.join(fitting)}" if fitting else "which has them"
    raise ModelError(
        f"{path}/config.json names no class under 'architectures', and {type(model).__name__} would lose "
        f"{len(unexpected)} weights ({_listed(unexpected)}); say which class the model is, {classes} (--class CLASS); "
        f"--class {type(model).__name__} leaves them out"
    )


def _read(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    try:
        config = parse_json(read_regular_file(file, _MOST_BYTES), str(file), _MOST_BYTES)
        return {key: item.value for key, item in config.entries().items()}
    except DamagedError as error:
        raise ModelError(f"{error}; save the model again with save_pretrained") from None


def _known(name: str, why: str) -> type[PreTrainedModel]:
    known = name.isidentifier()
    kind = (getattr(transformers, name, None) or getattr(qdqbert, name, None)) if known else None
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        near = get_close_matches(name, [each for each in dir(transformers) if _is_model(each)], n=1, cutoff=0.8)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ModelError(
            f"{why}, which transformers {transformers.__version__} lacks{hint}; name one that it has (--class CLASS), "
            "or load the model in Python and call qdq_surgery.convert(model)"
        )
    return kind


def _is_model(name: str) -> bool:
    """Whether a class of that name is a model, as far as its name tells: importing all of them takes minutes."""
    return name.endswith("Model") or "For" in name


def _listed(names: list[str]) -> str:
    return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")


def _fitting(model: PreTrainedModel, unexpected: list[str]) -> list[str]:
    """The classes of the model's type with exactly these weights on top."""
    found = []
    for name in dict.fromkeys(_classes(str(model.config.model_type))):
        kind = getattr(transformers, name, None)
        if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
            continue
        try:
            with torch.device("meta"):
                made: PreTrainedModel = kind(model.config)
        except Exception:  # a config that this class does not take: then it is not the model's
            continue
        own = {key for key in made.state_dict() if not key.startswith(f"{made.base_model_prefix}.")}
        tied = set(made._tied_weights_keys or ())  # a file holds what is tied once
        if own - tied <= set(unexpected) <= own:
            found.append(name)
    return found


def _classes(model_type: str) -> list[str]:
    """The names of an encoder's classes with a head, for a type of model."""
    return [
        name
        for mapping, names in vars(modeling_auto).items()
        if mapping.startswith("MODEL_FOR_") and mapping.endswith("_MAPPING_NAMES") and "CAUSAL" not in mapping
        for name in [names.get(model_type)]
        if isinstance(name, str)
    ]
