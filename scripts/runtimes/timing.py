"""Interleaved timing, in rounds that no other process disturbs."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from runtimes.subjects import Batch
from runtimes.workspace import Run

__all__ = ["BUSY", "Round", "Watch", "interleaved"]

#: Seconds before each turn: the threads of a runtime wait for more work by spinning, and would do so in the next one's
#: turn.
REST = 0.05

#: Of the cores' time: a round from which other processes took more is run again...
BUSY = 0.05

#: ... until there are this many times as many rounds as wanted.
PATIENCE = 3


@dataclass(frozen=True)
class Round:
    """Seconds of each run, and what share of the cores' time other processes took."""

    seconds: dict[str, float]
    others: float


def interleaved(runs: Mapping[str, Run], batch: Batch, rounds: int, watch: Watch, rest: float = REST) -> list[Round]:
    """Time all runs in turns; the least disturbed rounds.

    In its turn a contender rests, runs once uncounted (its threads wake up, its weights come back into the caches that
    the others have filled), and runs once for the clock.
    """
    found: list[Round] = []
    while sum(each.others <= BUSY for each in found) < rounds and len(found) < PATIENCE * rounds:
        seconds = {}
        watch.start()
        for name, run in runs.items():
            time.sleep(rest)
            run(batch)
            start = time.perf_counter()
            run(batch)
            seconds[name] = time.perf_counter() - start
        found.append(Round(seconds, watch.stop()))
    return sorted(found, key=lambda each: each.others)[:rounds]


class Watch:
    """How much of the processor others take. Where the system does not tell (it is not Linux), nothing."""

    def __init__(self, statistics: Path = Path("/proc/stat")) -> None:
        self._statistics = statistics if statistics.is_file() else None
        self._at = (0.0, 0.0, 0.0)

    def start(self) -> None:
        self._at = self._now()

    def stop(self) -> float:
        """The share of all cores' time since the start, from 0 to 1."""
        wall, busy, own = (now - before for now, before in zip(self._now(), self._at, strict=True))
        return max(0.0, busy - own) / (wall * (os.cpu_count() or 1)) if self._statistics else 0.0

    def _now(self) -> tuple[float, float, float]:
        own = os.times()
        return time.perf_counter(), self._busy(), own.user + own.system

    def _busy(self) -> float:
        if self._statistics is None:
            return 0.0
        # proc_stat(5): user, nice, system, idle, iowait, irq, softirq, steal, and what the first two include already.
        ticks = [int(each) for each in self._statistics.read_text().split("\n", 1)[0].split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")
