"""Rule file -> :class:`RuleSet`, with the file, line and column in every error.

A rule file is data: nothing is evaluated or imported. How its text becomes a tree is in
:mod:`~qdq_surgery.rules.yaml_tree`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from qdq_surgery.errors import RuleFileError, printable
from qdq_surgery.rules.limits import MAX_ENTRIES, MAX_LIST, MAX_RULES, hidden_character
from qdq_surgery.rules.pattern import Pattern, parse_pattern
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.spec import (
    DEFAULT_SPEC,
    CalibrationOptions,
    Count,
    Exclude,
    Expect,
    Place,
    Rule,
    RuleSet,
    Scope,
    Share,
)
from qdq_surgery.rules.yaml_tree import TAG, Budget, compose, cut, kind_of, read_text

__all__ = ["SCHEMA", "load_rules", "shipped_rules"]

#: The version of the file format that this release reads.
SCHEMA = 1

_MAX_CHAIN = 16
_SUFFIXES = (".yaml", ".yml")
_SECTIONS = ("why", "extends", "specs", "exclude", "share", "calibration")

_T = TypeVar("_T")


def shipped_rules() -> dict[str, Path]:
    """The rule files that come with the package, by name."""
    here = Path(__file__).resolve().parent
    # In a wheel the files lie inside the package; in a checkout they stand at the top level.
    folder = here / "shipped" if (here / "shipped").is_dir() else here.parent.parent / "rules"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def load_rules(rules: str | Path | RuleSet) -> RuleSet:
    """Read a rule set.

    Args:
        rules: The name of a shipped rule file, the path of one, or a rule set, which is returned as it is.

    Returns:
        The rules with those of the file that it extends, checked.

    Raises:
        RuleFileError: The file cannot be read or is no valid rule file; names the line and the remedy.
    """
    if isinstance(rules, RuleSet):
        return rules
    return _load(_find(rules, None, "rules"), (), Budget())


def _find(rules: str | Path, beside: Path | None, what: str) -> Path:
    shipped = shipped_rules()
    if isinstance(rules, str) and rules in shipped:
        return shipped[rules]
    path = Path(rules)
    if beside is not None and not path.is_absolute():
        path = beside.parent / path
    try:
        found = path.is_file()
    except OSError:  # a name too long for a file, a folder that may not be read
        found = False
    if not found:
        raise RuleFileError(
            f"{what}: '{cut(str(rules), 200)}' is neither a shipped rule set nor a file",
            f"shipped: {', '.join(shipped) or 'none'}; or give the path of a YAML file",
        )
    return path


def _load(path: Path, chain: tuple[Path, ...], budget: Budget) -> RuleSet:
    path = path.resolve()
    text = read_text(path, budget)
    root = compose(path, text, budget)
    return _File(path, text, (*chain, path), budget).rule_set(root)


class _File:
    """One file being read: knows where it is, so that every error can say it."""

    def __init__(self, path: Path, text: str, chain: tuple[Path, ...], budget: Budget) -> None:
        self.path, self.text, self.chain, self.budget = path, text, chain, budget

    # -- the grammar, top down ---------------------------------------------------------------------------------

    def rule_set(self, root: yaml.MappingNode) -> RuleSet:
        keys = self.keys(root, "the file", {"schema", "name", "rules"}, set(_SECTIONS), ())
        if "schema" not in keys:
            self.refuse("the key 'schema' is missing", f"write schema: {SCHEMA}", root)
        schema = self.integer(keys["schema"], "schema")
        if schema != SCHEMA:
            self.refuse(f"schema {schema} is not known", f"this release reads schema {SCHEMA}", keys["schema"])
        for key in ("name",) if "extends" in keys else ("name", "rules"):
            if key not in keys:
                self.refuse(f"the key '{key}' is missing", f"write {key}:", root)
        base = self.base(keys["extends"]) if "extends" in keys else None
        specs = dict(base.specs) if base else {}
        if "specs" in keys:
            specs.update(self.mapping(keys["specs"], "specs", self.spec))
        rules = (
            tuple(self.rule(node) for node in self.sequence(keys["rules"], "rules", MAX_RULES))
            if "rules" in keys
            else ()
        )
        exclude = (
            tuple(self.exclude(node) for node in self.sequence(keys["exclude"], "exclude", MAX_ENTRIES))
            if "exclude" in keys
            else ()
        )
        share = (
            tuple(self.share(node) for node in self.sequence(keys["share"], "share", MAX_ENTRIES))
            if "share" in keys
            else ()
        )
        calibration = base.calibration if base else CalibrationOptions()
        if "calibration" in keys:
            calibration = self.calibration(keys["calibration"], calibration)
        names: set[str] = set()
        for rule in rules:
            if rule.name in names:
                self.refuse(f"two rules are called '{rule.name}'", "rename one", root, line=_line_of(rule))
            names.add(rule.name)
        return self.checked(
            root,
            lambda: RuleSet(
                name=self.string(keys["name"], "name"),
                why=self.string(keys["why"], "why") if "why" in keys else "",
                specs=specs,
                rules=_merge(base.rules if base else (), rules),
                exclude=(*(base.exclude if base else ()), *exclude),
                extends=base.name if base else None,
                path=self.path,
                text=self.text,
                files=(self.path, *(base.files if base else ())),
                share=(*(base.share if base else ()), *share),
                calibration=calibration,
            ),
        )

    def base(self, node: yaml.Node) -> RuleSet:
        name = self.string(node, "extends")
        if name not in shipped_rules() and not name.endswith(_SUFFIXES):
            # A rule file of a stranger must not name any file there is, of which the errors would then tell.
            self.refuse(
                f"extends: '{cut(name, 200)}' is neither a shipped rule set nor a file",
                f"shipped: {', '.join(shipped_rules()) or 'none'}; or give the path of a .yaml file",
                node,
            )
        try:
            path = _find(name, self.path, "extends").resolve()
        except RuleFileError as error:
            self.refuse(error.found, error.fix, node)
        if path in self.chain:
            circle = " -> ".join(step.name for step in (*self.chain[self.chain.index(path) :], path))
            self.refuse(f"circular extends: {circle}", "let one of them stand on its own", node)
        if len(self.chain) >= _MAX_CHAIN:
            self.refuse(f"a chain of more than {_MAX_CHAIN} files", "extend a file that stands on its own", node)
        return _load(path, self.chain, self.budget)

    def spec(self, node: yaml.Node, where: str) -> QuantSpec | None:
        if isinstance(node, yaml.ScalarNode) and node.value == DEFAULT_SPEC:
            return None
        keys = self.keys(
            node,
            where,
            {"num_bits", "axis", "unsigned", "narrow_range", "calibrator", "max_amax", "learn"},
            set(),
            (DEFAULT_SPEC,),
        )
        return self.checked(
            node,
            lambda: QuantSpec(
                num_bits=self.integer(keys["num_bits"], "num_bits") if "num_bits" in keys else 8,
                axis=self.integer_or_null(keys["axis"], "axis") if "axis" in keys else None,
                unsigned=self.boolean(keys["unsigned"], "unsigned") if "unsigned" in keys else False,
                narrow_range=self.boolean(keys["narrow_range"], "narrow_range") if "narrow_range" in keys else False,
                calibrator=self.calibrator(keys["calibrator"]) if "calibrator" in keys else CalibratorSpec(),
                max_amax=self.number(keys["max_amax"], "max_amax") if "max_amax" in keys else None,
                learn=self.boolean(keys["learn"], "learn") if "learn" in keys else False,
            ),
        )

    def calibrator(self, node: yaml.Node) -> CalibratorSpec:
        if isinstance(node, yaml.ScalarNode):
            return self.checked(node, lambda: CalibratorSpec(self.string(node, "calibrator")))
        keys = self.keys(node, "calibrator", {"name"}, {"percentile", "num_bins"}, ())
        if "name" not in keys:
            self.refuse("the calibrator has no name", "write for example name: percentile", node)
        return self.checked(
            node,
            lambda: CalibratorSpec(
                self.string(keys["name"], "name"),
                self.number(keys["percentile"], "percentile") if "percentile" in keys else None,
                self.integer(keys["num_bins"], "num_bins") if "num_bins" in keys else None,
            ),
        )

    def rule(self, node: yaml.Node) -> Rule:
        keys = self.keys(node, "a rule", {"name", "why", "match", "quantize"}, {"expect", "optional"}, ())
        for key in ("name", "why", "match", "quantize"):
            if key not in keys:
                self.refuse(f"a rule has no key '{key}'", f"write {key}:", node)
        name = self.string(keys["name"], "name")
        match = self.keys(keys["match"], "match", {"pattern"}, {"within", "layers"}, ())
        if "pattern" not in match:
            self.refuse(f"rule '{name}' has no pattern", "write for example pattern: linear(x, w)", keys["match"])
        quantize = self.mapping(keys["quantize"], "quantize", self.place)
        pattern = self.pattern(match["pattern"])
        for capture, capture_node in self.key_nodes(keys["quantize"]).items():
            if capture not in pattern.captures():
                known = ", ".join(pattern.captures()) or "none"
                self.refuse(
                    f"rule '{name}' quantizes '{capture}', which its pattern does not capture",
                    f"the pattern captures: {known}",
                    capture_node,
                )
        return self.checked(
            node,
            lambda: Rule(
                name=name,
                why=self.string(keys["why"], "why"),
                pattern=pattern,
                quantize=quantize,
                scope=self.scope(match),
                expect=self.expect(keys["expect"]) if "expect" in keys else Expect(),
                optional=self.boolean(keys["optional"], "optional") if "optional" in keys else False,
                source=self.source(node),
            ),
        )

    def place(self, node: yaml.Node, where: str) -> Place:
        if isinstance(node, yaml.ScalarNode):
            return self.checked(node, lambda: Place(self.string(node, where)))
        keys = self.keys(node, where, {"spec", "as"}, set(), ())
        spec = self.string(keys["spec"], "spec") if "spec" in keys else DEFAULT_SPEC
        return self.checked(node, lambda: Place(spec, self.string(keys["as"], "as") if "as" in keys else None))

    def pattern(self, node: yaml.Node) -> Pattern:
        text = self.text_of(node, "pattern")  # its own reader says where a hidden character stands
        assert isinstance(node, yaml.ScalarNode)
        try:
            return parse_pattern(text)
        except RuleFileError as error:
            # Columns map one to one where the text stands in the file as it is: on one line, without escapes.
            start, end = node.start_mark, node.end_mark
            quotes = 2 if node.style in ("'", '"') else 0
            as_it_is = start.line == end.line and end.column - start.column == len(text) + quotes
            column = start.column + quotes // 2 + (error.column or 1) if as_it_is else None
            self.refuse(error.found, error.fix, node, column=column)

    def scope(self, keys: Mapping[str, yaml.Node]) -> Scope:
        return Scope(
            within=self.strings(keys["within"], "within") if "within" in keys else None,
            layers=self.layers(keys["layers"]) if "layers" in keys else None,
        )

    def layers(self, node: yaml.Node) -> tuple[int, ...] | str:
        if isinstance(node, yaml.ScalarNode) and node.value == "all":
            return "all"
        if isinstance(node, yaml.ScalarNode):
            return (self.integer(node, "layers"),)
        return tuple(self.integer(item, "layers") for item in self.sequence(node, "layers"))

    def expect(self, node: yaml.Node) -> Expect:
        keys = self.keys(node, "expect", {"per_layer", "total", "model_types"}, set(), ())
        return Expect(
            per_layer=self.count(keys["per_layer"], "per_layer") if "per_layer" in keys else None,
            total=self.count(keys["total"], "total") if "total" in keys else None,
            model_types=self.mapping(keys["model_types"], "model_types", self.count) if "model_types" in keys else {},
        )

    def count(self, node: yaml.Node, where: str) -> Count:
        if isinstance(node, yaml.ScalarNode):
            return Count(allowed=(self.integer(node, where),))
        if isinstance(node, yaml.SequenceNode):
            allowed = tuple(self.integer(item, where) for item in node.value)
            if not allowed:
                self.refuse(f"{where} allows no number", "write for example 6, [6, 10] or {min: 1}", node)
            return Count(allowed=allowed)
        keys = self.keys(node, where, {"min", "max"}, set(), ())
        if not keys:
            self.refuse(f"{where} says nothing", "write min, max or both", node)
        return Count(
            minimum=self.integer(keys["min"], "min") if "min" in keys else None,
            maximum=self.integer(keys["max"], "max") if "max" in keys else None,
        )

    def exclude(self, node: yaml.Node) -> Exclude:
        return self.checked(
            node, lambda: Exclude(**self.choice(node, "an exclude entry", "why these stay in float", (), ()))
        )

    def share(self, node: yaml.Node) -> Share:
        why = "why these have one range"
        return self.checked(
            node, lambda: Share(**self.choice(node, "a share entry", why, ("captures",), ("optional",)))
        )

    def choice(
        self, node: yaml.Node, where: str, why: str, more: tuple[str, ...], flags: tuple[str, ...]
    ) -> dict[str, Any]:
        """An entry that chooses quantizers: its fields, by name."""
        globs = ("sites", "rules", *more)
        keys = self.keys(node, where, {"why"}, {"within", "layers", *globs, *flags}, ())
        if "why" not in keys:
            self.refuse(f"{where} has no key 'why'", f"say {why}", node)
        if not keys.keys() & {"within", "layers", *globs}:
            self.refuse(f"{where} names nothing", f"write within, layers, {', '.join(globs[:-1])} or {globs[-1]}", node)
        for key in globs:
            if key in keys and isinstance(keys[key], yaml.SequenceNode) and not keys[key].value:
                self.refuse(f"{key} names nothing", "write a glob such as 'add_*', or leave it out", keys[key])
        return {
            "why": self.string(keys["why"], "why"),
            "scope": self.scope(keys),
            "source": self.source(node),
            **{key: self.strings(keys[key], key) for key in globs if key in keys},
            **{key: self.boolean(keys[key], key) for key in flags if key in keys},
        }

    def calibration(self, node: yaml.Node, base: CalibrationOptions) -> CalibrationOptions:
        """Options that are left out are those of ``base``."""
        keys = self.keys(node, "calibration", {"dropout", "recalibrate_weights"}, set(), ())
        return replace(base, **{key: self.boolean(value, key) for key, value in keys.items()})

    # -- typed readers -----------------------------------------------------------------------------------------

    def keys(
        self, node: yaml.Node, where: str, wanted: set[str], optional: set[str], words: tuple[str, ...]
    ) -> dict[str, yaml.Node]:
        """The values of a mapping, by key; keys outside ``wanted`` and ``optional`` and repeated keys are refused."""
        if not isinstance(node, yaml.MappingNode):
            also = f", or one of: {', '.join(words)}" if words else ""
            self.refuse(
                f"{where} is {kind_of(node)}", f"write keys: {', '.join(sorted(wanted | optional))}{also}", node
            )
        for name, key in self.key_nodes(node).items():
            if name not in wanted | optional:
                self.refuse(f"unknown key '{name}' in {where}", f"known: {', '.join(sorted(wanted | optional))}", key)
        return {key.value: value for key, value in node.value}

    def key_nodes(self, node: yaml.Node) -> dict[str, yaml.Node]:
        assert isinstance(node, yaml.MappingNode)
        found: dict[str, yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.refuse(f"a key is {kind_of(key)}", "write a plain word", key)
            if any("\ud800" <= letter <= "\udfff" for letter in key.value):
                self.refuse("a key has half a character (a surrogate)", "remove the escape", key)
            self.check_shown(key.value, "a key", key)
            if key.value in found:
                line = found[key.value].start_mark.line + 1
                self.refuse(f"the key '{key.value}' stands twice (first in line {line})", "remove one", key)
            found[key.value] = key
        return found

    def mapping(self, node: yaml.Node, where: str, read: Callable[[yaml.Node, str], _T]) -> dict[str, _T]:
        if not isinstance(node, yaml.MappingNode):
            self.refuse(f"{where} is {kind_of(node)}", "write keys and values", node)
        if len(node.value) > MAX_LIST:
            self.refuse(f"{where} has {len(node.value)} keys", f"write at most {MAX_LIST}", node.value[MAX_LIST][0])
        self.key_nodes(node)
        return {key.value: read(value, f"{where}.{key.value}") for key, value in node.value}

    def sequence(self, node: yaml.Node, where: str, most: int = MAX_LIST) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self.refuse(f"{where} is {kind_of(node)}", "write a list", node)
        if len(node.value) > most:
            self.refuse(f"{where} has {len(node.value)} entries", f"write at most {most}", node.value[most])
        return list(node.value)

    def strings(self, node: yaml.Node, where: str) -> tuple[str, ...]:
        if isinstance(node, yaml.ScalarNode):
            return (self.string(node, where),)
        return tuple(self.string(item, where) for item in self.sequence(node, where))

    def string(self, node: yaml.Node, where: str) -> str:
        text = self.text_of(node, where)
        self.check_shown(text, where, node)
        return text

    def text_of(self, node: yaml.Node, where: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != TAG + "str" or not node.value.strip():
            self.refuse(
                f"{where} is {kind_of(node)}, not a text", "write a word, in quotes if it looks like a number", node
            )
        if any("\ud800" <= letter <= "\udfff" for letter in node.value):
            self.refuse(f"{where} has half a character (a surrogate)", "remove the escape", node)
        return str(node.value)

    def integer(self, node: yaml.Node, where: str) -> int:
        if not isinstance(node, yaml.ScalarNode) or node.tag != TAG + "int":
            self.refuse(f"{where} is {kind_of(node)}, not a whole number", "write for example 8", node)
        # YAML 1.1 also reads 0x10, 1_000 and 1:30 as integers.
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9]{0,8})", node.value):
            self.refuse(f"{where} is '{cut(node.value)}', not a decimal whole number", "write for example 8", node)
        return int(node.value)

    def integer_or_null(self, node: yaml.Node, where: str) -> int | None:
        if isinstance(node, yaml.ScalarNode) and node.tag == TAG + "null" and node.value == "null":
            return None
        return self.integer(node, where)

    def number(self, node: yaml.Node, where: str) -> float:
        if not isinstance(node, yaml.ScalarNode) or node.tag not in (TAG + "int", TAG + "float"):
            self.refuse(f"{where} is {kind_of(node)}, not a number", "write for example 99.99", node)
        if not re.fullmatch(r"[-+]?(0|[1-9][0-9]*)(\.[0-9]*)?(e[-+]?[0-9]+)?", node.value, re.IGNORECASE):
            self.refuse(f"{where} is '{cut(node.value)}', not a decimal number", "write for example 99.99", node)
        return float(node.value)

    def boolean(self, node: yaml.Node, where: str) -> bool:
        if not isinstance(node, yaml.ScalarNode) or node.value not in ("true", "false") or node.style is not None:
            self.refuse(f"{where} is {kind_of(node)}", "write true or false", node)
        return bool(node.value == "true")

    def check_shown(self, text: str, where: str, node: yaml.Node) -> None:
        """Refuse hidden characters; only a ``why`` may have lines."""
        hidden = hidden_character(text, keep="\n" if where == "why" else "")
        if hidden is not None:
            self.refuse(f"{where} has the hidden character U+{ord(hidden):04X}", "remove it", node)

    def source(self, node: yaml.Node) -> str:
        return f"{printable(self.path.name)}:{node.start_mark.line + 1}"

    # -- errors ------------------------------------------------------------------------------------------------

    def refuse(
        self, found: str, fix: str, node: yaml.Node, *, line: int | None = None, column: int | None = None
    ) -> NoReturn:
        raise RuleFileError(
            found,
            fix,
            path=self.path,
            line=line or node.start_mark.line + 1,
            column=column or (None if line else node.start_mark.column + 1),
        ) from None

    def checked(self, node: yaml.Node, make: Callable[[], _T]) -> _T:
        """What ``make`` builds; an error that does not know its place yet gets that of ``node``."""
        try:
            return make()
        except RuleFileError as error:
            if error.path is not None:
                raise
            self.refuse(error.found, error.fix, node, line=error.line)


def _line_of(rule: Rule) -> int:
    return int(rule.source.rpartition(":")[2])


def _merge(base: tuple[Rule, ...], own: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Own rules replace those of the base that have their name; the others come first, so that they win."""
    replaced = {rule.name: rule for rule in own}
    kept = tuple(replaced.pop(rule.name, rule) for rule in base)
    return (*(rule for rule in own if rule.name in replaced), *kept)
