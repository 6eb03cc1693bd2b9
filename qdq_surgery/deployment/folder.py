"""A deployed folder: the file under the name that other tools look for, and what they read beside it.

sentence-transformers (``backend="onnx"``, ``file_name="onnx/model_quantized.onnx"``), optimum's ``ORTModel`` and
Transformers.js (``dtype: "q8"``) read ``onnx/model_quantized.onnx``; optimum's ``OVModel`` and sentence-transformers
(``backend="openvino"``) read OpenVINO's own form in ``openvino/``. All of them want config.json and the tokenizer.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qdq_surgery.errors import ModelError, ParityError
from qdq_surgery.safety.untrusted import DamagedError, Item, parse_json, read_regular_file
from qdq_surgery.safety.whole_folder import whole_folder
from qdq_surgery.targets.target import Target
from qdq_surgery.texts.tokenizers import copy_tokenizer

__all__ = ["CARD", "FILE", "REPORT", "deployed_folder", "model_files", "write_own_form", "write_report"]

FILE = Path("onnx") / "model_quantized.onnx"
REPORT = "qdq_report.json"
CARD = "README.md"

#: What else of a float model's folder other tools read.
_CONFIGS = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    # sentence-transformers: its modules, and what they keep in folders of their own.
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
)

#: Modules of sentence-transformers that need no file. Their folder was empty for years, and no repository keeps an
#: empty one: that of all-MiniLM-L6-v2 has none.
_WITHOUT_FILES = ("Normalize",)

#: The longest list of modules that is read, in bytes.
_MOST = 1 << 16

#: The longest config of a tokenizer that is read, in bytes: it may list thousands of added tokens.
_LARGE = 1 << 24

#: As a share of the outputs' norm. The operations are those of the file, so bits are equal; float32 rounding may be,
#: but no value that goes the other way at a tie.
_SAME = 1e-5


@contextmanager
def deployed_folder(
    folder: str | Path, source: str | Path, tokenizer: str | Path, most: int | None = None
) -> Iterator[Path]:
    """A draft with config, tokenizer and sentence-transformers' modules of the float model, to write files into.

    It becomes ``folder`` when the block ends, and is gone if the block raises.

    Args:
        source: The folder of the float model.
        tokenizer: The folder that has its tokenizer.
        most: Tokens that the model has positions for; ``None`` if it takes any number.

    Raises:
        ModelError: The folder exists and is not empty, or cannot be written.
    """
    with whole_folder(folder) as draft:
        (draft / FILE).parent.mkdir(parents=True)
        for name in _CONFIGS:
            if (Path(source) / name).is_file():
                shutil.copy(Path(source) / name, draft / name)
        copy_tokenizer(tokenizer, draft)
        if most is not None:
            _limit_texts(draft / "tokenizer_config.json", most)
        for name, kind in _modules(Path(source) / "modules.json").items():
            if (Path(source) / name).is_dir():
                shutil.copytree(Path(source) / name, draft / name)
            elif kind not in _WITHOUT_FILES:
                raise ModelError(f"{source} has no folder {name}, which its modules.json names; save it whole again")
        yield draft


def _limit_texts(file: Path, most: int) -> None:
    """Say in the tokenizer's config where texts are cut, if it says nothing, or more than the model takes.

    fastembed loads no tokenizer that says nothing, and the others would give the model texts that it has no positions
    for.
    """
    if not file.is_file():
        return
    try:
        config = {
            key: each.value for key, each in parse_json(read_regular_file(file, _LARGE), str(file)).entries().items()
        }
    except (DamagedError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    said = config.get("model_max_length")
    if isinstance(said, bool) or not isinstance(said, int) or not 0 < said <= most:
        config["model_max_length"] = most
        try:
            text = json.dumps(config, indent=2, allow_nan=False)
        except ValueError as error:  # a number that is none in JSON
            raise ModelError(f"{file} cannot be written anew: {error}") from error
        file.unlink()  # the copy has the permissions of what it is of
        file.write_text(text + "\n", encoding="utf-8")


def _modules(file: Path) -> dict[str, str]:
    """The folders that sentence-transformers' list of modules names, such as 1_Pooling, and the class of each.

    There are none without that list.

    Raises:
        ModelError: It is no such list.
    """
    if not file.is_file():
        return {}
    try:
        listed = [each.entries() for each in parse_json(read_regular_file(file, _MOST), str(file)).items()]
        named = {str(each["path"].text()): _class_name(each) for each in listed}
    except (DamagedError, KeyError, OSError) as error:
        raise ModelError(f"{file} cannot be read: {error}") from error
    odd = next((name for name in named if name and (name in (".", "..") or "/" in name or "\\" in name)), None)
    if odd is not None:
        raise ModelError(f"{file} names {odd!r}, which is no folder beside it")
    return {name: kind for name, kind in named.items() if name}


def _class_name(module: Mapping[str, Item]) -> str:
    """Such as Pooling, whatever package it was in when the list was written; nothing where none is named."""
    return str(module["type"].text()).rpartition(".")[2] if "type" in module else ""


def write_own_form(draft: Path, target: Target, inputs: Mapping[str, NDArray[Any]]) -> None:
    """The runtime's own form of the file, if it has one, compared with the file, which has the certificate.

    Args:
        inputs: What the model is called with, to run both on.

    Raises:
        ModelError: The runtime is not installed.
        ParityError: It computes something else.
    """
    if target.own_form is None or target.session is None:
        return
    form = draft / target.own_form.path
    form.parent.mkdir()
    target.own_form.write(draft / FILE, form)
    precision = "float32" if target.session.precisions else None
    session = target.session(draft / FILE, None, precision)
    lost = [port.name for port in session.inputs if port.name not in inputs]
    if lost:
        raise ModelError(f"{FILE.name} takes {', '.join(lost)}, which the batches do not have")
    wanted = session.run({port.name: inputs[port.name] for port in session.inputs})
    found = target.own_form.run(form, inputs)
    worst = max(_distance(value, found[name]) for name, value in wanted.items())
    if not worst <= _SAME:
        raise ParityError(
            f"{form.name}, which {target.title} made of {FILE.name}, differs from it by {worst:.2g} of the outputs; "
            f"deploy the ONNX file on {target.title}, and report this"
        )


def _distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    """Norm of the difference, as a share of that of the values."""
    return float(np.linalg.norm(one - other) / max(float(np.linalg.norm(one)), np.finfo(np.float32).tiny))


def model_files(draft: Path) -> list[tuple[str, int]]:
    """The model's files by their names in the folder, the ONNX file first, and their sizes with weights beside them."""
    found = sorted(path for folder in ("onnx", "openvino") for path in (draft / folder).glob("*") if path.is_file())
    heads = [path for path in found if path.suffix in (".onnx", ".xml")]
    sizes = {head: sum(each.stat().st_size for each in found if each.name.startswith(head.stem)) for head in heads}
    return [(path.relative_to(draft).as_posix(), size) for path, size in sizes.items()]


def write_report(draft: Path, report: Mapping[str, Any]) -> None:
    """All figures, as JSON."""
    (draft / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
