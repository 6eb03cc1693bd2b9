"""Model folders of the run scripts: loading with the head that a task needs, and saving."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from qdq_surgery.checkpoint.report import REPORT_NAME
from qdq_surgery.cli.folder import is_converted, load_model, save_model
from qdq_surgery.errors import ModelError
from qdq_surgery.serve.model import OnnxModel, load_onnx
from tasks.errors import OptionError

__all__ = ["Head", "label_order", "load", "load_file", "load_teacher", "load_tokenizer", "save"]


@dataclass(frozen=True)
class Head:
    """What a task needs at the top of an encoder.

    Attributes:
        ending: Of the class's name, such as ``ForQuestionAnswering``.
        labels: Names of the classes in the data, sorted; none where the head has no classes.
    """

    ending: str
    labels: tuple[str, ...] = ()


def label_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Names of classes by their number: numbers by their value, words by the alphabet."""
    found = set(labels)
    return tuple(sorted(found, key=int) if all(label.isdecimal() for label in found) else sorted(found))


def load_tokenizer(folder: Path, *, words: bool) -> Any:
    """The fast tokenizer of a folder.

    Args:
        folder: Of a model or a tokenizer.
        words: Whether texts come as lists of words. A tokenizer in which a space belongs to the word after it then puts
            one before the first, too.

    Raises:
        ModelError: There is none, or it is a slow one.
    """
    options = {"add_prefix_space": True} if words and _begins_words_with_space(folder) else {}
    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        raise ModelError(f"{folder} has no tokenizer that can be loaded; give one with --tokenizer_name") from error
    if not tokenizer.is_fast:
        raise ModelError(
            f"{folder} has a slow tokenizer; places of tokens in the text need a fast one (tokenizer.json)"
        )
    return tokenizer


def _begins_words_with_space(folder: Path) -> bool:
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and "add_prefix_space" in json.loads(settings.read_text(encoding="utf-8"))


def load(folder: Path, head: Head) -> tuple[PreTrainedModel, bool]:
    """A model with the head wanted, and whether that head is a new one.

    A folder with another head, or none, gives its encoder; a folder with quantizers has to have the head.

    Raises:
        ModelError: The folder holds no such model.
        OptionError: Its head has other labels than the data.
    """
    if is_converted(folder) or _head_of(folder) == head.ending:
        with _quiet():
            model = load_model(folder)
        _check_head(folder, model, head)
        return model, False
    return _with_new_head(folder, head), True


def load_file(path: Path, runtime: str, head: Head) -> OnnxModel:
    """An exported model with the head wanted, on a runtime.

    Raises:
        ModelError: The file holds no such model, or the runtime cannot run it.
        OptionError: Its head has other labels than the data.
    """
    with _quiet():
        model = load_onnx(path, runtime)
    _check_head(path, model, head)
    return model


def load_teacher(folder: Path, head: Head, student: PreTrainedModel) -> PreTrainedModel:
    """A float model with the student's head.

    Raises:
        OptionError: It is quantized, or its head is another.
    """
    teacher, new = load(folder, head)
    if new:
        raise OptionError(f"--teacher {folder} has no trained {head.ending} head; fine-tune it with --fp32 first")
    if is_converted(folder):
        raise OptionError(f"--teacher {folder} is quantized; give the float model")
    if head.labels and teacher.config.id2label != student.config.id2label:
        raise OptionError(
            f"--teacher {folder} has the labels {list(teacher.config.id2label.values())}, the model has "
            f"{list(student.config.id2label.values())}; give a teacher of the same task"
        )
    return teacher


def save(model: PreTrainedModel, tokenizer: Any, source: Path, folder: Path, *, quantized: bool) -> None:
    """Write the model and its tokenizer into a folder, which may hold other files already."""
    folder.mkdir(parents=True, exist_ok=True)
    if not quantized:
        (folder / REPORT_NAME).unlink(missing_ok=True)
        with _quiet():
            model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as temporary:
        draft = Path(temporary) / "model"
        with _quiet():
            save_model(model, draft, source=source)
        for file in draft.iterdir():
            shutil.move(file, folder / file.name)


def _head_of(folder: Path) -> str:
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give a folder that model.save_pretrained(...) wrote")
    names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or [""]
    _, found, ending = str(names[0]).rpartition("For")
    return f"For{ending}" if found else ""


def _check_head(place: Path, model: PreTrainedModel | OnnxModel, head: Head) -> None:
    if not type(model).__name__.endswith(head.ending):
        raise ModelError(
            f"{place} holds a {type(model).__name__}, whose head cannot be replaced, and this script needs one with a "
            f"{head.ending} head; start from the float model"
        )
    own = list(model.config.id2label.values())
    missing = [label for label in head.labels if label not in own]
    if missing and own == [f"LABEL_{index}" for index in range(len(head.labels))]:
        # Nobody named them: they are the data's, in the order in which transformers' examples number them.
        _name_labels(model, head.labels)
    elif missing:
        raise OptionError(
            f"{place} knows the labels {own}, and the data has {missing} beside them; give data of the task that it "
            "was trained on, or start from the encoder without its head"
        )


def _name_labels(model: PreTrainedModel | OnnxModel, labels: Sequence[str]) -> None:
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


def _with_new_head(folder: Path, head: Head) -> PreTrainedModel:
    kind = getattr(transformers, f"AutoModel{head.ending}")
    names: dict[str, Any] = {}
    if head.labels:
        names["id2label"] = dict(enumerate(head.labels))
        names["label2id"] = {label: index for index, label in enumerate(head.labels)}
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(folder, local_files_only=True, **names)
            model, info = kind.from_pretrained(folder, config=config, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise ModelError(f"{folder} cannot be loaded: {reason[0] if reason else type(error).__name__}") from error
    own = f"{model.base_model_prefix}."
    lost = sorted(key for key in info["missing_keys"] if key.startswith(own) and ".pooler." not in key)
    if lost:
        raise ModelError(f"{folder} has no weights for {len(lost)} parameters of the encoder (first: {lost[0]})")
    loaded: PreTrainedModel = model
    return loaded.eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and its report of a new head's weights; the scripts say that in a line."""
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        transformers_logging.enable_progress_bar()
