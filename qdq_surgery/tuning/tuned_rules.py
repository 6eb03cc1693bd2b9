"""What tuning found, as a rule set and as the text of its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from qdq_surgery.rules.quant_spec import QuantSpec
from qdq_surgery.rules.spec import Exclude, Place, Rule, RuleSet, Scope
from qdq_surgery.rules.yaml_file import load_rules, rules_of_text, shipped_rules
from qdq_surgery.rules.yaml_writer import rules_text
from qdq_surgery.tuning.trial import Kind, Operator

__all__ = ["LEFT_AT_MOST", "tuned_rules"]

#: So many operators can be left in float by name: a rule set has an end.
LEFT_AT_MOST = 128


def tuned_rules(
    base: RuleSet,
    name: str,
    why: str,
    specs: Mapping[Kind, tuple[QuantSpec, str]],
    left: Sequence[tuple[Operator, str]],
) -> RuleSet:
    """The base's rules with other specs and more exclusions, with the text of a file that says so.

    Args:
        specs: Of the kinds that have another one than in ``base``, each with its reason.
        left: Operators that stay in float, each with its reason.
    """
    named = dict(base.specs)
    places: dict[str, dict[str, str]] = {}
    reasons: dict[str, list[str]] = {}
    for kind, (spec, reason) in specs.items():
        named[_free(f"{kind.rule}-{kind.capture}", named)] = spec
        places.setdefault(kind.rule, {})[kind.capture] = next(reversed(named))
        reasons.setdefault(kind.rule, []).append(reason)
    made = replace(
        base,
        name=name,
        why=why,
        specs=named,
        rules=tuple(_changed(rule, places.get(rule.name, {}), reasons.get(rule.name, [])) for rule in base.rules),
        exclude=(*base.exclude, *(_exclusion(operator, reason) for operator, reason in left)),
        extends=base.name,
    )
    shipped = base.name in shipped_rules() and load_rules(base.name) == base
    text = rules_text(made, base if shipped else None)
    return rules_of_text(text, f"{name}.yaml")


def _changed(rule: Rule, specs: Mapping[str, str], reasons: Sequence[str]) -> Rule:
    if not specs:
        return rule
    places = {name: Place(specs.get(name, place.spec), place.name) for name, place in rule.quantize.items()}
    return replace(rule, quantize=places, why="; ".join((rule.why, *reasons)))


def _exclusion(operator: Operator, reason: str) -> Exclude:
    names = sorted({name.rpartition(".")[2] for name in operator.quantizers})
    return Exclude(reason, Scope(within=(operator.owner,)), sites=tuple(names))


def _free(name: str, taken: Mapping[str, object]) -> str:
    return name if name not in taken else next(n for i in range(2, 1000) if (n := f"{name}-{i}") not in taken)
