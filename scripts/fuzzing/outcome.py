"""What became of the cases: counts, and whatever went wrong."""

from __future__ import annotations

import resource
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

__all__ = ["MOST_MEBIBYTES", "MOST_SECONDS", "Outcome"]

MOST_SECONDS = 2.0
MOST_MEBIBYTES = 300.0


@dataclass
class Outcome:
    """Counts by kind of case.

    Attributes:
        read, refused: How many of each kind.
        wrong: Read as something else than they say, or refused without naming the place; with the case.
        foreign: Exceptions that are none of the package's; with the case.
        slowest: Seconds of the processor of the slowest case, and the case.
        mebibytes: How much the process grew at its peak while the cases were checked, in all.
    """

    read: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    slowest: tuple[float, str] = (0.0, "")
    mebibytes: float = 0.0

    def run(self, kind: str, case: str, check: Callable[[], str], own: type[Exception]) -> None:
        """Run one case.

        Args:
            check: Says what was wrong, ``""`` if nothing; raises ``own`` if the case was refused.
        """
        peak, begin = _peak(), time.process_time()
        try:
            wrong = check()
            self.read[kind] += 1
            if wrong:
                self.wrong.append(f"{case}: {wrong}")
        except own as error:
            self.refused[kind] += 1
            if not _is_shown(str(error)):
                self.wrong.append(f"{case}: a message that is long or not printable")
        except Exception as error:  # any other is what is looked for
            self.foreign.append(f"{case}: {type(error).__name__}: {str(error)[:200]}")
        self.slowest = max(self.slowest, (time.process_time() - begin, case))
        self.mebibytes += _peak() - peak

    @property
    def is_right(self) -> bool:
        """Whether nothing was wrong or foreign; says nothing about time and memory."""
        return not self.wrong and not self.foreign

    @property
    def is_cheap(self) -> bool:
        return self.slowest[0] <= MOST_SECONDS and self.mebibytes <= MOST_MEBIBYTES

    def __str__(self) -> str:
        kinds = sorted(self.read.keys() | self.refused.keys())
        lines = [f"{'kind':<24}{'read':>8}{'refused':>9}"]
        lines += [f"{kind:<24}{self.read[kind]:>8}{self.refused[kind]:>9}" for kind in kinds]
        lines.append(f"{'in all':<24}{self.read.total():>8}{self.refused.total():>9}")
        lines.append(f"wrong {len(self.wrong)}, foreign {len(self.foreign)}")
        lines.append(f"slowest {self.slowest[0]:.2f} s ({self.slowest[1]}), {self.mebibytes:.0f} MiB more at the peak")
        return "\n".join([*lines, *self.wrong[:20], *self.foreign[:20]])


def _is_shown(message: str) -> bool:
    return len(message) <= 20_000 and all(line.isprintable() for line in message.split("\n"))


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
