"""Rule file -> :class:`RuleSet`, with the file, line and column in every error.

A rule file is data: nothing is evaluated or imported. How its text becomes a tree is in
:mod:`~qdq_surgery.rules.yaml_tree`.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import yaml

from qdq_surgery.errors import RuleFileError, printable
from qdq_surgery.rules.limits import MAX_ENTRIES, MAX_LIST, MAX_RULES, hidden_character
from qdq_surgery.rules.pattern import Pattern, parse_pattern
from qdq_surgery.rules.schema import SCHEMA, SECTIONS, Key, Stored, make
from qdq_surgery.rules.spec import DEFAULT_SPEC, Count, Rule, RuleSet
from qdq_surgery.rules.yaml_tree import TAG, Budget, compose, cut, kind_of, read_text

__all__ = ["load_rules", "rules_of_text", "shipped_rules"]

_MAX_CHAIN = 16
_SUFFIXES = (".yaml", ".yml")

#: What an entry of a list is called, and how many there may be.
_ENTRIES = {
    "rule": ("a rule", MAX_RULES),
    "exclusion": ("an exclude entry", MAX_ENTRIES),
    "share": ("a share entry", MAX_ENTRIES),
}

#: What is wrong with a section that lacks a key, where it has words of its own.
_LACKS = {"rules": "the key '{key}' is missing", "calibrator": "the calibrator has no {key}"}

#: The key that is meant where one word stands in place of a section.
_SHORT = {"calibrator": "name", "place": "spec"}

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
    if not isinstance(rules, (str, os.PathLike)):
        raise RuleFileError(
            f"rules: found a {type(rules).__name__}", "give the name of a shipped set, the path of a file, or a RuleSet"
        )
    return _load(_find(rules, None, "rules"), (), Budget())


def rules_of_text(text: str, name: str) -> RuleSet:
    """The rule set that a file called ``name`` with this text would hold; it is not looked for, nor said to be one.

    Raises:
        RuleFileError: It would be no valid rule file; names the line and the remedy.
    """
    path, budget = Path(name), Budget()
    read = _File(path, text, (path,), budget).rule_set(compose(path, text, budget))
    return replace(read, path=None, files=read.files[1:])


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
    if path not in shipped_rules().values():
        return _read(path, chain, budget)
    known = _KNOWN.get(path)
    if known is None or not known.holds():
        own = Budget()
        rules = _read(path, chain, own)
        texts = [rules.text, *(_KNOWN[base].rules.text for base in rules.files[1:])]
        known = _KNOWN[path] = _Known(rules, dict(zip(rules.files, texts, strict=True)), own)
    # Where it is one too many, reading it says so, and where.
    return known.spend(budget) if known.fits(chain, budget) else _read(path, chain, budget)


def _read(path: Path, chain: tuple[Path, ...], budget: Budget) -> RuleSet:
    text = read_text(path, budget)
    root = compose(path, text, budget)
    return _File(path, text, (*chain, path), budget).rule_set(root)


@dataclass(frozen=True)
class _Known:
    """What was read of a shipped file: most calls ask for one of these few, and YAML is read slowly.

    Attributes:
        texts: Of the file and of those that it extends.
        left: Of a whole budget, after it.
    """

    rules: RuleSet
    texts: dict[Path, str]
    left: Budget

    def holds(self) -> bool:
        """Whether the files still say so."""
        return all(read_text(path, Budget()) == text for path, text in self.texts.items())

    def fits(self, chain: tuple[Path, ...], budget: Budget) -> bool:
        """Whether it may be read behind ``chain``, with what is left."""
        return (
            len(chain) + len(self.rules.files) <= _MAX_CHAIN
            and Budget().bytes - self.left.bytes <= budget.bytes
            and Budget().values - self.left.values <= budget.values
        )

    def spend(self, budget: Budget) -> RuleSet:
        """A rule set of the caller's own, for what reading it takes of ``budget``."""
        budget.bytes -= Budget().bytes - self.left.bytes
        budget.values -= Budget().values - self.left.values
        return copy.deepcopy(self.rules)


_KNOWN: dict[Path, _Known] = {}


class _File:
    """One file being read: knows where it is, so that every error can say it."""

    def __init__(self, path: Path, content: str, chain: tuple[Path, ...], budget: Budget) -> None:
        self.path, self.content, self.chain, self.budget = path, content, chain, budget

    # -- sections, as the schema has them ------------------------------------------------------------------------

    def rule_set(self, root: yaml.MappingNode) -> RuleSet:
        keys = self.keys(root, "rules", "the file")
        if "schema" in keys and (schema := self.integer(keys["schema"], "schema")) != SCHEMA:
            self.refuse(f"schema {schema} is not known", f"this release reads schema {SCHEMA}", keys["schema"])
        self.check_needed(root, keys, "rules", "the file", but="rules" if "extends" in keys else "")
        values = self.values(keys, "rules")
        base: RuleSet = values.get("extends", RuleSet("", "", {}, ()))
        return self.checked(
            root,
            lambda: RuleSet(
                name=values["name"],
                why=values.get("why", ""),
                specs={**base.specs, **values.get("specs", {})},
                rules=_merge(base.rules, values.get("rules", ())),
                exclude=(*base.exclude, *values.get("exclude", ())),
                extends=base.name if "extends" in values else None,
                path=self.path,
                text=self.content,
                files=(self.path, *base.files),
                share=(*base.share, *values.get("share", ())),
                calibration=replace(base.calibration, **values.get("calibration", {})),
            ),
        )

    def section(self, node: yaml.Node, section: str, where: str) -> Any:
        """What a section says; its errors, where they know no place, get that of the section.

        What a match, an expectation or a count says is refused where its rule begins.
        """
        if section in ("match", "expectation", "count"):
            return self.made(node, section, where)
        return self.checked(node, lambda: self.made(node, section, where))

    def made(self, node: yaml.Node, section: str, where: str) -> Any:
        if isinstance(node, yaml.ScalarNode) and section == "spec" and node.value == DEFAULT_SPEC:
            return None
        if isinstance(node, yaml.ScalarNode) and section in _SHORT:
            return make(section, {_SHORT[section]: self.text(node, where)})
        if section == "count" and not (isinstance(node, yaml.MappingNode) and node.value):
            return self.plain_count(node, where)
        keys = self.keys(node, section, where)
        if section == "expectation":
            self.check_promise(node, keys, where)
        self.check_needed(node, keys, section, where)
        if section in ("exclusion", "share"):
            self.check_entry(node, keys, section, where)
        values = self.values(keys, section)
        if section == "rule":
            self.check_rule(keys, values)
        if "source" in SECTIONS[section]:
            values["source"] = f"{printable(self.path.name)}:{node.start_mark.line + 1}"
        # Options that a file leaves out are those of the file that it extends.
        return values if section == "calibration" else make(section, values)

    def values(self, keys: Mapping[str, yaml.Node], section: str) -> dict[str, Any]:
        """The values of a section, read, by key."""
        return {name: self.value(keys[name], key, name) for name, key in SECTIONS[section].items() if name in keys}

    def value(self, node: yaml.Node, key: Key, where: str) -> Any:
        if key.kind in ("section", "count"):
            return self.section(node, key.of, where)
        if key.kind == "sections":
            entry, most = _ENTRIES[key.of]
            return tuple(self.section(item, key.of, entry) for item in self.sequence(node, where, most))
        if key.kind in ("mapping", "quantize"):
            return self.mapping(node, where, lambda inner, name: self.section(inner, key.of, name))
        return getattr(self, key.kind)(node, where)

    def check_needed(
        self, node: yaml.Node, keys: Mapping[str, yaml.Node], section: str, where: str, but: str = ""
    ) -> None:
        for name, key in SECTIONS[section].items():
            if key.needed and name not in keys and name != but:
                found = _LACKS.get(section, "{where} has no key '{key}'").format(where=where, key=name)
                self.refuse(found, key.needed, node)

    def check_promise(self, node: yaml.Node, keys: Mapping[str, yaml.Node], where: str) -> None:
        if not keys:
            self.refuse(
                f"{where} promises nothing", f"write {', '.join(SECTIONS['expectation'])}, or leave it out", node
            )
        types = keys.get("model_types")
        if isinstance(types, yaml.MappingNode) and not types.value:
            self.refuse("model_types names no model type", "write for example bert: 6, or leave it out", types)

    def check_rule(self, keys: Mapping[str, yaml.Node], values: Mapping[str, Any]) -> None:
        pattern: Pattern | None = values["match"].get("pattern")
        if pattern is None:
            found = f"rule '{values['name']}' has no pattern"
            self.refuse(found, "write for example pattern: linear(x, w)", keys["match"])
        for capture, node in self.key_nodes(keys["quantize"]).items():
            if capture not in pattern.captures():
                self.refuse(
                    f"rule '{values['name']}' quantizes '{capture}', which its pattern does not capture",
                    f"the pattern captures: {', '.join(pattern.captures()) or 'none'}",
                    node,
                )

    def check_entry(self, node: yaml.Node, keys: Mapping[str, yaml.Node], section: str, where: str) -> None:
        globs = [key for key in ("sites", "rules", "captures") if key in SECTIONS[section]]
        if not keys.keys() & {"within", "layers", *globs}:
            self.refuse(f"{where} names nothing", f"write within, layers, {', '.join(globs[:-1])} or {globs[-1]}", node)
        for key in globs:
            if key in keys and isinstance(keys[key], yaml.SequenceNode) and not keys[key].value:
                self.refuse(f"{key} names nothing", "write a glob such as 'add_*', or leave it out", keys[key])

    # -- kinds of values, by the schema's name -------------------------------------------------------------------

    def extends(self, node: yaml.Node, where: str) -> RuleSet:
        name = self.text(node, where)
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

    def pattern(self, node: yaml.Node, where: str) -> Pattern:
        text = self.raw_text(node, where)  # its own reader says where a hidden character stands
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

    def layers(self, node: yaml.Node, where: str) -> tuple[int, ...] | str:
        if isinstance(node, yaml.ScalarNode):
            return "all" if node.value == "all" else (self.integer(node, where),)
        return tuple(self.integer(item, where) for item in self.sequence(node, where))

    def plain_count(self, node: yaml.Node, where: str) -> Count:
        """A count that is a number, or a list of numbers."""
        if isinstance(node, yaml.MappingNode):
            self.refuse(f"{where} says nothing", "write min, max or both", node)
        numbers = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not numbers:
            self.refuse(f"{where} allows no number", "write for example 6, [6, 10] or {min: 1}", node)
        return Count(allowed=tuple(self.integer(item, where) for item in numbers))

    def texts(self, node: yaml.Node, where: str) -> tuple[str, ...]:
        items = [node] if isinstance(node, yaml.ScalarNode) else self.sequence(node, where)
        return tuple(self.text(item, where) for item in items)

    def text(self, node: yaml.Node, where: str) -> str:
        text = self.raw_text(node, where)
        self.check_shown(text, where, node)
        return text

    def raw_text(self, node: yaml.Node, where: str) -> str:
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

    #: As a number; stored rules say null where a file leaves it out.
    limit = number

    def flag(self, node: yaml.Node, where: str) -> bool:
        if not isinstance(node, yaml.ScalarNode) or node.value not in ("true", "false") or node.style is not None:
            self.refuse(f"{where} is {kind_of(node)}", "write true or false", node)
        return bool(node.value == "true")

    # -- nodes -------------------------------------------------------------------------------------------------

    def keys(self, node: yaml.Node, section: str, where: str) -> dict[str, yaml.Node]:
        """The nodes of a section, by key; keys that it does not have and repeated keys are refused."""
        known = sorted(name for name, key in SECTIONS[section].items() if key.stored is not Stored.ONLY)
        if not isinstance(node, yaml.MappingNode):
            also = f", or one of: {DEFAULT_SPEC}" if section == "spec" else ""
            self.refuse(f"{where} is {kind_of(node)}", f"write keys: {', '.join(known)}{also}", node)
        for name, key in self.key_nodes(node).items():
            if name not in known:
                self.refuse(f"unknown key '{name}' in {where}", f"known: {', '.join(known)}", key)
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

    def check_shown(self, text: str, where: str, node: yaml.Node) -> None:
        """Refuse hidden characters; only a ``why`` may have lines."""
        hidden = hidden_character(text, keep="\n" if where == "why" else "")
        if hidden is not None:
            self.refuse(f"{where} has the hidden character U+{ord(hidden):04X}", "remove it", node)

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


def _merge(base: tuple[Rule, ...], own: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Own rules replace those of the base that have their name; the others come first, so that they win."""
    named = {rule.name: rule for rule in own}
    kept = tuple(named.get(rule.name, rule) for rule in base)
    used = set(map(id, kept))  # of two own rules with one name, the first stays in front and is refused
    return (*(rule for rule in own if id(rule) not in used), *kept)
