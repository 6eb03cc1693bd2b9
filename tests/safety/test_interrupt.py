"""Ctrl-C in the slow imports of the command: one line, and nobody else's excepthook is touched."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from repository import ROOT

from qdq_surgery.safety.interrupt import is_command, quiet_interrupt


@pytest.mark.parametrize(
    ("arguments", "started", "wanted"),
    [
        (["/bin/qdq-surgery", "plan"], ["python", "/bin/qdq-surgery", "plan"], True),
        (["-m", "plan"], ["python", "-m", "qdq_surgery", "plan"], True),
        (["-m"], ["python", "-m", "other"], False),
        (["train.py", "qdq-surgery"], ["python", "train.py", "qdq-surgery"], False),
        (["-c"], ["python", "-c", "import qdq_surgery"], False),
        ([""], ["python"], False),
        ([], [], False),
    ],
)
def test_it_knows_the_command(arguments: list[str], started: list[str], wanted: bool) -> None:
    assert is_command(arguments, started) is wanted


def test_an_interrupt_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    quiet_interrupt(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert capsys.readouterr().err == "qdq-surgery: interrupted\n"
    quiet_interrupt(ValueError, ValueError("other"), None)
    assert capsys.readouterr().err == "ValueError: other\n"


#: Stands where torch does, and is interrupted while it is imported. (A shell's background job ignores the signal, and
#: so would what it starts.)
_TORCH = (
    "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    "os.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n"
)


def test_an_interrupt_of_the_imports_has_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(_TORCH)
    paths = f"{tmp_path}:{ROOT}"
    for command, words, code in (
        (["-m", "qdq_surgery", "plan", "x"], "qdq-surgery: interrupted\n", 130),
        (["-c", "import qdq_surgery"], "Traceback", -signal.SIGINT),
    ):
        done = subprocess.run(
            [sys.executable, *command],
            env={"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.stderr.startswith(words)
        assert done.returncode == code
