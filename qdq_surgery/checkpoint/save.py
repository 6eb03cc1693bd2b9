"""``save_pretrained`` of converted models: the folder holds the old model or the new one, whatever comes between.

transformers writes its files one after the other, over those of the model that is there. Here it writes into a folder
inside, and its files are moved into place, each at once. What says which model the folder holds is ``config.json``: it
changes at once, and names the weights that it belongs to until they have their usual names, too:

    weights under names of their own -> config.json that names them -> the other files, the weights under their usual
    names, what is left of the old model goes -> config.json that names none
"""

from __future__ import annotations

import copy
import inspect
import json
import os
import re
import secrets
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import refuse_borrowed
from qdq_surgery.errors import ModelError
from qdq_surgery.safety.given_path import given_path
from qdq_surgery.safety.transaction import all_or_nothing

__all__ = ["SAVE_ATTRIBUTE", "SavePretrained", "replace_model", "without_aliases"]

#: The attribute of a model that holds its :class:`SavePretrained`.
SAVE_ATTRIBUTE = "save_pretrained"

#: How the names of the folders begin that are written before they are moved.
_DRAFT = ".qdq-surgery-"

_CONFIG = "config.json"
_INDEX = ".index."

#: The key of a config that names the weights' file, if it is another than the usual: transformers' own.
_NAMED = "transformers_weights"

#: Weights in safetensors under their usual names, with shards, index and variant; and under names of their own.
_WEIGHTS = re.compile(r"model(\.[^.-]+)?(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(\.[^.]+)?\.json")
_OWN = re.compile(r"model-[0-9a-f]{16}-.*\.safetensors(\.index\.json)?")


class SavePretrained:
    """The model's ``save_pretrained``, as its attribute: transformers' own, whose files take their places at the end.

    Args:
        model: A converted model, whose ``hf_quantizer`` is told what is being saved where.
    """

    def __init__(self, model: PreTrainedModel, twin: PreTrainedModel | None = None) -> None:
        # Weakly: a model that holds itself is freed late.
        self._model = weakref.ref(model)
        # But in ``convert(model).save_pretrained(folder)`` the model is gone when the call begins. Then this is saved:
        # another object of its class, around the same contents.
        self._twin: PreTrainedModel = _twin_of(model) if twin is None else twin
        self.__doc__ = type(model).save_pretrained.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        own = inspect.signature(self._own())
        return own.replace(parameters=[*own.parameters.values()][1:])

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        model = self._alive()
        refuse_borrowed(model, "copy")
        twin = copy.deepcopy(_twin_of(model), memo)  # around the contents of the copy
        return SavePretrained(memo.get(id(model), twin), twin)

    def __reduce__(self) -> tuple[Any, ...]:
        model = self._alive()
        return SavePretrained, (model, _twin_of(model))

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save the model.

        Raises:
            ModelError: ``save_directory`` is no folder, or a file in it that would be replaced is no regular file; or
                the model is being calibrated or measured.
        """
        model, own = self._alive(), self._own()
        refuse_borrowed(model, "saved model")
        bound = inspect.signature(own).bind(model, save_directory, *args, **kwargs).arguments
        given = {**dict([*bound.items()][2:]), **bound.get("kwargs", {})}
        given.pop("kwargs", None)
        if getattr(model, "_hf_peft_config_loaded", False) or given.get("distributed_checkpoint"):
            return own(model, save_directory, **given)  # no files of a whole model
        folder = given_path(save_directory, "a folder")
        new = _made(folder)
        if given.get("push_to_hub"):
            given.setdefault("repo_id", folder.absolute().name)
        try:
            with all_or_nothing(model), tempfile.TemporaryDirectory(dir=folder, prefix=_DRAFT) as temporary:
                main = given.get("is_main_process", True)
                with model.hf_quantizer.saving(Path(temporary) if main else None, given.get("state_dict")):
                    own(model, temporary, **given)
                replace_model(Path(temporary), folder)
        except OSError as error:
            raise ModelError(f"the model cannot be saved in {folder}: {error.strerror or error}") from error
        finally:
            if new and not any(folder.iterdir()):
                folder.rmdir()
        return None

    def _alive(self) -> PreTrainedModel:
        return self._model() or self._twin

    def _own(self) -> Callable[..., Any]:
        own: Callable[..., Any] = type(self._alive()).save_pretrained
        return own


def _made(folder: Path) -> bool:
    """Make a folder for a model, unless it is there; returns whether it was not.

    Raises:
        ModelError: There cannot be one.
    """
    if "\0" in str(folder):
        raise ModelError(f"{str(folder)!r} holds a NUL character; give the name of a folder to save the model in")
    try:
        new = not folder.exists()
        if not new and not folder.is_dir():
            raise ModelError(f"{folder} is a file; give the name of a folder to save the model in")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(f"the model cannot be saved in {folder}: {error.strerror or error}; give another") from error
    return new


def _twin_of(model: PreTrainedModel) -> PreTrainedModel:
    cls: type[PreTrainedModel] = type(model)
    twin = object.__new__(cls)
    vars(twin).update((name, value) for name, value in vars(model).items() if name != SAVE_ATTRIBUTE)
    return twin


def without_aliases(model: PreTrainedModel, weights: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """The weights to save without those of modules that hang in a second place, which transformers refuses to save.

    Args:
        weights: A state dict; ``None``: the model's own.

    Returns:
        ``weights`` itself where no module does.
    """
    first: dict[int, str] = {}
    again = {
        path: first[id(module)]
        for path, module in model.named_modules(remove_duplicate=False)
        if first.setdefault(id(module), path) != path
    }
    if not again:
        return weights
    every = model.state_dict() if weights is None else weights

    def is_alias(name: str) -> bool:
        path, _, own = name.rpartition(".")
        other = every.get(f"{again[path]}.{own}") if path in again else None
        return other is not None and other.data_ptr() == every[name].data_ptr()

    return {name: value for name, value in every.items() if not is_alias(name)}


def replace_model(source: Path, folder: Path) -> None:
    """Move the files of a model from ``source``, a folder inside ``folder``, into ``folder``.

    Raises:
        ModelError: A file that would be replaced is a link, or otherwise no regular file; nothing is changed then.
    """
    files = sorted(path.name for path in source.iterdir())
    weights = [name for name in files if _WEIGHTS.fullmatch(name)]
    stale = [name for name in os.listdir(folder) if _stale(name, weights) and name not in files]
    _check_regular(folder, [*files, *stale])
    others = [name for name in files if name not in weights and name != _CONFIG]
    old = (folder / _CONFIG).exists()
    if _CONFIG in files and old:
        config = (source / _CONFIG).read_text(encoding="utf-8")
        first = _move_under_own_names(source, folder, weights)
        _write(folder, _CONFIG, json.dumps({**json.loads(config), _NAMED: first}, indent=2, sort_keys=True))
        # From here on the folder holds the new model.
        for name in (name for name in weights if _INDEX not in name):
            _link(folder / _own_name(first, name), folder / name)
        others += [name for name in weights if _INDEX in name]
    else:
        others += weights
    for name in others:
        os.replace(source / name, folder / name)
    # Before the config names none: a loader would take the old file rather than new shards.
    _remove(folder, stale)
    if _CONFIG in files:
        os.replace(source / _CONFIG, folder / _CONFIG)
        _remove(folder, filter(_OWN.fullmatch, os.listdir(folder)))
        for left in folder.glob(f"{_DRAFT}*"):  # of a saving that was killed
            if left != source:
                shutil.rmtree(left, ignore_errors=True)


def _remove(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)


def _move_under_own_names(source: Path, folder: Path, weights: Iterable[str]) -> str:
    """Move weights into ``folder`` under names that none has; returns the one that a loader starts from."""
    start = next((name for name in weights if _INDEX in name), None)
    stem = f"model-{secrets.token_hex(8)}-"
    for name in weights:
        if _INDEX not in name:
            _link(source / name, folder / f"{stem}{name}")
    if start is None:
        return f"{stem}{next(iter(weights))}"
    index = json.loads((source / start).read_text(encoding="utf-8"))
    index["weight_map"] = {name: f"{stem}{file}" for name, file in index["weight_map"].items()}
    _write(folder, f"{stem}model.safetensors.index.json", json.dumps(index))
    return f"{stem}model.safetensors.index.json"


def _own_name(first: str, name: str) -> str:
    return f"{first[: len('model-') + 17]}{name}"


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source``, at once, in the place of what is there."""
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        try:
            os.link(source, draft)
        except OSError:  # a file system without hard links
            shutil.copyfile(source, draft)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)


def _write(folder: Path, name: str, text: str) -> None:
    draft = folder / f".{name}.{secrets.token_hex(4)}"
    try:
        draft.write_text(text + "\n", encoding="utf-8")
        os.replace(draft, folder / name)
    finally:
        draft.unlink(missing_ok=True)


def _stale(name: str, weights: Iterable[str]) -> bool:
    """Whether a file holds weights that the new ones replace: of the same variant, whole or in shards."""
    found = _WEIGHTS.fullmatch(name)
    return found is not None and any(
        _variant(found) == _variant(own) for own in map(_WEIGHTS.fullmatch, weights) if own
    )


def _variant(found: re.Match[str]) -> str | None:
    return found[1] or found[3]


def _check_regular(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        path = folder / name
        if path.is_symlink() or (path.exists() and not path.is_file()):
            what = f"a link to {os.readlink(path)}" if path.is_symlink() else "no regular file"
            raise ModelError(f"{path} is {what}, which is not replaced; remove it, or save the model in another folder")
