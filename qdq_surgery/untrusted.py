"""Reading of files that a stranger may have put there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from qdq_surgery.errors import printable

__all__ = ["read_regular_file"]

_KINDS = {
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a directory",
}

#: Without O_NONBLOCK a FIFO that took the file's place in the meantime would block. Not every system has all of these.
_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_NOCTTY", "O_BINARY"))


def read_regular_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file; anything else is refused before it is opened.

    A file whose size is 0 is not opened either: so say the files of ``/proc``, of which some block their reader.

    Args:
        limit: Most bytes.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no regular file, or has more bytes. Its text is printable.
    """
    if _regular_size(os.stat(path), limit) == 0:
        return b""
    descriptor = os.open(path, _FLAGS)
    try:
        _regular_size(os.fstat(descriptor), limit)
        return _read(descriptor, limit)
    finally:
        os.close(descriptor)


def _regular_size(found: os.stat_result, limit: int) -> int:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"it is {_KINDS.get(stat.S_IFMT(found.st_mode), 'a special file')}, no regular file")
    if found.st_size > limit:
        raise ValueError(_too_large(found.st_size, limit))
    return found.st_size


def _read(descriptor: int, limit: int) -> bytes:
    parts, left = [], limit + 1  # one more, to see a file that grows
    while left > 0 and (part := os.read(descriptor, left)):
        parts.append(part)
        left -= len(part)
    if left <= 0:
        raise ValueError(_too_large(limit + 1, limit))
    return b"".join(parts)


def _too_large(size: int, limit: int) -> str:
    return printable(f"it has {size} bytes, more than the {limit} that are read")
