"""Which sites get one range: a rule file's ``share`` entries, applied to the sites that were found."""

from __future__ import annotations

from collections.abc import Sequence

from qdq_surgery.errors import MatchError
from qdq_surgery.match.plan import Site
from qdq_surgery.rules.spec import RuleSet

__all__ = ["share_ranges"]


def share_ranges(rules: RuleSet, sites: Sequence[Site]) -> tuple[tuple[str, ...], ...]:
    """Groups of quantizers, by qualified name, that get one range.

    An entry makes one group in each block: of the block's own quantizers and those of the linears in it. Groups that
    have a quantizer in common are one.

    Raises:
        MatchError: An entry that is not optional finds nothing to share, or one names a learned range.
    """
    groups: list[set[str]] = []
    for entry in rules.share:
        blocks: dict[str, set[str]] = {}
        for site in sites:
            if entry.holds(site.rule, site.capture, site.name, site.owner, site.layer):
                block = site.owner.rpartition(".")[0] if site.routine == "module" else site.owner
                blocks.setdefault(block, set()).add(site.quantizer)
        found = [group for group in blocks.values() if len(group) > 1]
        if not found and not entry.optional:
            raise MatchError(
                f"{entry.source + ': ' if entry.source else ''}a share entry finds no two quantizers in one block "
                f"({entry.why}); correct its sites, rules or scope, or mark it optional: true"
            )
        learns = {site.quantizer for site in sites if site.spec is not None and site.spec.learn}
        learned = {name for group in found for name in group if name in learns}
        if learned:
            raise MatchError(
                f"{entry.source + ': ' if entry.source else ''}a share entry names {min(learned)}, whose range is "
                "learned: learned ranges part; remove learn: true from its spec, or exclude it from sharing"
            )
        for group in found:
            touching = [other for other in groups if other & group]
            groups = [other for other in groups if not other & group]
            groups.append(group.union(*touching))
    return tuple(tuple(sorted(group)) for group in groups)
