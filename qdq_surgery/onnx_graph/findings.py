"""What the placement linter says, as data and as text. Nothing here looks at a graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from qdq_surgery.text.layer_names import star_numbers
from qdq_surgery.text.view import Column, Line, Part, Result, Table, line

__all__ = ["VERDICTS", "Finding", "Findings"]

#: In the order in which they are told.
VERDICTS = ("blocks", "idle", "enables", "note")

_STYLES = {"blocks": "bold red", "idle": "yellow", "enables": "green", "note": "cyan"}
_SHOWN = 6


@dataclass(frozen=True)
class Finding:
    """One fusion at one place.

    Attributes:
        verdict: ``"blocks"``: the place stands in the way of the fusion. ``"idle"``: it enables nothing there, and is
            only work. ``"enables"``: the runtime makes the fusion there. ``"note"``: of no single place.
        fusion: What the runtime would make, in words.
        reason: Why.
        remedy: A line of a rule file, an option of the export or of the runtime; empty where nothing is to be done.
        sites: Names of the PyTorch quantizers whose Q/DQ pair it is about; several where they are one pair.
        nodes: Names of the nodes that read the pair, or that the finding is about.
    """

    verdict: str
    fusion: str
    reason: str
    remedy: str = ""
    sites: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """The site, or else the nodes, with a star for the layer's number."""
        names = list(dict.fromkeys(map(star_numbers, self.sites or self.nodes)))
        if not names:
            return "the model"
        first, *others = names
        parts = [name.split(".") for name in names]
        stem = next((at for at, each in enumerate(zip(*parts, strict=False)) if len(set(each)) > 1), 0)
        shown = [".".join(each[stem:]) for each in parts[1 : _SHOWN + 1]]
        more = [f"{len(others) - _SHOWN} more"] if len(others) > _SHOWN else []
        return f"{first} (and {', '.join([*shown, *more])})" if others else first


@dataclass(frozen=True, repr=False)
class Findings(Result):
    """All that the linter found in one file, what blocks first.

    Attributes:
        model: Name of the model's class, or of the graph.
        target: The runtime.
        sites: How many Q/DQ pairs the file has.
        findings: In the order of :data:`VERDICTS`, then of the graph.
    """

    model: str
    target: str
    sites: int
    findings: tuple[Finding, ...]

    def with_verdict(self, verdict: str) -> tuple[Finding, ...]:
        """The findings of one of :data:`VERDICTS`."""
        return tuple(finding for finding in self.findings if finding.verdict == verdict)

    def of(self, name: str) -> tuple[Finding, ...]:
        """The findings about one quantizer, or one node."""
        return tuple(finding for finding in self.findings if name in finding.sites or name in finding.nodes)

    def to_json(self) -> dict[str, Any]:
        """The findings as plain data; ``schema`` is the version of this form."""
        return {
            "schema": 1,
            "model": self.model,
            "target": self.target,
            "sites": self.sites,
            "counts": {verdict: len(self.with_verdict(verdict)) for verdict in VERDICTS},
            "findings": [asdict(finding) for finding in self.findings],
        }

    def _title(self) -> Line:
        blocks, idle, enables = (len(self.with_verdict(verdict)) for verdict in VERDICTS[:3])
        return line(
            (self.model, "bold"),
            " for ",
            (self.target, "bold"),
            f": {self.sites} Q/DQ sites; {blocks} findings block a fusion, {idle} are only work, {enables} enable one",
        )

    def _parts(self) -> Iterable[Part]:
        rows = ((line((each.verdict, _STYLES[each.verdict])), _words(each, places)) for each, places in self._alike())
        yield Table((Column("verdict", wraps=False), Column("finding")), tuple(rows), header=None)

    def _alike(self) -> list[tuple[Finding, dict[str, int]]]:
        """One finding for all that say the same, with its places; those that differ only in the layer count as one."""
        groups: dict[tuple[str, ...], tuple[Finding, dict[str, int]]] = {}
        for finding in self.findings:
            key = (finding.verdict, finding.fusion, star_numbers(finding.reason), star_numbers(finding.remedy))
            places = groups.setdefault(key, (finding, {}))[1]
            places[finding.where] = places.get(finding.where, 0) + 1
        return list(groups.values())


def _words(finding: Finding, places: dict[str, int]) -> tuple[Line, ...]:
    head = line((finding.fusion, f"bold {_STYLES[finding.verdict]}"), f": {star_numbers(finding.reason)}")
    remedy = [line((f"-> {star_numbers(finding.remedy)}", "italic"))] if finding.remedy else []
    found = (line(f"{count} x {where}" if count > 1 else where, indent=4) for where, count in places.items())
    return head, *remedy, *found
