"""What the placement linter says, as data and as text. Nothing here looks at a graph."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from qdq_surgery.text.layer_names import star_numbers
from qdq_surgery.text.render import Rendered

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


@dataclass(frozen=True)
class Findings(Rendered):
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

    def __rich__(self) -> RenderableType:
        counts = {verdict: len(self.with_verdict(verdict)) for verdict in VERDICTS}
        head = Text.assemble(
            (self.model, "bold"),
            " for ",
            (self.target, "bold"),
            f": {self.sites} Q/DQ sites; {counts['blocks']} findings block a fusion, {counts['idle']} are only work, "
            f"{counts['enables']} enable one",
        )
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for finding, places in self._alike():
            style = _STYLES[finding.verdict]
            table.add_row(Text(finding.verdict, style=style), _words(finding, places, style))
        return Group(head, table)

    def _alike(self) -> list[tuple[Finding, dict[str, int]]]:
        """One finding for all that say the same, with its places; those that differ only in the layer count as one."""
        groups: dict[tuple[str, ...], tuple[Finding, dict[str, int]]] = {}
        for finding in self.findings:
            key = (finding.verdict, finding.fusion, star_numbers(finding.reason), star_numbers(finding.remedy))
            places = groups.setdefault(key, (finding, {}))[1]
            places[finding.where] = places.get(finding.where, 0) + 1
        return list(groups.values())


def _words(finding: Finding, places: dict[str, int], style: str) -> RenderableType:
    head = Text.assemble((finding.fusion, f"bold {style}"), f": {star_numbers(finding.reason)}")
    parts: list[RenderableType] = [head]
    if finding.remedy:
        parts.append(Text(f"-> {star_numbers(finding.remedy)}", style="italic"))
    for where, count in places.items():
        parts.append(Padding(Text(f"{count} x {where}" if count > 1 else where), (0, 0, 0, 4)))
    return Group(*parts)
