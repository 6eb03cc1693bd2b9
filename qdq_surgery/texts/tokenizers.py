"""The tokenizer of a folder, if its vocabulary is there and fits the model."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from qdq_surgery.errors import ModelError

__all__ = ["REMEDY", "copy_tokenizer", "load_tokenizer", "special_tokens", "unknown_token"]

#: What to do where a folder's tokenizer is none, or not the model's.
REMEDY = (
    "give the folder of the tokenizer that the model was trained with (--tokenizer FOLDER), or a .jsonl file with "
    "'tokens' of its vocabulary or 'input_ids' in each row"
)

#: Files of a tokenizer, which a converted model needs as the float one does.
_FILES = (
    "tokenizer*",
    "vocab*",
    "*vocab.json",
    "*vocab.txt",
    "merges.txt",
    "bpe.codes",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "spiece*",
)

#: The files without which a tokenizer makes up a vocabulary of nothing but special tokens.
_NEEDED = ("vocab_file", "merges_file")
_SPECIAL = ("pad", "bos", "eos", "cls", "sep", "mask")
#: As a share of the model's vocabulary: embeddings are often a little larger, to be a multiple of something.
_SPARE = 0.1


def copy_tokenizer(source: str | Path, folder: Path) -> None:
    """Copy the files of a tokenizer from one folder into another, which keeps what it has."""
    for pattern in _FILES:
        for file in sorted(Path(source).glob(pattern)):
            if file.is_file() and not (folder / file.name).exists():
                shutil.copy(file, folder / file.name)


def load_tokenizer(folder: str | Path, config: Any) -> Any:
    """The tokenizer whose files are in ``folder``.

    Args:
        config: Of the model that it is for; says the class where the files do not.

    Raises:
        ModelError: There is none, its vocabulary is missing, or it does not fit the model.
    """
    path = Path(folder)
    if not str(folder) or not path.is_dir():
        raise ModelError(f"{folder or 'an empty text'} is no folder, so it has no tokenizer; {REMEDY}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, config=config, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever transformers and tokenizers make of missing and damaged files
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ModelError(f"{folder} has no tokenizer that can be used ({reason}); {REMEDY}") from error
    missing = _missing(path, tokenizer)
    if missing:
        raise ModelError(
            f"{folder} has no {missing}, so its tokenizer ({type(tokenizer).__name__}) would be one without a "
            f"vocabulary; {REMEDY}"
        )
    _check_fit(folder, tokenizer, config)
    return tokenizer


def special_tokens(tokenizer: Any) -> dict[str, int]:
    """The ids of its special tokens, the unknown one left out."""
    found = {name: getattr(tokenizer, f"{name}_token_id", None) for name in _SPECIAL}
    return {name: value for name, value in found.items() if isinstance(value, int)}


def unknown_token(tokenizer: Any) -> int | None:
    """The id that stands for what the vocabulary lacks; ``None`` if there is none, or it stands for something else."""
    unknown = tokenizer.unk_token_id
    return unknown if isinstance(unknown, int) and unknown not in special_tokens(tokenizer).values() else None


def _missing(path: Path, tokenizer: Any) -> str | None:
    """A file of the tokenizer's class that is not there."""
    names = dict(tokenizer.vocab_files_names)
    if not names or (path / "tokenizer.json").is_file():
        return None  # it knows all characters or bytes by itself, or has everything in one file
    needed: Sequence[str] = [names[role] for role in _NEEDED if role in names] or ["tokenizer.json"]
    for name in needed:
        model = name.endswith(".model") and any(path.glob("*.model"))
        if not model and not (path / name).is_file():
            return name
    return None


def _check_fit(folder: str | Path, tokenizer: Any, config: Any) -> None:
    size = getattr(config.get_text_config(), "vocab_size", None)
    own = tokenizer.vocab_size
    if not isinstance(size, int) or not tokenizer.vocab_files_names:
        return
    words = f"the tokenizer of {folder} has a vocabulary of {own} tokens, and the model one of {size}"
    if own > size:
        raise ModelError(f"{words}, so it is another model's; {REMEDY}")
    wanted = {name: getattr(config, f"{name}_token_id", None) for name in _SPECIAL}
    known = special_tokens(tokenizer)
    both = [name for name, value in wanted.items() if isinstance(value, int) and name in known]
    if (
        max(own, len(tokenizer)) < (1 - _SPARE) * size
        and both
        and not any(wanted[name] == known[name] for name in both)
    ):
        told = ", ".join(f"{name} is {known[name]} and {wanted[name]}" for name in both)
        raise ModelError(f"{words}, and they agree in no special token ({told}), so it is another model's; {REMEDY}")
