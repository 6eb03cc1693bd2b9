"""What a rule file promises to find, held against what was found. A promise that is broken is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from difflib import SequenceMatcher

from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qdq_surgery.errors import MatchError, printable
from qdq_surgery.graph.block_graph import join_path
from qdq_surgery.rules.spec import Exclude, Rule, RuleSet, Share
from qdq_surgery.trace.units import Survey, Unit

__all__ = ["Tally", "check_expectations"]

#: How alike two names are from which on one is the other with a mistake: 'brt' or 'Bert' is, 'mybert' is not.
_MISSPELT = 0.82

_ALL_EXCLUDED = "their exclude entries leave all they match in float"


@dataclass
class Tally:
    """What was found while matching.

    Attributes:
        places: By rule, every place that its pattern fits, whether or not an earlier rule took it or it is excluded:
            so that a user's rule for one layer does not break the count of the rule that it overrides.
        layers: By rule and path of the encoder layer, how many places.
        misses: By rule, the place where its pattern came furthest, and how far.
        excluded: Indices of the exclude entries that excluded something.
    """

    places: dict[str, set[Hashable]] = field(default_factory=dict)
    layers: Counter[tuple[str, str]] = field(default_factory=Counter)
    misses: dict[str, tuple[int, str]] = field(default_factory=dict)
    excluded: set[int] = field(default_factory=set)

    def fit(self, rule: Rule, unit: Unit, place: Hashable) -> None:
        """The pattern of ``rule`` fits at ``place`` in ``unit``."""
        places = self.places.setdefault(rule.name, set())
        if unit.layer is not None and place not in places:
            self.layers[rule.name, unit.path] += 1
        places.add(place)

    def miss(self, rule: Rule, depth: int, reason: str) -> None:
        """The pattern of ``rule`` failed after ``depth`` steps."""
        if rule.name not in self.misses or depth > self.misses[rule.name][0]:
            self.misses[rule.name] = (depth, reason)


def check_expectations(rules: RuleSet, tally: Tally, found: Survey, whole: PreTrainedModel, sites: list[str]) -> None:
    """Hold the promises of ``rules`` against ``tally``.

    Args:
        whole: The model.
        sites: Names of the quantizers, for the message.

    Raises:
        MatchError: A rule matches nothing, a count is not what the rule expects, or an exclusion excludes nothing;
            or one of these is so because a block has no graph.
    """
    model, model_type = type(whole).__name__, str(whole.config.model_type)
    layers = [unit for unit in found.units if unit.layer is not None and unit.tree is not None]
    for unit in layers:
        if unit.tree is not None and unit.tree.failure is not None:
            raise MatchError(f"the encoder layer {unit.path} of {model} has no graph: {unit.tree.failure}")
    hidden = _hidden_block(layers, model)
    unseen = f"; {hidden}" if hidden else ""
    for rule in rules.rules:
        where = f"{rule.source + ': ' if rule.source else ''}rule '{rule.name}'"
        _check_types(rule, where, model_type)
        nearest = f"; nearest: {tally.misses[rule.name][1]}" if rule.name in tally.misses else ""
        total = len(tally.places.get(rule.name, ()))
        if total == 0 and not rule.optional:
            raise MatchError(
                f"{where} matches nothing in {model} (pattern {rule.pattern}; {rule.scope}){nearest}{unseen}; correct "
                "its pattern or scope, or mark it optional: true"
            )
        if rule.expect.total is not None and not rule.expect.total.holds(total):
            raise MatchError(
                f"{where} expects {rule.expect.total} matches in all, found {total} in {model}{nearest}{unseen}; "
                "correct the rule, or the count if the architecture is meant to differ"
            )
        for unit in layers:
            if rule.scope.layers not in (None, "all") and unit.layer not in (rule.scope.layers or ()):
                continue
            promised = model_type in rule.expect.model_types and not _is_borrowed(whole, unit)
            count = rule.expect.layer_count(model_type) if promised else rule.expect.per_layer
            if count is None or (total == 0 and not promised):
                continue
            seen = tally.layers[rule.name, unit.path]
            if not count.holds(seen):
                if inside := _hidden_block([unit], model):
                    raise MatchError(f"{inside}; in the layer's others {where} finds {seen} matches of {count}")
                raise MatchError(
                    f"{where} expects {count} matches per layer, found {seen} in layer "
                    f"{unit.layer} of {model}{nearest}; correct the rule, or the count if the architecture is meant to "
                    "differ"
                )
    if not sites:
        why = _ALL_EXCLUDED if tally.excluded else _why_nothing(tally, layers)
        raise MatchError(f"the rules of '{printable(rules.name)}' put no quantizer into {model}: {why}{unseen}")
    _check_exclusions(rules, tally, sites)
    _check_layers(rules, {unit.layer for unit in found.units}, model)


def _check_types(rule: Rule, where: str, model_type: str) -> None:
    """A promise about a type that is nowhere, but for a letter is the model's, would hold whatever is found."""
    for name in rule.expect.model_types:
        unknown = name != model_type and name not in CONFIG_MAPPING
        if unknown and SequenceMatcher(None, name.lower(), model_type.lower()).ratio() > _MISSPELT:
            raise MatchError(
                f"{where} expects something of the model type '{printable(name)}', which transformers does not know, "
                f"and this model is a '{model_type}'; correct it, or make it known (AutoConfig.register)"
            )


def _why_nothing(tally: Tally, layers: list[Unit]) -> str:
    if not layers:
        return (
            "no encoder layer of it is run by the example inputs, and encoder layers are the entries of an "
            "nn.ModuleList that the model calls itself (an nn.Sequential is one block)"
        )
    if any(tally.places.values()):
        return "what their patterns match cannot take any"
    nearest = max(tally.misses.values(), default=None)
    return f"their patterns match nothing in {len(layers)} encoder layers" + (
        f"; nearest: {nearest[1]}" if nearest else ""
    )


def _hidden_block(units: list[Unit], model: str) -> str | None:
    """The first block in these layers that no rule can look into, and why: what is missing may lie there."""
    for unit in units:
        for graph in unit.tree.opaque() if unit.tree is not None else ():
            return f"{join_path(unit.path, graph.path)} of {model} has no graph: {graph.failure}"
    return None


def _check_exclusions(rules: RuleSet, tally: Tally, sites: list[str]) -> None:
    for index, exclude in enumerate(rules.exclude):
        if index not in tally.excluded and not exclude.optional:
            raise MatchError(
                f"{exclude.source + ': ' if exclude.source else ''}an exclude entry excludes nothing "
                f"({printable(exclude.why)}); sites are called for example {', '.join(sites[:4]) or 'nothing'}; "
                "correct it, or mark it optional: true"
            )


def _check_layers(rules: RuleSet, there: set[int | None], model: str) -> None:
    """A layer that is named beside others, and is not there, was meant to be another one: the last, say."""
    entries: list[tuple[str, Rule | Exclude | Share]] = [(f"rule '{each.name}'", each) for each in rules.rules]
    entries += [("an exclude entry", each) for each in rules.exclude] + [
        ("a share entry", each) for each in rules.share
    ]
    for what, entry in entries:
        named = entry.scope.layers
        missing = sorted(set(named) - there) if isinstance(named, tuple) and not entry.optional else []
        if missing:
            last = max((each for each in there if each is not None), default=-1)
            raise MatchError(
                f"{entry.source + ': ' if entry.source else ''}{what} names layer {missing[0]}, and the last encoder "
                f"layer of {model} is {last}; correct it, or mark it optional: true"
            )


def _is_borrowed(model: PreTrainedModel, unit: Unit) -> bool:
    """Whether the layer is somebody's own, with a type of transformers': what is promised of BERT is not of it.

    The type is transformers', too, where somebody's own config inherits it.
    """
    named = next((each for each in type(model.config).__mro__ if "model_type" in vars(each)), type(model.config))
    homes = [each.__module__ for each in (named, type(unit.tree.owner if unit.tree else model))]
    return [home.startswith("transformers.") for home in homes] == [True, False]
