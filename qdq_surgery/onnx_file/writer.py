"""The file appears whole or not at all, and takes the place of nothing that it was not told to.

Large weights stand in a second file. At no moment does a graph point at weights that are not its own: the new weights
get a name that is free, then the graph takes its place, and then the old weights go.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from qdq_surgery.errors import ExportError
from qdq_surgery.onnx_file.reader import ENDING
from qdq_surgery.safety.given_path import given_path
from qdq_surgery.safety.untrusted import quoted

__all__ = ["DATA_SUFFIX", "LARGEST", "Draft", "data_beside", "draft", "replace_text", "writable"]

#: Where protobuf ends: from here on, weights stand in a file beside the graph.
LARGEST = 2**31 - 2**24
DATA_SUFFIX = ".data"

_REMEDY = "pass overwrite=True (--overwrite on the command line), or give another path"
#: What a file system says that has no hard links.
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EACCES)


@dataclass(frozen=True)
class Draft:
    """Where to write.

    Attributes:
        graph: The file, of the name that it will have.
        data: For large weights, of the name that they will have. It need not be written.
    """

    graph: Path
    data: Path


def writable(path: str | Path, overwrite: bool = False, kind: str = "an ONNX file", ending: str = ENDING) -> Path:
    """``path``, if a file can be written there.

    Args:
        overwrite: Whether a regular file may be replaced.
        kind: What is to be written, in words.
        ending: What the name of such a file ends in.

    Raises:
        ExportError: It is no name of such a file, its folder does not exist or cannot be written to, or something is
            there already.
    """
    file = given_path(path, kind)
    if "\0" in str(path):
        raise ExportError(f"{quoted(path)} cannot be written: it holds a NUL character; give another path")
    _check_name(file)
    if file.is_dir():
        raise ExportError(f"{path} is a folder; give the name of a file, such as {file / f'model{ending}'}")
    if file.suffix != ending:
        raise ExportError(f"{path} cannot be written: {kind} ends in {ending}; give {file.stem}{ending}, say")
    if not file.parent.is_dir():
        raise ExportError(f"{path} cannot be written: there is no folder {file.parent}; make it first")
    _check_place(file, overwrite)
    for data in data_beside(file) if ending == ENDING else ():
        _check_place(data, overwrite)
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise ExportError(f"{path} cannot be written: permission denied; give another path")
    return file


def data_beside(path: Path) -> list[Path]:
    """The files that hold weights of the file at ``path``, by their names: ``PATH.data``, or that with a number."""
    pattern = re.compile(rf"{re.escape(path.name)}(\.[0-9a-f]{{8}})?{re.escape(DATA_SUFFIX)}")
    return sorted(each for each in path.parent.iterdir() if pattern.fullmatch(each.name))


@contextmanager
def draft(path: Path, overwrite: bool = False) -> Iterator[Draft]:
    """Files in a folder beside ``path``, which take their place if all goes well.

    Args:
        overwrite: Whether a regular file may be replaced that is there in the end. Its weights go with it.

    Raises:
        ExportError: Something is there that must not be replaced, the disk is full, or whatever else the system says.
    """
    try:
        with _folder(path.parent) as folder:
            made = Draft(folder / path.name, folder / _free_name(path))
            yield made
            _check_place(path, overwrite)
            _move(made, path, overwrite)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error


def replace_text(path: str | Path, text: str, overwrite: bool = True) -> None:
    """Write a small text, such as figures; one that is there is replaced when the new one is complete.

    Args:
        overwrite: Whether one that is there is replaced at all.

    Raises:
        ExportError: Something else than a regular file is there, or whatever the system says.
    """
    file = Path(path)
    _check_place(file, overwrite)
    try:
        with _folder(file.parent) as folder:
            made = folder / file.name
            made.write_text(text, encoding="utf-8", newline="\n")
            if overwrite:
                os.replace(made, file)
            else:
                _place(made, file)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error


@contextmanager
def _folder(parent: Path) -> Iterator[Path]:
    """One that is gone afterwards, even if its removal is interrupted."""
    made = tempfile.mkdtemp(dir=parent, prefix=".qdq-surgery-")
    try:
        yield Path(made)
    finally:
        try:
            shutil.rmtree(made)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise


def _move(made: Draft, path: Path, overwrite: bool) -> None:
    old = data_beside(path) if overwrite else []
    data = path.parent / made.data.name
    large = made.data.exists()
    for file in (made.data, made.graph) if large else (made.graph,):
        _flush(file)
    new, weights = os.stat(made.graph), os.stat(made.data) if large else None
    try:
        if large:
            _place(made.data, data)
        if overwrite:
            os.replace(made.graph, path)
        else:
            _place(made.graph, path)
    except BaseException:
        if weights is not None and not _is(path, new) and _is(data, weights):
            data.unlink(missing_ok=True)
        raise
    for each in old:
        if each != data and stat.S_ISREG(os.lstat(each).st_mode):
            each.unlink(missing_ok=True)


def _place(source: Path, target: Path) -> None:
    """Move a file to a name that is free; one that appears there meanwhile stays."""
    try:
        os.link(source, target)
    except FileExistsError:
        raise ExportError(f"{target} cannot be written: it appeared meanwhile; {_REMEDY}") from None
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _claim(source, target)


def _claim(source: Path, target: Path) -> None:
    """The same where there are no hard links: an empty file holds the name until the whole one is there."""
    try:
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        raise ExportError(f"{target} cannot be written: it appeared meanwhile; {_REMEDY}") from None
    try:
        os.replace(source, target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _check_name(file: Path) -> None:
    """Whether there can be such a name at all: one may be too long."""
    try:
        os.lstat(file)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise ExportError(f"{file} cannot be written: {error.strerror or error}; give another path") from error


def _check_place(file: Path, overwrite: bool) -> None:
    """Whether what is at a name, if anything, may be replaced."""
    try:
        mode = os.lstat(file).st_mode
    except FileNotFoundError:
        return
    except OSError as error:
        raise ExportError(f"{file} cannot be written: {error.strerror or error}; give another path") from error
    if stat.S_ISLNK(mode):
        raise ExportError(f"{file} is a link, which an export does not replace; give the path that it leads to")
    if not stat.S_ISREG(mode):
        raise ExportError(f"{file} is no regular file, and an export replaces nothing else; give another path")
    if not overwrite:
        raise ExportError(f"{file} exists; {_REMEDY}")


def _free_name(path: Path) -> str:
    name = f"{path.name}{DATA_SUFFIX}"
    while os.path.lexists(path.parent / name):
        name = f"{path.name}.{secrets.token_hex(4)}{DATA_SUFFIX}"
    return name


def _is(path: Path, known: os.stat_result) -> bool:
    """Whether that file is at ``path`` by now."""
    with contextlib.suppress(OSError):
        found = os.lstat(path)
        return (found.st_ino, found.st_dev) == (known.st_ino, known.st_dev)
    return False


def _flush(file: Path) -> None:
    """Onto the disk, so that not even a power cut leaves a name without its bytes."""
    handle = os.open(file, os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
