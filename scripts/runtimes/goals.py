"""What has to be reached on BERT-base, against what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from runtimes.figures import BASE, Figures

__all__ = ["Goal", "goals", "lines"]

ALL = ("8x128", "1x128", "1x384")


@dataclass(frozen=True)
class Goal:
    """One number: what it is, what was measured (None: not in this run) and the least or the most it may be."""

    words: str
    measured: float | None
    wanted: float
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted

    def __str__(self) -> str:
        verdict = {None: "not measured", True: "met", False: "MISSED"}[self.met]
        measured = "" if self.measured is None else f" {self.measured:.3f},"
        return f"{verdict}: {self.words}:{measured} {'at most' if self.at_most else 'at least'} {self.wanted:.2f}"


def goals(figures: Figures) -> list[Goal]:
    """All goals, those of which something is missing included."""
    found = []

    def faster(name: str, than: str, wanted: dict[str, float]) -> None:
        for shape, factor in wanted.items():
            words = f"{name} / {than} at {shape}, times as fast"
            found.append(Goal(words, figures.times(name, shape, than), factor))

    over_nncf = {"8x128": 1.05, "1x128": 1.05, "1x384": 1.3}
    for precision in ("", "-f32"):
        ours = f"ours-openvino{precision}"
        faster(ours, f"openvino-nncf{precision}", over_nncf)
        faster(ours, f"reference-openvino{precision}", dict.fromkeys(ALL, 1.0))
        faster(ours, BASE, {"8x128": 4.0})
    faster("ours-openvino-qdqbert", "reference-openvino", dict.fromkeys(ALL, 1.0))
    faster("ours-onnxruntime", BASE, {"8x128": 2.8, "1x128": 2.0})
    faster("ours-onnxruntime", "ort-dynamic", dict.fromkeys(ALL, 1.0))
    for name, cost in (("ours-onnxruntime", 1.05), ("ours-openvino", 1.02)):
        faster(name, f"{name}-plain", dict.fromkeys(ALL, 1.0 / cost))
    for name in ("ours-onnxruntime", "ours-openvino"):
        found.append(Goal(f"file of {name} / float file", figures.size(name), 0.45, at_most=True))
    return found


def lines(figures: Figures) -> list[str]:
    """For printing; goals of which something was left out are only counted."""
    found = goals(figures)
    measured = [goal for goal in found if goal.met is not None]
    made = [f"{figures.words}: {sum(goal.met or False for goal in measured)} of {len(measured)} goals are met"]
    made += [f"  {goal}" for goal in measured]
    if len(measured) < len(found):
        made.append(f"  {len(found) - len(measured)} are not measured: contenders or shapes are left out")
    return made
