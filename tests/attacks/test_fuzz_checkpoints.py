"""A sample of ``scripts/fuzz.py checkpoints``: mutated checkpoints load as what they say or are refused."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from fuzzing import checkpoints
from fuzzing.checkpoints import KINDS
from fuzzing.outcome import Outcome
from qdq_surgery.errors import QdqSurgeryError
from qdq_surgery.integers.choice import unsupported


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.disable_progress_bar()


@pytest.mark.slow
def test_mutated_checkpoints_load_as_they_say_or_are_refused() -> None:
    outcome = checkpoints.run(30, 14)
    assert outcome.is_right, str(outcome)
    assert outcome.read.total() + outcome.refused.total() == 30
    assert outcome.read.total() > 8
    assert outcome.refused.total() > 8
    assert set(outcome.read) | set(outcome.refused) == set(KINDS)


@pytest.mark.parametrize("frozen", [False, True])
def test_what_loads_as_something_else_is_found(frozen: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check can fail: a reader that believes whatever plan it finds."""
    if frozen and unsupported(torch.device("cpu"), torch.float32) is not None:
        pytest.skip("integer products do not run here")
    base = checkpoints._Base.make(tmp_path, frozen)
    assert base.check(base.whole) == ""
    assert base.check(base.sharded) == ""
    outcome = Outcome()
    monkeypatch.setattr(checkpoints, "_essence", lambda _: ())
    outcome.run("plan", "case", lambda: base.check(base.whole), QdqSurgeryError)
    assert not outcome.is_right


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> checkpoints._Base:
    return checkpoints._Base.make(tmp_path_factory.mktemp("saved"))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_changes_something(kind: str, saved: checkpoints._Base, tmp_path: Path) -> None:
    folder = tmp_path / "case"
    shutil.copytree(saved.sharded if kind == "index" else saved.whole, folder)

    def content() -> dict[str, bytes]:
        return {path.name: path.read_bytes() if path.is_file() else b"" for path in folder.iterdir()}

    before = content()
    KINDS[kind](random.Random(3), folder)
    assert content() != before
