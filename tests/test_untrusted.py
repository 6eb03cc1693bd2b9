"""Files from strangers: only regular ones are opened, and only so much of them is read."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from qdq_surgery.untrusted import read_regular_file


@pytest.fixture
def nothing_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> int:
        raise AssertionError("it was opened")

    monkeypatch.setattr(os, "open", refuse)


@pytest.fixture(params=["fifo", "socket", "directory", "device", "link-to-a-fifo"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Path, str]]:
    path = tmp_path / "a.yaml"
    if request.param == "fifo":
        os.mkfifo(path)
        yield path, "a FIFO"
    elif request.param == "link-to-a-fifo":
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
        yield path, "a FIFO"
    elif request.param == "socket":
        here = os.getcwd()
        os.chdir(tmp_path)  # the path of a socket has at most 107 bytes
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(path.name)
            os.chdir(here)
            yield path, "a socket"
    elif request.param == "directory":
        path.mkdir()
        yield path, "a directory"
    else:
        path.symlink_to("/dev/zero")
        yield path, "a device"


@pytest.mark.usefixtures("nothing_is_opened")
def test_special_files_are_refused_before_they_are_opened(special: tuple[Path, str]) -> None:
    path, kind = special
    with pytest.raises(ValueError, match=f"^it is {kind}, no regular file$"):
        read_regular_file(path, 100)


@pytest.mark.usefixtures("nothing_is_opened")
def test_a_file_without_a_size_is_not_opened(tmp_path: Path) -> None:
    # Files of /proc say so, /proc/kmsg among them, which blocks its reader.
    (tmp_path / "empty").write_bytes(b"")
    assert read_regular_file(tmp_path / "empty", 100) == b""


@pytest.mark.usefixtures("nothing_is_opened")
def test_a_file_that_is_too_large_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(b"x" * 101)
    with pytest.raises(ValueError, match=r"^it has 101 bytes, more than the 100 that are read$"):
        read_regular_file(tmp_path / "large", 100)


def test_a_file_is_read_to_its_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(100)))
    (tmp_path / "link").symlink_to("file")
    assert read_regular_file(tmp_path / "link", 100) == bytes(range(100))


@pytest.mark.parametrize("becomes", ["fifo", "larger"])
def test_what_takes_the_files_place_is_refused(becomes: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    look = os.stat

    def stat(*args: object, **keys: object) -> os.stat_result:
        found = look(*args, **keys)  # type: ignore[arg-type]
        path.unlink()
        if becomes == "fifo":
            os.mkfifo(path)
        else:
            path.write_bytes(b"x" * 101)
        monkeypatch.undo()
        return found

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(ValueError, match="FIFO" if becomes == "fifo" else "101 bytes"):
        read_regular_file(path, 100)


def test_a_file_that_grows_is_read_to_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    look = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        found = look(descriptor)
        with path.open("ab") as file:
            file.write(b"x" * 10_000)
        return found

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(ValueError, match=r"^it has 101 bytes"):
        read_regular_file(path, 100)


def test_descriptors_are_closed(tmp_path: Path, special: tuple[Path, str]) -> None:
    (tmp_path / "file").write_bytes(b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(10):
        read_regular_file(tmp_path / "file", 100)
        with pytest.raises(ValueError, match="no regular file"):
            read_regular_file(special[0], 100)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("path", ["nowhere", "a\0b"])
def test_what_is_not_there_is_an_error_that_can_be_printed(path: str) -> None:
    with pytest.raises((OSError, ValueError)) as caught:
        read_regular_file(Path(path), 100)
    assert str(caught.value).isprintable()
