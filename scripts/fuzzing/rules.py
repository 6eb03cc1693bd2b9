"""Rule files and stored rules, mutated: each is read as it says, or refused as a :class:`RuleFileError`."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml

from fuzzing.data import mutated
from fuzzing.outcome import Outcome
from fuzzing.rule_texts import MUTATIONS, NEUTRAL, generated
from qdq_surgery.errors import RuleFileError
from qdq_surgery.rules.json_data import rules_from_data, rules_to_data
from qdq_surgery.rules.pattern import parse_pattern
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.rules.yaml_file import load_rules, shipped_rules

__all__ = ["run"]


def run(count: int, seed: int) -> Outcome:
    """Try ``count`` cases; the same seed gives the same cases."""
    random_ = random.Random(seed)
    shipped = [path.read_text(encoding="utf-8") for path in shipped_rules().values()]
    outcome = Outcome()
    with TemporaryDirectory() as folder:
        for index in range(count):
            text = random_.choice(shipped) if random_.random() < 0.4 else generated(random_)
            kind = random_.choice(_KINDS)
            case = Path(folder) / str(index)
            case.mkdir()
            check = _CASES[kind](random_, text, case)
            outcome.run(kind, f"{kind} {index} of seed {seed}", check, RuleFileError)
            for file in case.iterdir():
                file.unlink()
    return outcome


_Check = Callable[[], str]

_TARGETS = ("/dev/zero", "/dev/null", "/etc/passwd", "/proc/self/mem", "/proc/kmsg")


def _changed(kind: str) -> Callable[[random.Random, str, Path], _Check]:
    def make(random_: random.Random, text: str, folder: Path) -> _Check:
        content = text.encode()
        for _ in range(random_.choice((1, 1, 1, 2, 4))):
            content = MUTATIONS[kind](random_, content)
        return _reading(_write(folder / "mine.yaml", content))

    return make


def _neutral(random_: random.Random, text: str, folder: Path) -> _Check:
    """Comments and blanks are changed, which means nothing."""
    before = _content(load_rules(_write(folder / "before.yaml", text.encode())))
    path = _write(folder / "mine.yaml", random_.choice(NEUTRAL)(random_, text).encode())

    def check() -> str:
        try:
            return "" if _content(load_rules(path)) == before else "another meaning"
        except RuleFileError as error:
            return f"refused: {error}"

    return check


def _chain(random_: random.Random, text: str, folder: Path) -> _Check:
    """Files that extend one another: in a line, in a circle, or themselves."""
    count = random_.choice((2, 3, 8, 16, 17, 18))
    for index in range(count):
        base = f"{random_.choice([index + 1] * 12 + [index, 0])}.yaml"
        _write(folder / f"{index}.yaml", f"schema: 1\nname: n{index}\nextends: {base}\n{'#' * 9000}\n".encode())
    _write(folder / f"{count}.yaml", text.encode())
    return _reading(folder / "0.yaml")


def _special(random_: random.Random, _: str, folder: Path) -> _Check:
    """What is no rule file, given or extended."""
    name = random_.choice(("special.yaml", "special"))
    target = random_.choice(("fifo", "folder", *_TARGETS))
    if target == "fifo":
        os.mkfifo(folder / name)
    elif target == "folder":
        (folder / name).symlink_to(folder)
    else:
        (folder / name).symlink_to(target)
    if random_.random() < 0.3:
        return _reading(folder / name)
    given = random_.choice((name, target, str(folder / name)))
    return _reading(_write(folder / "mine.yaml", f"schema: 1\nname: mine\nextends: {given}\n".encode()))


def _stored(random_: random.Random, text: str, folder: Path) -> _Check:
    data = json.loads(json.dumps(rules_to_data(load_rules(_write(folder / "mine.yaml", text.encode())))))
    for _ in range(random_.choice((0, 1, 1, 1, 2, 4))):
        data = mutated(random_, data)

    def check() -> str:
        rules = rules_from_data(data)
        again = rules_to_data(rules)
        if rules_from_data(json.loads(json.dumps(again))) != rules:
            return "does not come back"
        return "" if _agrees(data, again) else "another meaning"

    return check


def _reading(path: Path) -> _Check:
    def check() -> str:
        try:
            rules = load_rules(path)
        except RuleFileError as error:
            # A link is named by what it leads to.
            ours = str(path.parent), "/proc/", *_TARGETS, *map(str, shipped_rules().values())
            if not any(place in str(error) for place in ours) or "root:" in str(error):
                return f"the place is missing, or something is told: {error}"
            raise
        if load_rules(path) != rules:
            return "another meaning when it is read again"
        if rules_from_data(json.loads(json.dumps(rules_to_data(rules)))) != dataclasses.replace(
            rules, path=None, text="", files=()
        ):
            return "does not come back from a config"
        return _differs(rules)

    return check


def _differs(rules: RuleSet) -> str:
    """How ``rules`` differ from what PyYAML alone makes of their text, with every scalar a text."""
    said = yaml.load(rules.text, Loader=yaml.BaseLoader)
    own = {rule.name: rule for rule in rules.rules}
    for rule in said.get("rules", ()):
        read = own[rule["name"]]
        if (rule["why"], [*rule["quantize"]]) != (read.why, [*read.quantize]):
            return f"rule {rule['name']} says something else"
        if parse_pattern(rule["match"]["pattern"]) != read.pattern:
            return f"rule {rule['name']} has another pattern"
    for name, spec in said.get("specs", {}).items():
        made = rules.specs[name]
        if (made is None) != (spec == "default") or (made and int(spec.get("num_bits", 8)) != made.num_bits):
            return f"spec {name} says something else"
    whys = [*(entry.why for entry in rules.exclude), *(entry.why for entry in rules.share)]
    if any(entry["why"] not in whys for key in ("exclude", "share") for entry in said.get(key, ())):
        return "an entry is missing"
    return "" if said["name"] == rules.name else "another name"


def _agrees(said: Any, again: Any, key: Any = None) -> bool:
    """Whether ``again`` has all that ``said`` says; what is the default need not be said."""
    if key == "pattern":
        return parse_pattern(said) == parse_pattern(again)
    if isinstance(said, dict) and isinstance(again, dict):
        return all(
            _agrees(value, again[name], name) if name in again else _is_default(value) for name, value in said.items()
        )
    if isinstance(said, list) and isinstance(again, list):
        return len(said) == len(again) and all(map(_agrees, said, again))
    return bool(said == again or said == [again] or (key == "model_types" and said == {}))


def _is_default(said: Any) -> bool:
    return all(map(_is_default, said.values())) if isinstance(said, dict) else said in ([], False, None)


def _content(rules: RuleSet) -> RuleSet:
    """Without the places that the lines of a file give."""
    return dataclasses.replace(
        rules,
        path=None,
        text="",
        files=(),
        rules=tuple(dataclasses.replace(rule, source="") for rule in rules.rules),
        exclude=tuple(dataclasses.replace(entry, source="") for entry in rules.exclude),
        share=tuple(dataclasses.replace(entry, source="") for entry in rules.share),
    )


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


_CASES: dict[str, Callable[[random.Random, str, Path], _Check]] = {
    **{kind: _changed(kind) for kind in MUTATIONS},
    "comments and blanks": _neutral,
    "chains": _chain,
    "special files": _special,
    "stored": _stored,
}
_KINDS = [*MUTATIONS, *MUTATIONS, "comments and blanks", "chains", "special files", *["stored"] * 4]
