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

from qdq_surgery.errors import ExportError, ModelError
from qdq_surgery.hf.config_facts import max_tokens
from qdq_surgery.onnx_file.metadata import METADATA, own_entries, read_config
from qdq_surgery.safety.untrusted import quoted

__all__ = ["Origin", "describe", "read_origin"]

#: Where transformers has its output classes; its other modules are not for a file to import.
_OUTPUTS = re.compile(r"transformers\.(modeling_outputs|models\.\w+\.modeling_\w+)")
#: A field of the output, and places in tuples.
_NAME = re.compile(r"[^\W\d]\w*(\.[0-9]{1,4})*")


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
    found = own_entries(metadata.items(), str(path))
    missing = [key for key in ("class", "config", "outputs") if key not in found]
    if missing:
        raise ModelError(
            f"{path} does not say what model it is ('{METADATA}{missing[0]}' is not in its metadata); give a file "
            "that qdq_surgery.export_onnx wrote"
        )
    name = found["class"]
    if not name.isidentifier():
        raise ModelError(f"{path} is of a class {quoted(name)}, which can be none; export the model again")
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
        options = read_config(text, str(path))
    except ExportError as error:
        raise ModelError(str(error)) from error
    model_type = options.get("model_type")
    if model_type is None:
        raise ModelError(f"{path} holds no config that can be read: it has no 'model_type'; export the model again")
    if model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"{path} holds a model of type {quoted(model_type)}, which transformers {transformers.__version__} lacks; "
            "install the version that it was exported with, or register its config with AutoConfig.register"
        )
    try:
        config = CONFIG_MAPPING[model_type].from_dict(options)
        max_tokens(config)
    except Exception as error:  # whatever a config class makes of values that it does not expect
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{path} holds no config that can be read: {reason}; export the model again") from error
    return config


def _output_class(path: Path, qualified: str) -> type[ModelOutput]:
    """A class of transformers, or of a module that is imported already: a file shall not choose what is imported."""
    module, _, name = qualified.rpartition(".")
    if not all(part.isidentifier() for part in qualified.split(".")):
        raise ModelError(f"{path} returns {quoted(qualified)}, which can be no class; export the model again")
    if not _OUTPUTS.fullmatch(module) and module not in sys.modules:
        raise ModelError(f"{path} returns a {qualified}; import {module or 'its module'} before loading the file")
    try:
        kind = vars(sys.modules.get(module) or importlib.import_module(module))[name]
    except (ImportError, KeyError, RuntimeError) as error:
        raise ModelError(
            f"{path} returns a {qualified}, which is not found in transformers {transformers.__version__}; install the "
            "version that it was exported with"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, ModelOutput)):
        raise ModelError(f"{path} returns a {qualified}, which is no output class of transformers")
    return kind


def _check_outputs(path: Path, kind: type[ModelOutput], outputs: Sequence[str]) -> None:
    known = {field.name for field in fields(kind)}
    # A field is one tensor or a tuple: no name begins another.
    whole = [name for name in outputs if any(other.startswith(f"{name}.") for other in outputs)]
    for name in outputs:
        if name.split(".")[0] not in known or not _NAME.fullmatch(name) or name in whole:
            raise ModelError(
                f"{path} has an output {quoted(name)}, which the {kind.__name__} of transformers "
                f"{transformers.__version__} lacks; install the version that it was exported with"
            )
