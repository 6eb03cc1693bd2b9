"""A file appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import qdq_surgery as qs
from qdq_surgery.onnx_file.writer import DATA_SUFFIX, data_beside, draft, replace_text, writable


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


# --- whether it can be written ------------------------------------------------------------------------------------


def test_a_path_that_can_be_written(tmp_path: Path) -> None:
    assert writable(tmp_path / "model.onnx") == tmp_path / "model.onnx"
    assert writable(str(tmp_path / "model.onnx")) == tmp_path / "model.onnx"
    (tmp_path / "old.onnx").write_text("old")
    assert writable(tmp_path / "old.onnx", overwrite=True)
    assert contents(tmp_path) == {"old.onnx": "old"}  # nothing was tried


def test_a_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with draft(writable("model.onnx")) as made:
        made.graph.write_text("new")
    assert contents(tmp_path) == {"model.onnx": "new"}


def test_a_folder(tmp_path: Path) -> None:
    with pytest.raises(qs.ExportError, match=r"is a folder; give the name of a file, such as .*model\.onnx"):
        writable(tmp_path)


def test_a_folder_that_there_is_not(tmp_path: Path) -> None:
    with pytest.raises(qs.ExportError, match=r"there is no folder .*nowhere; make it first"):
        writable(tmp_path / "nowhere" / "model.onnx")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("what", ["folder", "file"])
def test_no_permission(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.onnx"
    file.write_text("old")
    closed = tmp_path if what == "folder" else file
    # Who runs the tests may be allowed everything.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != closed or not mode & os.W_OK)
    with pytest.raises(qs.ExportError, match="cannot be written: permission denied; give another path"):
        writable(file, overwrite=True)
    assert contents(tmp_path) == {"model.onnx": "old"}


# --- writing ------------------------------------------------------------------------------------------------------


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with draft(path) as made:
        assert made.graph.name == path.name
        made.graph.write_text("new")
        assert not path.exists()
    assert contents(tmp_path) == {"model.onnx": "new"}


@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt(), qs.ExportError("no"), OSError("no")])
@pytest.mark.parametrize("old", [True, False])
def test_an_error_leaves_everything_as_it_was(error: BaseException, old: bool, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    if old:
        path.write_text("old")
        Path(f"{path}{DATA_SUFFIX}").write_text("old data")
    before = contents(tmp_path)

    def fail() -> None:
        with draft(path, old) as made:
            made.graph.write_text("half")
            made.data.write_text("half")
            raise error

    with pytest.raises((type(error), qs.ExportError)):
        fail()
    assert contents(tmp_path) == before
    assert not [each for each in tmp_path.iterdir() if each.is_dir()]


def test_what_the_system_says_is_told(tmp_path: Path) -> None:
    message = r"model\.onnx cannot be written: No space left on device$"
    with pytest.raises(qs.ExportError, match=message), draft(tmp_path / "model.onnx"):
        raise OSError(28, "No space left on device")
    assert contents(tmp_path) == {}


def test_the_folder_went_away(tmp_path: Path) -> None:
    message = "cannot be written: No such file or directory"
    with pytest.raises(qs.ExportError, match=message), draft(tmp_path / "gone" / "model.onnx"):
        pass


def write(
    path: Path,
    text: str,
    data: str | None = None,
    overwrite: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> None:
    with draft(path, overwrite) as made:
        made.graph.write_text(f"{text} with {made.data.name}" if data else text)
        if data is not None:
            made.data.write_text(data)
        meanwhile()


def whole(folder: Path) -> tuple[str, str]:
    """The graph's text and that of the data that it names."""
    text, _, name = (folder / "model.onnx").read_text().partition(" with ")
    return text, (folder / name).read_text() if name else ""


def test_the_data_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write(path, "new", "new data")
    assert contents(tmp_path) == {"model.onnx": "new with model.onnx.data", "model.onnx.data": "new data"}
    for at in range(3):
        write(path, f"newer {at}", f"newer data {at}", overwrite=True)
        assert whole(tmp_path) == (f"newer {at}", f"newer data {at}")
        assert data_beside(path) == sorted(each for each in tmp_path.iterdir() if each != path)
        assert len(contents(tmp_path)) == 2


def test_data_that_nobody_needs_any_more(tmp_path: Path) -> None:
    write(tmp_path / "model.onnx", "old", "old data")
    (tmp_path / "model.onnx.more.data").write_text("someone's")
    write(tmp_path / "model.onnx", "small", overwrite=True)
    assert contents(tmp_path) == {"model.onnx": "small", "model.onnx.more.data": "someone's"}


@pytest.mark.parametrize("call", ["link", "replace", "fsync", "unlink", "stat"])
@pytest.mark.parametrize("when", range(4))
@pytest.mark.parametrize("old", [None, "small", "large"])
def test_interrupted_the_old_file_or_the_new_one_is_whole(
    call: str, when: int, old: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before or after every call to the system that moves something."""
    before = ("", "")
    if old is not None:
        write(tmp_path / "model.onnx", "old", "old data" if old == "large" else None)
        before = whole(tmp_path)
    real, calls = getattr(os, call), 0

    def interrupt(*given: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == when // 2 + 1 and when % 2 == 0:
            raise KeyboardInterrupt
        found = real(*given, **options)
        if calls == when // 2 + 1:
            raise KeyboardInterrupt
        return found

    with contextlib.suppress(KeyboardInterrupt), draft(tmp_path / "model.onnx", overwrite=True) as made:
        made.graph.write_text(f"new with {made.data.name}")
        made.data.write_text("new data")
        monkeypatch.setattr(os, call, interrupt)
    monkeypatch.undo()
    if (tmp_path / "model.onnx").exists():
        assert whole(tmp_path) in (before, ("new", "new data"))
    else:
        assert old is None
    assert not [each for each in tmp_path.iterdir() if each.is_dir()]


def test_a_file_that_appears_meanwhile_stays(tmp_path: Path) -> None:
    for name in ("model.onnx", "model.onnx.data"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        with pytest.raises(qs.ExportError, match=r"(appeared meanwhile|exists); pass overwrite=True"):
            write(folder / "model.onnx", "new", "new data", meanwhile=(folder / name).touch)
        assert contents(folder) == {name: ""}


@pytest.mark.parametrize("overwrite", [True, False])
def test_where_there_are_no_hard_links(overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    write(tmp_path / "model.onnx", "new", "new data", overwrite)
    assert whole(tmp_path) == ("new", "new data")
    with pytest.raises(qs.ExportError, match="exists; pass overwrite=True"):
        write(tmp_path / "model.onnx", "newer")
    assert whole(tmp_path) == ("new", "new data")


# --- what is never replaced ---------------------------------------------------------------------------------------


def special(path: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    else:
        path.symlink_to({"link": "target.onnx", "dangling": "nowhere", "device": "/dev/null"}[kind])


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data"])
@pytest.mark.parametrize("kind", ["fifo", "socket", "link", "dangling", "device"])
def test_special_files_and_links_are_never_replaced(
    kind: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "target.onnx").write_text("target")
    special(tmp_path / name, kind)
    mode = os.lstat(tmp_path / name).st_mode
    for overwrite in (True, False):
        with pytest.raises(qs.ExportError, match=r"is a link, which|is no regular file, and"):
            writable(tmp_path / "model.onnx", overwrite)
    assert os.lstat(tmp_path / name).st_mode == mode
    assert (tmp_path / "target.onnx").read_text() == "target"


@pytest.mark.parametrize("kind", ["fifo", "link"])
def test_one_that_appears_meanwhile_is_not_replaced_either(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises(qs.ExportError, match=r"is a link, which|is no regular file, and"):
        write(path, "new", overwrite=True, meanwhile=lambda: special(path, kind))
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "model.onnx.0123abcd.data"])
def test_a_file_that_exists_needs_a_word(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("old")
    with pytest.raises(qs.ExportError, match=rf"{name} exists; pass overwrite=True \(--overwrite on"):
        writable(tmp_path / "model.onnx")
    assert writable(tmp_path / "model.onnx", overwrite=True)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.txt", r"an ONNX file ends in \.onnx; give x\.onnx"),
        ("model", r"an ONNX file ends in \.onnx"),
        ("mo\0del.onnx", "holds a NUL character"),
    ],
)
def test_names_that_are_none_of_an_onnx_file(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(qs.ExportError, match=said) as caught:
        writable(tmp_path / name)
    assert "\0" not in str(caught.value)


def test_a_text_is_replaced_whole(tmp_path: Path) -> None:
    replace_text(tmp_path / "figures.json", "1\n")
    replace_text(tmp_path / "figures.json", "2\n")
    assert contents(tmp_path) == {"figures.json": "2\n"}
    (tmp_path / "link").symlink_to("figures.json")
    with pytest.raises(qs.ExportError, match="is a link"):
        replace_text(tmp_path / "link", "3\n")


def test_a_file_of_that_name_that_is_no_ones_data(tmp_path: Path) -> None:
    other = tmp_path / "model.onnx.data"
    other.write_text("someone's")
    with draft(tmp_path / "model.onnx") as made:
        made.graph.write_text("new")
    assert contents(tmp_path) == {"model.onnx": "new", "model.onnx.data": "someone's"}


def test_others_may_read_it_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").write_text("")
    with draft(tmp_path / "model.onnx") as made:
        made.graph.write_text("new")
    assert (tmp_path / "model.onnx").stat().st_mode == (tmp_path / "any").stat().st_mode


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    with pytest.raises(qs.ExportError, match=r"cannot be written: File name too long; give another path"):
        writable(tmp_path / f"{'x' * 300}.onnx")
