"""New processes that need not import torch once more: each is forked from one that has imported, and done nothing else.

An import takes seconds, and what is tested in them tenths of one. Where the import itself is the subject, a test starts
Python.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path

__all__ = ["CONTEXT", "METHOD", "run", "start"]

#: For whoever starts processes on their own.
METHOD = "forkserver"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload(["torch", "transformers", "qdq_surgery"])

_PATIENCE = 300


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
