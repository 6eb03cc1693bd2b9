"""The pages for people are true: links and files are there, tables are what the tests find, the picture is the diff.

That their code runs is tested in test_pages.py.
"""

from __future__ import annotations

import inspect
import itertools
import pydoc
import re

import pytest
from architectures import BY_TYPE, EXPECTED, build
from pages import PAGES, anchors, blocks, prose
from repository import ROOT

import qdq_surgery as qs
from qdq_surgery.cli.commands import parser
from tasks.options import parse

README = (ROOT / "README.md").read_text(encoding="utf-8")
RULES = (ROOT / "docs" / "rules.md").read_text(encoding="utf-8")
API = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")

#: Where a page's `rules/spec.py` may lie.
PLACES = (ROOT, ROOT / "qdq_surgery")

#: What may stand in a link to another site: no test looks whether it answers.
OUTSIDE = "https://"


def links(page: str) -> list[str]:
    """Where the links of a page lead. (Of those with a name, which stand at its end, none leads to a page.)"""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def broken(page: str, link: str) -> bool:
    """Whether what a page links to is not there: no such file, or no such heading in it."""
    if link.startswith(OUTSIDE):
        return False
    name, _, anchor = link.partition("#")
    target = (ROOT / page).parent / name if name else ROOT / page
    if not target.exists():
        return True
    return bool(anchor) and anchor not in anchors(target.resolve().relative_to(ROOT).as_posix())


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 9_000


@pytest.mark.parametrize("page", PAGES)
def test_what_is_linked_to_is_there(page: str) -> None:
    assert not [link for link in links(page) if broken(page, link)]


def test_a_link_that_leads_nowhere_is_seen() -> None:
    assert broken("README.md", "docs/none.md")
    assert broken("docs/guide.md", "rules.md#no-such-heading")
    assert not broken("docs/guide.md", "rules.md#patterns")


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_are_there(page: str) -> None:
    text = prose(page)
    named = re.findall(r"`((?:[\w.-]+/)+(?:[\w-]+\.(?:py|sh|yaml|md))?)`", text)
    missing = [path for path in named if "NAME" not in path and not any((place / path).exists() for place in PLACES)]
    assert not missing
    assert not [each for each in re.findall(r"\bscripts/\w+\.(?:sh|py)", text) if not (ROOT / each).is_file()]


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_prose_is_too_long(page: str) -> None:
    most = 125 if page in ("README.md", "CHANGELOG.md") else 120
    for number, line in enumerate((ROOT / page).read_text(encoding="utf-8").splitlines(), 1):
        assert len(line) <= most or re.match(r"[| ]|\[.+\]: https://", line), f"{page}:{number}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/") and page != "docs/index.md"])
def test_every_page_is_found_from_the_first_two(page: str) -> None:
    assert page in links("README.md")
    assert page.removeprefix("docs/") in links("docs/index.md")


def test_the_table_of_counts_is_what_the_tests_find() -> None:
    found = re.findall(r"^\| ([a-z0-9-]+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| 0 \| (\d+) \|$", RULES, re.MULTILINE)
    wanted = [
        (model_type, str(len(architecture.heads())), *map(str, EXPECTED[model_type]))
        for model_type, architecture in BY_TYPE.items()
    ]
    assert found == wanted


def test_the_rules_are_described() -> None:
    for name in qs.shipped_rules():
        assert f"`{name}`" in README
        assert f"| `{name}` |" in RULES
    for place in qs.load_rules("qdqbert").rules:
        assert place.why


def test_every_command_has_its_heading_and_its_example() -> None:
    [commands] = [action.choices for action in parser()._actions if action.choices]
    text = "\n".join(block.text for block in blocks("docs/command-line.md") if block.language == "bash")
    for command in commands:
        assert command in anchors("docs/command-line.md")
        assert re.search(rf"^qdq-surgery {command}\b|^bash scripts/{command}\.sh", text, re.MULTILINE), command


def test_every_public_name_stands_in_the_reference() -> None:
    """With the first sentence of its docstring, or of what it says of itself."""
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (.+) \|$", API, re.MULTILINE))
    assert set(rows) == {*qs.__all__, "trainer.QATTrainer"} - {"__version__"}
    for name, words in rows.items():
        first = (inspect.getdoc(pydoc.locate(f"qdq_surgery.{name}")) or "").split("\n")[0]
        plain = re.sub(r":\w+:`~?([\w.]+)`", lambda role: f"`{role[1].rpartition('.')[2]}`", first).replace("``", "`")
        assert words == plain, f"{name}: {plain}"


def test_the_example_s_commands_parse() -> None:
    """They are run by test_run_scripts, on a model of a few parameters; here it is the page's own words."""
    [walk] = [block.text for block in blocks("docs/qdqbert.md") if "run_qa.py" in block.text]
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
    picture = blocks("README.md")[0].text
    assert f"BertOutput  {block.where()}" in picture
    for row in block.rows:
        for line in (row.before, row.after):
            assert line is None or line.text in picture
    assert picture.count("\n") == len(block.rows) + 2


def test_the_readme_s_figures_stand_on_the_page_of_figures() -> None:
    """Those of the one small table; the page says which script makes them."""
    rows = re.findall(r"^\| (\S.*) \| (\S+) \| (0\.\d{3}) \|$", README, re.MULTILINE)
    assert len(rows) == 5
    page = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8")
    for name, cosine, nearest in rows:
        assert re.search(rf"^\| {re.escape(name)} \| {re.escape(cosine)} \| \S+ \| {nearest} \|", page, re.MULTILINE), (
            name
        )


def test_every_table_of_figures_names_its_script() -> None:
    for page in ("docs/accuracy.md", "docs/benchmarks.md"):
        for section in re.split(r"^## ", prose(page), flags=re.MULTILINE)[1:]:
            if re.search(r"^\|.*\d \|$", section, re.MULTILINE):
                assert re.search(r"scripts/\w+\.(py|sh)", section), section.partition("\n")[0]


def test_the_five_commands_are_there() -> None:
    [block] = [block for block in blocks("CONTRIBUTING.md") if block.language == "bash"]
    words = re.findall(r"^([^#\n]+?)\s+#", block.text, re.MULTILINE)
    assert len(words) == 5
    for path in re.findall(r"(?:scripts|tests|\.ci)/[\w/.]+", " ".join(words)):
        assert (ROOT / path).exists(), path
