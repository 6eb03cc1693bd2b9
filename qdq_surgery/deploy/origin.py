"""The Hugging Face model that a file was made from, as the file's metadata tell."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import ModelOutput

from qdq_surgery.deploy.sites import METADATA
from qdq_surgery.errors import ModelError

__all__ = ["Origin", "describe", "read_origin"]


@dataclass(frozen=True)
class Origin:
    """What was exported.

    Attributes:
        name: The model's class, such as ``BertForQuestionAnswering``.
        model: That class in transformers; ``PreTrainedModel`` for a user's own class.
        config: The model's.
        output: Hugging Face's class of outputs.
        target: The runtime that the file was made for.
        rules: The rule set that the quantizers came from.
    """

    name: str
    model: type[PreTrainedModel]
    config: Any
    output: type[ModelOutput]
    target: str
    rules: str

    def rebuilt(self, outputs: Mapping[str, Any]) -> ModelOutput:
        """The output class with its fields; ``hidden_states.0`` and its like are put together to tuples."""
        tree: dict[Any, Any] = {}
        for name, value in outputs.items():
            *path, last = _path(name)
            branch = tree
            for part in path:
                branch = branch.setdefault(part, {})
            branch[last] = value
        return self.output(**{field: _tuples(value) for field, value in tree.items()})


def _path(name: str) -> list[str | int]:
    field, *items = name.split(".")
    return [field, *map(int, items)]


def _tuples(value: Any) -> Any:
    return tuple(_tuples(value[at]) for at in sorted(value)) if isinstance(value, dict) else value


def describe(model: PreTrainedModel, output_class: str) -> dict[str, str]:
    """What :func:`read_origin` reads, as metadata of a file.

    Args:
        output_class: Qualified name of what the model's forward returns.
    """
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)  # where it lay on the machine that exported it
    return {
        f"{METADATA}class": type(model).__name__,
        f"{METADATA}config": json.dumps(config),
        f"{METADATA}outputs": output_class,
    }


def read_origin(path: Path, metadata: Mapping[str, str], outputs: Sequence[str]) -> Origin:
    """What a file says that it was made from.

    Args:
        path: Of the file, for messages.
        metadata: The file's.
        outputs: Names of its outputs.

    Raises:
        ModelError: It was not written by ``export_onnx``, or is of classes that are not known here.
    """
    found = {key.removeprefix(METADATA): value for key, value in metadata.items() if key.startswith(METADATA)}
    missing = [key for key in ("class", "config", "outputs") if key not in found]
    if missing:
        raise ModelError(
            f"{path} does not say what model it is ('{METADATA}{missing[0]}' is not in its metadata); give a file "
            "that qdq_surgery.export_onnx wrote"
        )
    name = found["class"]
    kind = getattr(transformers, name, None)
    origin = Origin(
        name=name,
        model=kind if isinstance(kind, type) and issubclass(kind, PreTrainedModel) else PreTrainedModel,
        config=_config(path, found["config"]),
        output=_output_class(path, found["outputs"]),
        target=found.get("target", ""),
        rules=found.get("rules", ""),
    )
    _check_outputs(path, origin.output, outputs)
    return origin


def _config(path: Path, text: str) -> Any:
    try:
        options = json.loads(text)
        model_type = options["model_type"]
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{path} holds no config that can be read; export the model again") from error
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{path} holds a model of type '{model_type}', which transformers {transformers.__version__} lacks; "
            "install the version that it was exported with, or register its config with AutoConfig.register"
        )
    return CONFIG_MAPPING[model_type].from_dict(options)


def _output_class(path: Path, qualified: str) -> type[ModelOutput]:
    """A class of transformers, or of a module that is imported already: a file shall not choose what is imported."""
    module, _, name = qualified.rpartition(".")
    if not module.startswith("transformers.") and module not in sys.modules:
        raise ModelError(f"{path} returns a {qualified}; import {module or 'its module'} before loading the file")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ModelError(
            f"{path} returns a {qualified}, which is not found in transformers {transformers.__version__}; install the "
            "version that it was exported with"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, ModelOutput)):
        raise ModelError(f"{path} returns a {qualified}, which is no output class of transformers")
    return kind


def _check_outputs(path: Path, kind: type[ModelOutput], outputs: Sequence[str]) -> None:
    known = {field.name for field in fields(kind)}
    for name in outputs:
        if name.split(".")[0] not in known or not re.fullmatch(r"\w+(\.\d+)*", name):
            raise ModelError(
                f"{path} has an output '{name}', which the {kind.__name__} of transformers {transformers.__version__} "
                "lacks; install the version that it was exported with"
            )
