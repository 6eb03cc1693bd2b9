"""What has to be in place before the slow imports of the command line: Ctrl-C ends it in one line, at any time.

Only where this process is the command; whoever imports the package keeps their own excepthook.
"""

from __future__ import annotations

import sys
from pathlib import PurePath
from types import TracebackType

__all__ = ["COMMAND", "IS_COMMAND", "is_command", "quiet_interrupt"]

COMMAND = "qdq-surgery"


def is_command(arguments: list[str], started: list[str]) -> bool:
    """Whether a process is ``qdq-surgery ...`` or ``python -m qdq_surgery ...``.

    Args:
        arguments: ``sys.argv`` while the package is imported; with ``-m`` its first is that still.
        started: ``sys.orig_argv``.
    """
    first = arguments[0] if arguments else ""
    if first == "-m":
        return started[started.index("-m") + 1 :][:1] == ["qdq_surgery"] if "-m" in started else False
    return PurePath(first).name in (COMMAND, f"{COMMAND}.exe")


def quiet_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An ``excepthook`` that says one line of an interrupt; Python itself then ends the process by that signal."""
    if issubclass(kind, KeyboardInterrupt):
        print(f"{COMMAND}: interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


#: Of this process.
IS_COMMAND = is_command(getattr(sys, "argv", []), sys.orig_argv)

if IS_COMMAND:
    sys.excepthook = quiet_interrupt
