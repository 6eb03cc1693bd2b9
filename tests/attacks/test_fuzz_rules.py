"""A sample of ``scripts/fuzz.py rules``: mutated rule files are read as they say or refused as rule files are."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import fuzz
from fuzzing import rules as fuzzed
from fuzzing.data import mutated
from fuzzing.outcome import Outcome
from fuzzing.rule_texts import generated
from qdq_surgery.errors import RuleFileError
from qdq_surgery.rules.yaml_file import load_rules


@pytest.mark.slow
def test_mutated_rules_are_read_as_they_say_or_refused() -> None:
    outcome = fuzzed.run(150, 20)
    assert outcome.is_right, str(outcome)
    assert outcome.read.total() + outcome.refused.total() == 150
    assert outcome.read.total() > 15
    assert outcome.refused.total() > 50


@pytest.mark.parametrize("seed", range(20))
def test_what_is_mutated_is_a_good_rule_file(seed: int, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(generated(random.Random(seed)))
    assert load_rules(tmp_path / "mine.yaml").rules


def test_the_same_seed_gives_the_same_cases() -> None:
    first, second = fuzzed.run(20, 3), fuzzed.run(20, 3)
    assert (first.read, first.refused) == (second.read, second.refused)
    data = {"a": [1, 2], "b": {"c": "d"}}
    assert repr(mutated(random.Random(1), data)) == repr(mutated(random.Random(1), data))
    assert data == {"a": [1, 2], "b": {"c": "d"}}


def raising(error: Exception) -> Callable[[], str]:
    def check() -> str:
        raise error

    return check


@pytest.mark.parametrize(
    ("check", "right"),
    [
        pytest.param(lambda: "", True, id="read"),
        pytest.param(lambda: "another meaning", False, id="wrong"),
        pytest.param(raising(RuleFileError("found", "fix")), True, id="refused"),
        pytest.param(raising(KeyError("a")), False, id="foreign"),
        pytest.param(raising(RecursionError()), False, id="recursion"),
    ],
)
def test_the_verdict_can_be_red(check: Callable[[], str], right: bool) -> None:
    outcome = Outcome()
    outcome.run("kind", "case", check, RuleFileError)
    assert outcome.is_right is right


def test_a_reader_that_lets_everything_pass_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    good = load_rules("linear-only")
    monkeypatch.setattr(fuzzed, "rules_from_data", lambda _: good)
    assert not fuzzed.run(40, 0).is_right


def test_the_command_prints_the_counts(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(count: int, seed: int) -> Any:
        assert (count, seed) == (7, 2)
        outcome = Outcome()
        outcome.run("bytes", "case", raising(KeyError("a")), RuleFileError)
        return outcome

    monkeypatch.setattr(fuzz.rules, "run", run)
    assert fuzz.main(["rules", "--count", "7", "--seed", "2"]) == 1
    printed = capsys.readouterr().out
    assert "wrong 0, foreign 1" in printed
    assert "case: KeyError" in printed
