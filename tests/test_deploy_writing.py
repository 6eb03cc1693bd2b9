"""A file appears whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import qdq_surgery as qs
from qdq_surgery.deploy.writing import DATA_SUFFIX, draft, writable


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


# --- whether it can be written ------------------------------------------------------------------------------------


def test_a_path_that_can_be_written(tmp_path: Path) -> None:
    assert writable(tmp_path / "model.onnx") == tmp_path / "model.onnx"
    assert writable(str(tmp_path / "model.onnx")) == tmp_path / "model.onnx"
    (tmp_path / "old.onnx").write_text("old")
    assert writable(tmp_path / "old.onnx")
    assert contents(tmp_path) == {"old.onnx": "old"}  # nothing was tried


def test_a_name_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with draft(writable("model.onnx")) as file:
        file.write_text("new")
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
        writable(file)
    assert contents(tmp_path) == {"model.onnx": "old"}


# --- writing ------------------------------------------------------------------------------------------------------


def test_nothing_is_there_before_the_end(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with draft(path) as file:
        assert file.name == path.name
        file.write_text("new")
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
        with draft(path) as file:
            file.write_text("half")
            Path(f"{file}{DATA_SUFFIX}").write_text("half")
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


def test_the_data_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with draft(path) as file:
        file.write_text("new")
        Path(f"{file}{DATA_SUFFIX}").write_text("new data")
    assert contents(tmp_path) == {"model.onnx": "new", "model.onnx.data": "new data"}
    with draft(path) as file:
        file.write_text("newer")
        Path(f"{file}{DATA_SUFFIX}").write_text("newer data")
    assert contents(tmp_path) == {"model.onnx": "newer", "model.onnx.data": "newer data"}


def test_data_that_nobody_needs_any_more(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("old")
    Path(f"{path}{DATA_SUFFIX}").write_text("old data")
    with draft(path) as file:
        file.write_text("small")
    assert contents(tmp_path) == {"model.onnx": "small"}


def test_a_file_of_that_name_that_is_no_ones_data(tmp_path: Path) -> None:
    other = tmp_path / "model.onnx.data"
    other.write_text("someone's")
    with draft(tmp_path / "model.onnx") as file:
        file.write_text("new")
    assert contents(tmp_path) == {"model.onnx": "new", "model.onnx.data": "someone's"}


def test_others_may_read_it_as_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").write_text("")
    with draft(tmp_path / "model.onnx") as file:
        file.write_text("new")
    assert (tmp_path / "model.onnx").stat().st_mode == (tmp_path / "any").stat().st_mode
