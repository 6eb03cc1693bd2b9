"""New processes that need not import torch once more: each is forked from one that has imported, and done nothing else.

An import takes seconds, and what is tested in them tenths of one. Where the import itself is the subject, a test starts
Python. The process that they are forked from is one itself, of the worker when it has collected the tests and run none.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from multiprocessing import forkserver, util
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

__all__ = ["CONTEXT", "METHOD", "prepare", "run", "start"]

#: For whoever starts processes on their own.
METHOD = "forkserver"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["torch", "transformers", "qdq_surgery"])

_PATIENCE = 300


def prepare(patch: pytest.MonkeyPatch) -> None:
    """From now on, processes are forked from what this one is now. On other systems than Linux a new one imports all.

    Not once tests have run: the threads of what they opened would be missing in a copy.
    """
    if sys.platform == "linux":
        patch.setattr(util, "spawnv_passfds", _forked)
        forkserver.ensure_running()
        patch.undo()


def _forked(_: bytes, command: Sequence[bytes | str], passed: Sequence[int]) -> int:
    """In place of a new Python that runs the command."""
    sys.stdout.flush()
    process = os.fork()
    if process == 0:
        try:
            # Nothing of the worker's stays open, and no number becomes free: logging and pytest remember theirs.
            nothing = os.open(os.devnull, os.O_RDWR)
            for descriptor in {int(name) for name in os.listdir("/proc/self/fd")} - {0, 1, 2, nothing, *passed}:
                os.dup2(nothing, descriptor)
            exec(command[-1], {})
        except Exception:
            traceback.print_exc()  # who waits for a process of this one's is only told that it has ended
        finally:
            os._exit(0)
    return process


def run(code: str, *arguments: object, folder: Path) -> str:
    """What ``code`` prints in a new process, with these arguments in ``sys.argv``.

    Args:
        folder: Where what it prints is put meanwhile.
    """
    return ended(start(code, *arguments, folder=folder), folder)


def start(code: str, *arguments: object, folder: Path) -> BaseProcess:
    """A new process that runs ``code``; what it prints goes into files in ``folder``, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("stdout", "stderr"):  # there, should it end before it says anything
        (folder / name).write_text("")
    process = CONTEXT.Process(target=_main, args=(code, [str(each) for each in arguments], str(folder)))
    process.start()
    return process


def ended(process: BaseProcess, folder: Path) -> str:
    """Waits for the process, and gives what it printed.

    Raises:
        AssertionError: It failed, or does not end.
    """
    try:
        process.join(_PATIENCE)
        assert not process.is_alive(), "it does not end"
    finally:
        process.kill()
    assert process.exitcode == 0, (folder / "stderr").read_text()
    return (folder / "stdout").read_text()


def _main(code: str, arguments: list[str], folder: str) -> None:
    for number, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
        os.close(file)
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<code of a test>", "exec"), {"__name__": "__main__"})
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
