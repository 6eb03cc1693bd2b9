"""Rules as frozen, typed data. Every class checks itself; nothing here knows YAML, models or graphs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qdq_surgery.errors import RuleFileError, printable
from qdq_surgery.rules.limits import (
    MAX_COUNT,
    MAX_ENTRIES,
    MAX_LAYER,
    MAX_LIST,
    MAX_RULES,
    MAX_SPECS,
    MAX_WILDCARDS,
    check_globs,
    check_name,
    check_size,
    check_text,
    glob_fits,
    is_wildcard,
)
from qdq_surgery.rules.pattern import Pattern
from qdq_surgery.rules.quant_spec import QuantSpec

__all__ = [
    "DEFAULT_SPEC",
    "CalibrationOptions",
    "Count",
    "Exclude",
    "Expect",
    "Place",
    "Rule",
    "RuleSet",
    "Scope",
    "Share",
    "is_quantizer_name",
]

#: The spec name that means "pytorch-quantization's default descriptor at the time of the conversion".
DEFAULT_SPEC = "default"

_QUANTIZER_NAME = re.compile(r"[a-z][a-z0-9_]*_quantizer")
_SOURCE = re.compile(r"(.+:[0-9]{1,9})?")


def is_quantizer_name(name: str) -> bool:
    """Whether ``name`` can be a quantizer's attribute name: ``matmul_q_input_quantizer`` and the like."""
    return len(name) <= 128 and _QUANTIZER_NAME.fullmatch(name) is not None


@dataclass(frozen=True)
class Place:
    """What a rule does with one capture: the spec to use, and the quantizer's name if the rule gives one."""

    spec: str = DEFAULT_SPEC
    name: str | None = None

    def __post_init__(self) -> None:
        check_name(self.spec, "the name of a spec")
        if self.name is not None and not is_quantizer_name(self.name):
            raise RuleFileError(
                f"'{self.name}' is no quantizer name",
                "write small letters, digits and _, at most 128, ending in _quantizer, for example "
                "matmul_q_input_quantizer",
            )


@dataclass(frozen=True)
class Scope:
    """Which modules are meant. All keys that are given must hold.

    Attributes:
        within: Globs over the module path (``*`` also crosses dots); ``None`` means everywhere.
        layers: Indices of encoder layers; ``"all"`` means any encoder layer, ``None`` also what lies outside them.
    """

    within: tuple[str, ...] | None = None
    layers: tuple[int, ...] | str | None = None

    def __post_init__(self) -> None:
        if self.within is not None and not self.within:
            raise RuleFileError("within names no module", "write a glob such as '*.attention.*', or leave it out")
        check_globs(self.within or (), "within")
        if isinstance(self.layers, str) and self.layers != "all":
            raise RuleFileError(f"layers is '{self.layers}'", "write all, 0 or [0, 1]")
        if isinstance(self.layers, tuple):
            if not self.layers:
                raise RuleFileError("layers names no layer", "write all, 0 or [0, 1]")
            check_size(len(self.layers), "layers", "entries", MAX_LIST)
            for layer in self.layers:
                if not 0 <= layer <= MAX_LAYER:
                    raise RuleFileError(f"layer {layer} does not exist", f"layers count from 0, up to {MAX_LAYER}")

    def holds(self, path: str, layer: int | None) -> bool:
        """Whether the module at ``path``, in encoder layer ``layer`` (or in none), is meant."""
        if self.layers is not None:
            if layer is None:
                return False
            if self.layers != "all" and layer not in self.layers:
                return False
        return self.within is None or glob_fits(self.within, path)

    def __str__(self) -> str:
        parts = [] if self.within is None else [f"within {', '.join(self.within)}"]
        if self.layers is not None:
            which = self.layers if isinstance(self.layers, str) else ", ".join(map(str, self.layers))
            parts.append(f"layers {which}")
        return "; ".join(parts) or "everywhere"


@dataclass(frozen=True)
class Count:
    """Allowed numbers of matches: a list of them, or a range."""

    allowed: tuple[int, ...] = ()
    minimum: int | None = None
    maximum: int | None = None

    def __post_init__(self) -> None:
        numbers = [n for n in (*self.allowed, self.minimum, self.maximum) if n is not None]
        if not numbers:
            raise RuleFileError("a count allows no number", "write for example 6, [6, 10] or {min: 1}")
        if min(numbers) < 0:
            raise RuleFileError(f"a count of {min(numbers)} cannot be", "write 0 or more")
        if max(numbers) > MAX_COUNT:
            raise RuleFileError(f"a count of {max(numbers)} cannot be", f"write at most {MAX_COUNT}")
        check_size(len(self.allowed), "a count", "numbers", MAX_LIST)
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise RuleFileError(f"no count is at least {self.minimum} and at most {self.maximum}", "exchange them")

    def holds(self, count: int) -> bool:
        """Whether ``count`` is allowed."""
        if self.allowed:
            return count in self.allowed
        return (self.minimum is None or count >= self.minimum) and (self.maximum is None or count <= self.maximum)

    def __str__(self) -> str:
        if self.allowed:
            return " or ".join(map(str, self.allowed))
        if self.maximum is None:
            return f"at least {self.minimum}"
        return f"at most {self.maximum}" if self.minimum is None else f"{self.minimum} to {self.maximum}"


@dataclass(frozen=True)
class Expect:
    """What a rule must find, so that a change of the architecture is loud.

    Attributes:
        per_layer: Matches in each encoder layer that is in the rule's scope.
        total: Matches in the whole model.
        model_types: ``per_layer`` for named architectures (``config.model_type``), in place of the general one.
    """

    per_layer: Count | None = None
    total: Count | None = None
    model_types: Mapping[str, Count] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_size(len(self.model_types), "model_types", "entries", MAX_LIST)
        for name in self.model_types:
            check_name(name, "a name under model_types")

    def layer_count(self, model_type: str) -> Count | None:
        """Matches in each layer of this architecture; ``None``: any number."""
        return self.model_types.get(model_type, self.per_layer)


@dataclass(frozen=True)
class Rule:
    """One rule: keys that match (``scope``, ``pattern``), keys that act (``quantize``), and what it must find.

    Attributes:
        quantize: What to do with each capture of the pattern.
        unless: Where this pattern fits, too, the rule does not.
        optional: Whether the rule may match nothing.
        source: The file and line that it was read from, as ``file:line``.
        rows: How many rows the table of the embedding that the pattern names has; ``None``: any number.
    """

    name: str
    why: str
    pattern: Pattern
    quantize: Mapping[str, Place]
    scope: Scope = Scope()
    expect: Expect = Expect()
    optional: bool = False
    source: str = ""
    unless: Pattern | None = None
    rows: Count | None = None

    def __post_init__(self) -> None:
        check_name(self.name, "the name of a rule")
        check_text(self.why, "why")
        _check_source(self.source)
        if self.rows is not None and self.pattern.operators != ("embedding",):
            raise RuleFileError(
                f"rule '{self.name}' counts rows, and its pattern is about a {self.pattern.operators[0]}",
                "remove rows, or write pattern: embedding(_, w)",
            )
        if not self.quantize:
            raise RuleFileError(f"rule '{self.name}' quantizes nothing", "name at least one capture of its pattern")
        captures = self.pattern.captures()
        for capture in self.quantize:
            if capture not in captures:
                known = ", ".join(sorted(captures)) or "none"
                raise RuleFileError(
                    f"rule '{self.name}' quantizes '{capture}', which its pattern does not capture",
                    f"the pattern captures: {known}",
                )


@dataclass(frozen=True)
class Exclude:
    """Sites to leave in float although a rule matches them. All keys that are given must hold.

    Attributes:
        optional: Whether a model may have none of them.
    """

    why: str
    scope: Scope = Scope()
    sites: tuple[str, ...] | None = None
    rules: tuple[str, ...] | None = None
    source: str = ""
    optional: bool = False

    def __post_init__(self) -> None:
        _check_entry(self)

    def holds(self, rule: str, site: str, path: str, layer: int | None) -> bool:
        """Whether the quantizer called ``site`` that ``rule`` would put at module ``path`` is meant."""
        return (
            self.scope.holds(path, layer)
            and (self.sites is None or glob_fits(self.sites, site))
            and (self.rules is None or glob_fits(self.rules, rule))
        )


@dataclass(frozen=True)
class Share:
    """Quantizers that get one range: the largest of theirs. All keys that are given must hold.

    One group is made in each block: of the quantizers in it and those of its linears.

    Attributes:
        sites: Globs over the quantizer's attribute name.
        rules: Names of the rules that put the quantizers there.
        captures: Captures of these rules' patterns.
        optional: Whether there may be nothing to share.
    """

    why: str
    scope: Scope = Scope()
    sites: tuple[str, ...] | None = None
    rules: tuple[str, ...] | None = None
    captures: tuple[str, ...] | None = None
    optional: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        _check_entry(self)
        check_globs(self.captures or (), "captures")

    def holds(self, rule: str, capture: str, site: str, path: str, layer: int | None) -> bool:
        """Whether the quantizer called ``site`` that ``rule`` put on ``capture`` at module ``path`` is meant."""
        return (
            self.scope.holds(path, layer)
            and (self.sites is None or glob_fits(self.sites, site))
            and (self.rules is None or glob_fits(self.rules, rule))
            and (self.captures is None or capture in self.captures)
        )


def _check_entry(entry: Exclude | Share) -> None:
    check_text(entry.why, "why")
    _check_source(entry.source)
    check_globs(entry.sites or (), "sites")
    check_globs(entry.rules or (), "rules")


def _check_source(source: str) -> None:
    check_text(source, "source", keep="")
    if not _SOURCE.fullmatch(source):
        raise RuleFileError(f"the source '{source}' is none", "write file:line, or nothing")


@dataclass(frozen=True)
class CalibrationOptions:
    """How a model with these rules is calibrated and trained.

    Attributes:
        dropout: Whether dropout is active while activations are collected, as it is in training.
        recalibrate_weights: Whether the ranges of weights are found again from the weights when training ends.
    """

    dropout: bool = False
    recalibrate_weights: bool = False


@dataclass(frozen=True)
class RuleSet:
    """A rule file, read and checked.

    Attributes:
        name: What it is called.
        why: What it is for, in a sentence.
        exclude: What stays in float though a rule matches.
        path: The file; ``None`` if it was not read from one.
        specs: By name; ``None`` stands for pytorch-quantization's default descriptors.
        rules: In order of precedence: for each operand the first match wins.
        text: The file's own text, so that a converted model can carry its rules.
        files: This file and those that it extends.
        extends: Name of the rule set that this one builds on.
        share: Which quantizers get one range.
        calibration: How the model is calibrated.
    """

    name: str
    why: str
    specs: Mapping[str, QuantSpec | None]
    rules: tuple[Rule, ...]
    exclude: tuple[Exclude, ...] = ()
    extends: str | None = None
    path: Path | None = None
    text: str = ""
    files: tuple[Path, ...] = ()
    share: tuple[Share, ...] = ()
    calibration: CalibrationOptions = CalibrationOptions()

    def __post_init__(self) -> None:
        self._check_size()
        if DEFAULT_SPEC in self.specs:
            raise RuleFileError(
                f"a spec is called '{DEFAULT_SPEC}', which means pytorch-quantization's default descriptors",
                "rename it",
            )
        self._check_rules()
        self._check_entries()

    def _check_size(self) -> None:
        check_name(self.name, "the name")
        check_text(self.why, "why")
        check_name(self.extends or "", "extends")
        for what, items, most in (
            ("specs", self.specs, MAX_SPECS),
            ("rules", self.rules, MAX_RULES),
            ("exclude", self.exclude, MAX_ENTRIES),
            ("share", self.share, MAX_ENTRIES),
        ):
            check_size(len(items), what, "entries", most)
        for name in self.specs:
            check_name(name, "the name of a spec")
        wild = {glob for globs in self._globs() for glob in globs if is_wildcard(glob)}
        check_size(len(wild), "the rule set", "different globs with *, ? or [", MAX_WILDCARDS)

    def _globs(self) -> Iterator[tuple[str, ...]]:
        entries: tuple[Exclude | Share, ...] = (*self.exclude, *self.share)
        for scope in (*(rule.scope for rule in self.rules), *(entry.scope for entry in entries)):
            yield scope.within or ()
        for entry in entries:
            yield entry.sites or ()
            yield entry.rules or ()

    def _check_rules(self) -> None:
        """Names of rules are used once, names of quantizers too, and specs are defined."""
        seen: set[str] = set()
        named: dict[str, str] = {}
        for rule in self.rules:
            if rule.name in seen:
                raise RuleFileError(f"two rules are called '{rule.name}'", "rename one", line=self._line(rule))
            seen.add(rule.name)
            for place in rule.quantize.values():
                if place.spec != DEFAULT_SPEC and place.spec not in self.specs:
                    raise RuleFileError(
                        f"rule '{rule.name}' uses the spec '{place.spec}', which is not defined",
                        f"known: {', '.join([DEFAULT_SPEC, *self.specs])}",
                        line=self._line(rule),
                    )
                if place.name is None:
                    continue
                other = named.get(place.name)
                if other is not None:
                    twice = f"rule '{other}' twice names"
                    both = f"rules '{other}' and '{rule.name}' both name"
                    raise RuleFileError(
                        f"{twice if other == rule.name else both} a quantizer '{place.name}'",
                        "give each its own name under 'as'",
                        line=self._line(rule),
                    )
                named[place.name] = rule.name

    def _check_entries(self) -> None:
        """Whatever names rules names some that there are."""
        known = {rule.name for rule in self.rules}
        fits: dict[str, bool] = {}  # by glob: each is tried on the names once
        entries: tuple[Exclude | Share, ...] = (*self.exclude, *self.share)
        for entry in entries:
            for glob in entry.rules or ():
                if glob not in fits:
                    fits[glob] = glob in known or (
                        is_wildcard(glob) and any(glob_fits((glob,), name) for name in known)
                    )
                if not fits[glob]:
                    raise RuleFileError(
                        f"{'exclude' if isinstance(entry, Exclude) else 'share'} names the rule '{glob}', which does "
                        "not exist",
                        f"rules: {', '.join(sorted(known)) or 'none'}",
                        line=self._line(entry),
                    )

    def _line(self, item: Rule | Exclude | Share) -> int | None:
        """The line of ``item`` in this file; ``None`` if it comes from another one."""
        name, _, line = item.source.rpartition(":")
        return int(line) if self.path is not None and name == printable(self.path.name) else None

    def spec(self, name: str) -> QuantSpec | None:
        """The spec called ``name``; ``None`` where it means the default descriptors."""
        return None if name == DEFAULT_SPEC else self.specs[name]

    def rule(self, name: str) -> Rule:
        """The rule called ``name``.

        Raises:
            KeyError: There is none.
        """
        for rule in self.rules:
            if rule.name == name:
                return rule
        raise KeyError(name)
