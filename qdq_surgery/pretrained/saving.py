"""``save_pretrained`` of a converted model writes its report, too.

transformers' plug-in for quantization methods is asked for the weights, but not told the folder. So the model's own
``save_pretrained`` says which one it is while it runs, and the plug-in writes beside the weights.
"""

from __future__ import annotations

import functools
import os
import weakref
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from qdq_surgery.errors import ModelError
from qdq_surgery.pretrained.report import write_report

__all__ = ["forget_saving", "keep_saving", "write_beside"]

_FOLDER: ContextVar[Path | None] = ContextVar("folder", default=None)


class _Save:
    """The ``save_pretrained`` of one model. It survives copies and pickles of the model, and does not keep it alive."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.reference = weakref.ref(model)
        functools.update_wrapper(self, type(model).save_pretrained, updated=())

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        model = self.model()
        main = args[0] if args else kwargs.get("is_main_process", True)
        token = _FOLDER.set(Path(save_directory) if main else None)
        try:
            return type(model).save_pretrained(model, save_directory, *args, **kwargs)
        finally:
            _FOLDER.reset(token)

    def model(self) -> PreTrainedModel:
        found = self.reference()
        if found is None:
            raise ModelError("the model whose save_pretrained this is does not exist any more")
        return found

    def __reduce__(self) -> Any:
        return _Save, (self.model(),)


def keep_saving(model: PreTrainedModel) -> None:
    """From now on, ``model.save_pretrained`` writes the report."""
    vars(model)["save_pretrained"] = _Save(model)


def forget_saving(model: PreTrainedModel) -> None:
    """``model.save_pretrained`` is that of its class again."""
    vars(model).pop("save_pretrained", None)


def write_beside(model: PreTrainedModel) -> None:
    """Write the report of ``model`` into the folder that it is being saved in, if one is known."""
    folder = _FOLDER.get()
    if folder is not None and folder.is_dir():
        write_report(model, folder)
