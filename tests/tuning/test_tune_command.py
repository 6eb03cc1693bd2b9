"""The command that tunes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_checkpoint import TEXTS, save_tiny_bert, write_texts

import qdq_surgery as qs
from qdq_surgery.cli.commands import main


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny", TEXTS)


def test_it_writes_a_rule_file_that_converts(
    model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = tmp_path / "mine.yaml"
    options = ["--target", "openvino", "--metric", "cosine", "--held-out", str(texts), "--batch", "2"]
    assert main(["tune", str(model), str(texts), str(rules), *options, "--width", "120"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "cosine at the output" in said
    assert "on other texts" in said
    assert f"written to {rules}" in said
    found = qs.load_rules(rules)
    assert (found.name, found.extends) == ("mine", "openvino")
    assert main(["calibrate", str(model), str(texts), str(tmp_path / "out"), "--rules", str(rules)]) == 0


def test_it_gives_json(model: Path, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = tmp_path / "mine.yaml"
    options = ["--target", "linear-only", "--budget", "0", "--float-share", "1", "--json"]
    assert main(["tune", str(model), str(texts), str(rules), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["met"] is True
    assert found["in_float"] == 1.0
    assert found["rules"] == rules.read_text(encoding="utf-8")


def test_what_is_asked_for_is_what_is_tuned_for(
    model: Path, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def tune(_: Any, __: Any, target: Any, budget: float, **options: Any) -> None:
        asked.update(options, target=target, budget=budget)
        raise qs.OptionError("enough")

    monkeypatch.setattr("qdq_surgery.cli.models.tune", tune)
    options = ["--target", "openvino", "--budget", "0.25", "--float-share", "0.5", "--metric", "kl"]
    assert main(["tune", str(model), str(texts), str(tmp_path / "mine.yaml"), *options]) == 1
    wanted = {"target": "openvino", "budget": 0.25, "float_share": 0.5, "metric": "kl"}
    assert {name: asked[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("name", "options", "found"),
    [
        ("mine.txt", [], "a rule file ends in .yaml; give mine.yaml"),
        ("there.yaml", [], "exists; "),
        ("nowhere/mine.yaml", [], "there is no folder"),
        ("mine.yaml", ["--target", "nowhere"], "'nowhere' is neither a shipped rule set nor a file"),
        ("mine.yaml", ["--budget", "-1"], "is no error: give a number of at least 0"),
        ("mine.yaml", ["--float-share", "2"], "is no share: give a number from 0 to 1"),
        ("mine.yaml", ["--held-out", "nowhere.txt"], "nowhere.txt"),
    ],
)
def test_mistakes_end_in_one_line(
    model: Path,
    texts: Path,
    tmp_path: Path,
    name: str,
    options: list[str],
    found: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "there.yaml").write_text("mine")
    assert main(["tune", str(model), str(texts), str(tmp_path / name), *options]) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("qdq-surgery: error: ")
    assert found in last
    assert not (tmp_path / "mine.yaml").exists()
