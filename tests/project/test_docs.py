"""The README is true: its code runs, its table is what the tests find, its commands exist, its diff is the diff.

And of all pages: the files that they name and link to are there, code runs, no line is too long.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BY_TYPE, EXPECTED, build
from repository import ROOT

import qdq_surgery as qs
from qdq_surgery.cli.commands import main
from tasks.options import parse

README = (ROOT / "README.md").read_text()

PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]

#: Where a page's `rules/spec.py` may lie.
PLACES = (ROOT, ROOT / "qdq_surgery")


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_steps_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnx")
    monkeypatch.chdir(tmp_path)
    build("bert", "BertForSequenceClassification", num_labels=2).save_pretrained("my-bert")
    rules, scaled = blocks("yaml")
    Path("mine.yaml").write_text(rules)
    Path("scaled.yaml").write_text(scaled)
    torch.manual_seed(0)
    batches = [
        {"input_ids": torch.randint(3, 60, (2, length)), "attention_mask": torch.ones(2, length, dtype=torch.long)}
        for length in (5, 8)
    ]
    scope: dict[str, Any] = {"batches": batches, "other_batches": batches[:1]}
    code = blocks("python")
    assert len(code) == 10
    for block in code[:-2]:
        exec(block, scope)
    assert Path("model.onnx").stat().st_size > 0
    # What was saved is the calibrated, fine-tuned model, and it comes back whole.
    trained, again = scope["qmodel"], scope["again"]
    ranges = {name: quantizer.amax for name, quantizer in qs.quantizers(again).items()}
    assert all(torch.equal(quantizer.amax, ranges[name]) for name, quantizer in qs.quantizers(trained).items())
    with torch.no_grad():
        assert torch.equal(again(**batches[0]).logits, trained(**batches[0]).logits)
        assert not torch.equal(qs.convert(scope["model"])(**batches[0]).logits, trained(**batches[0]).logits)
    assert type(scope["bert"]) is qs.QDQBertForSequenceClassification
    assert len(scope["outputs"].attentions) == 2
    exec(code[-2], scope)
    assert "+ add_local_input_quantizer" in capsys.readouterr().out
    # This block converted with the rules of the README.
    bits = {name: q.num_bits for name, q in qs.quantizers(scope["qmodel"]).items()}
    assert bits["bert.encoder.layer.1.output.dense._input_quantizer"] == 16
    assert not any(".layer.0." in name and ".add_" in name for name in bits)
    exec(code[-1], scope)
    assert "quantizers with a scale per channel" in capsys.readouterr().out


def test_the_table_of_models_is_what_the_tests_find() -> None:
    found = re.findall(r"^\| ([a-z0-9-]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| 0 \| (\d+) \|$", README, re.MULTILINE)
    wanted = [
        (model_type, str(len(architecture.heads())), *map(str, EXPECTED[model_type]))
        for model_type, architecture in BY_TYPE.items()
    ]
    assert found == wanted


def test_the_commands_exist(capsys: pytest.CaptureFixture[str]) -> None:
    commands = re.findall(r"^qdq-surgery (\w+)", "\n".join(blocks("bash")), re.MULTILINE)
    assert commands == ["plan", "diff", "convert", "calibrate", "export", "rules"]
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
    capsys.readouterr()
    for script in re.findall(r"scripts/\w+\.(?:sh|py)", README):
        assert (ROOT / script).is_file()


def test_the_example_s_commands_parse() -> None:
    """They are run by test_run_scripts, on a model of a few parameters; here it is the README's own words."""
    [walk] = [block for block in blocks("bash") if "run_qa.py" in block]
    lines = [line for line in walk.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    data = next(line.partition("=")[2].strip('"') for line in lines if line.startswith("data="))
    runs = [line.replace("$data", data).split() for line in lines if "run_qa.py" in line]
    assert [run[1] for run in runs] == ["scripts/run_qa.py"] * 5
    given = [parse("", run[2:], answers=True) for run in runs]
    assert [each.fp32 for each in given] == [True, False, False, False, False]
    assert [(each.do_calib, each.do_train, each.do_eval, each.save_onnx) for each in given] == [
        (False, True, True, False),
        (True, False, True, False),
        (False, True, True, False),
        (False, False, False, True),
        (False, False, True, False),
    ]
    for before, after in itertools.pairwise(given[:-1]):
        assert after.model_name_or_path == before.output_dir
    assert given[-1].onnx == given[-2].output_dir / "model.onnx"


def test_the_picture_is_the_diff() -> None:
    """The README shortens the descriptors and widens the columns; the lines are those of the diff."""
    model = build("bert", "BertModel", num_hidden_layers=6)
    made = qs.diff(model, qs.convert(model))
    [block] = [block for block in made.blocks if block.block == "BertOutput"]
    picture = README.split("```")[1]
    assert f"BertOutput  {block.where()}" in picture
    for row in block.rows:
        for line in (row.before, row.after):
            assert line is None or line.text in picture
    assert picture.count("\n") == len(block.rows) + 3


def test_the_rules_are_described() -> None:
    for name in qs.shipped_rules():
        assert name in README
    for place in qs.load_rules("qdqbert").rules:
        assert place.why


@pytest.mark.parametrize("name", PAGES)
def test_no_line_of_prose_is_too_long(name: str) -> None:
    most = 125 if name in ("README.md", "CHANGELOG.md") else 120
    for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
        assert len(line) <= most or line.startswith(("|", " ")), f"{name}:{number}"


@pytest.mark.parametrize("name", PAGES)
def test_links_and_files_that_are_named_are_there(name: str) -> None:
    page = ROOT / name
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#\s]+)\)", text):
        assert link.startswith("https://") or (page.parent / link).exists(), link
    named = re.findall(r"`((?:[\w.-]+/)+(?:[\w-]+\.(?:py|sh|yaml|md))?)`", text)
    missing = [path for path in named if "NAME" not in path and not any((place / path).exists() for place in PLACES)]
    assert not missing


@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md"])
def test_code_of_the_other_pages_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    for block in blocks("python", (ROOT / name).read_text()):
        exec(block, scope)


def test_the_five_commands_are_there() -> None:
    [block] = blocks("bash", (ROOT / "CONTRIBUTING.md").read_text())
    words = re.findall(r"^([^#\n]+?)\s+#", block, re.MULTILINE)
    assert len(words) == 5
    for path in re.findall(r"(?:scripts|tests|\.ci)/[\w/.]+", " ".join(words)):
        assert (ROOT / path).exists(), path
