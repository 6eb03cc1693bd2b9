"""Folders that appear whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest

from qdq_surgery.errors import ModelError
from qdq_surgery.safety.whole_folder import check_new, whole_folder


def failing(folder: Path, error: BaseException) -> None:
    with whole_folder(folder) as draft:
        draft.mkdir()
        (draft / "half").write_text("")
        raise error


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "lib.so"), BrokenPipeError(), KeyboardInterrupt()]
)
def test_what_the_block_raises_stays_what_it_is_and_nothing_is_left(error: BaseException, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught:
        failing(tmp_path / "new" / "deep" / "out", error)
    assert caught.value is error
    assert list(tmp_path.iterdir()) == []


def test_it_takes_the_place_of_an_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with whole_folder(tmp_path / "out") as draft:
        draft.mkdir()
        (draft / "file").write_text("")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_places_that_cannot_be_taken_are_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "lost").symlink_to(tmp_path / "nowhere")
    monkeypatch.chdir(tmp_path / "empty")
    for place in (tmp_path / "link", tmp_path / "lost", ".", "../empty"):
        with pytest.raises(ModelError, match="is a link, a mount point or the working folder"):
            check_new(place)
    with pytest.raises(ModelError, match="exists and is not empty"):
        check_new(tmp_path)


def test_where_nothing_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written: File exists"), whole_folder(tmp_path / "file" / "out"):
        pass
