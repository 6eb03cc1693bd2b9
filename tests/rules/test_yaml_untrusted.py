"""Rule files that are none, too large, too deep or of a stranger: refused before they cost or do anything."""

from __future__ import annotations

import os
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from rule_texts import (
    GOOD,
    HEAD,
    RULES,
    TOO_LONG,
    check,
    nodes_made,
    refusal,
    with_calibrator,
    with_exclude,
    with_key,
    with_pattern,
    with_quantize,
    with_spec,
    write,
    write_marked,
)

from qdq_surgery.errors import QdqSurgeryError, RuleFileError, printable
from qdq_surgery.rules.yaml_file import load_rules

# -- the file as a whole ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "found", "fix"),
    [
        pytest.param(b"", "the file is empty", "schema, name and rules", id="empty"),
        pytest.param(b"\n\n", "the file is empty", "schema, name and rules", id="blank-lines"),
        pytest.param(b"# only a comment\n", "the file is empty", "schema, name and rules", id="comment"),
        pytest.param(GOOD.encode("utf-16"), "not UTF-8 at byte 0", "save the file as UTF-8", id="utf-16"),
        pytest.param("schema: 1\nname: é\n".encode("latin-1"), "not UTF-8 at byte 16", "as UTF-8", id="latin-1"),
        pytest.param(
            GOOD.encode() + b"# \xed\xa0\x80\n", f"not UTF-8 at byte {len(GOOD) + 2}", "UTF-8", id="surrogate"
        ),
        pytest.param(bytes(range(128, 256)), "not UTF-8 at byte 0", "save the file as UTF-8", id="bytes"),
        pytest.param(b"schema: 1\0\n", "not YAML: special characters", "remove the character", id="nul"),
        # What PyYAML itself trips over, with an error that is not its own; the wording is Python's.
        *(
            pytest.param(f'{HEAD}why: "{escape}"\n{RULES}'.encode(), "^not YAML: ", "remove the escape", id=escape[1:])
            for escape in (r"\UFFFFFFFF", r"\U00110000", r"\U80000000")
        ),
        pytest.param(
            f"%YAML 1.{'1' * 5000}\n---\n{GOOD}".encode(),
            "^not YAML: .{1,60}$",
            "remove the escape or the directive",
            id="version-of-5000-digits",
        ),
        pytest.param(b"schema: 1\nname: \x07\n", "not YAML: special characters", "remove the character", id="bell"),
    ],
)
def test_no_line_where_the_whole_file_is_meant(content: bytes, found: str, fix: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    check(refusal(path), path, None, None, found, fix)


def test_a_file_of_10_megabytes_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "mine.yaml", GOOD)
    with path.open("ab") as file:
        file.truncate(10 << 20)

    def read(*_: Any, **__: Any) -> str:
        raise AssertionError("the file was read")

    monkeypatch.setattr(os, "open", read)
    check(refusal(path), path, None, None, "the file has 10485760 bytes", "at most 65536")


def test_the_largest_file_has_64_kibibytes(tmp_path: Path) -> None:
    comment = "# " + "x" * 97 + "\n"
    text = GOOD + comment * ((1 << 16) // len(comment))
    text = text[: (1 << 16) - 1] + "\n"
    assert load_rules(write(tmp_path / "mine.yaml", text)).name == "mine"
    path = write(tmp_path / "mine.yaml", text + "\n")
    check(refusal(path), path, None, None, "the file has 65537 bytes", "at most 65536")


@pytest.mark.parametrize(
    ("text", "column"),
    [
        pytest.param("[" * 16_000, 17, id="open-brackets"),
        pytest.param("[" * 32_000 + "]" * 32_000, 17, id="brackets"),
        pytest.param("{" * 16_000, 17, id="open-braces"),
        pytest.param("{a: " * 8_000, 65, id="open-mappings"),
        pytest.param("- " * 16_000, 33, id="dashes"),
        pytest.param("? " * 16_000, 33, id="question-marks"),
        pytest.param("[" * 65_500, 17, id="as-many-brackets-as-fit#-brackets"),
    ],
)
def test_deep_nesting_is_refused_where_it_is(
    text: str, column: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "mine.yaml", f"# schema: 1\n{text}")
    composed = nodes_made(monkeypatch)
    check(refusal(path), path, 2, column, "nested deeper than 16 levels", "a rule file needs five")
    assert len(composed) <= 16


def test_sixteen_levels_are_still_read(tmp_path: Path) -> None:
    # The text is refused for what it is, not for its depth.
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}why: ^{'[' * 15}{']' * 15}\n{RULES}")
    check(refusal(path), path, line, column, "why is a list, not a text", "write a word")


def test_an_unreadable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> int:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "mine.yaml", GOOD)
    monkeypatch.setattr(os, "open", read)  # chmod would stop nobody who runs the tests as root
    check(refusal(path), path, None, None, "cannot be read: Permission denied", "check the path and its permissions")


@pytest.mark.parametrize("name", ["", "nope", "nope.yaml", "QDQBERT", "qdqbert.yaml", ".", "~/nope.yaml", "a\0b"])
def test_no_such_rules(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    error = refusal(name)
    assert f"rules: '{name}' is neither a shipped rule set nor a file" in error.found
    assert re.search("shipped: .*qdqbert.*; or give the path of a YAML file", error.fix)
    assert (error.path, error.line, error.column) == (None, None, None)
    assert str(error) == printable(f"{error.found}; {error.fix}")


@pytest.mark.parametrize("name", TOO_LONG)
@pytest.mark.parametrize("type_", [str, Path])
def test_a_name_too_long_for_a_file(name: str, type_: type[str | Path]) -> None:
    error = refusal(type_(name))
    assert error.found == f"rules: '{name[:197]}...' is neither a shipped rule set nor a file"
    assert re.search("shipped: .*qdqbert.*; or give the path of a YAML file", error.fix)
    assert (error.path, error.line, error.column) == (None, None, None)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def is_file(*_: Any, **__: Any) -> bool:
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "mine.yaml", GOOD)
    monkeypatch.setattr(Path, "is_file", is_file)  # chmod would stop nobody who runs the tests as root
    assert "is neither a shipped rule set nor a file" in refusal(path).found


def test_a_directory_is_no_file(tmp_path: Path) -> None:
    error = refusal(tmp_path)
    assert f"'{tmp_path}' is neither a shipped rule set nor a file" in error.found
    assert error.line is None


def test_a_broken_link_is_no_file(tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(tmp_path / "nowhere.yaml")
    assert "is neither a shipped rule set nor a file" in refusal(link).found


def test_a_circle_of_links_is_no_file(tmp_path: Path) -> None:
    one, two = tmp_path / "one.yaml", tmp_path / "two.yaml"
    one.symlink_to(two)
    two.symlink_to(one)
    assert "is neither a shipped rule set nor a file" in refusal(one).found


def test_the_error_is_the_packages_own(tmp_path: Path) -> None:
    error = refusal(write(tmp_path / "mine.yaml", "schema: [1\n"))
    assert isinstance(error, QdqSurgeryError)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        pytest.param({}, "found; fix", id="no-place"),
        pytest.param({"path": Path("a.yaml")}, "a.yaml: found; fix", id="path"),
        pytest.param({"path": "a.yaml", "line": 3}, "a.yaml:3: found; fix", id="line"),
        pytest.param({"path": "a.yaml", "line": 3, "column": 7}, "a.yaml:3:7: found; fix", id="column"),
        # A column counts from its line; a pattern that is read alone has only a column, and no place to print.
        pytest.param({"column": 7}, "found; fix", id="column-alone"),
    ],
)
def test_the_message_begins_with_the_place(keys: dict[str, Any], text: str) -> None:
    error = RuleFileError("found", "fix", **keys)
    assert str(error) == text
    assert (error.found, error.fix) == ("found", "fix")


def test_nothing_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attempts = [
        with_pattern("\"__import__('pathlib').Path('ran').touch()\""),
        with_pattern("\"linear(x, open('ran', 'w'))\""),
        with_pattern('"linear(f\'{open(\\"ran\\", 1)}\')"'),
        f"{HEAD}why: !!python/object/apply:os.system ['touch ran']\n{RULES}",
        f"{HEAD}why: !!python/object/new:subprocess.Popen [[touch, ran]]\n{RULES}",
    ]
    for index, text in enumerate(attempts):
        refusal(write(tmp_path / f"{index}.yaml", text))
    # A text stays a text, whatever it looks like.
    lines = "{{ open('ran', 'w') }} ${HOME} $(touch ran) %s"
    assert load_rules(write(tmp_path / "text.yaml", f'{HEAD}why: "{lines}"\n{RULES}')).why == lines
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        pytest.param(f"schema: ^LONG\nname: mine\n{RULES}", "x", id="schema"),
        pytest.param(f"schema: ^LONG\nname: mine\n{RULES}", "1", id="schema-digits"),
        pytest.param(f"{HEAD}extends: ^LONG\n", "x", id="extends"),
        pytest.param(f"{HEAD}rules: ^LONG\n", "x", id="list"),
        pytest.param(with_spec("^LONG"), "x", id="mapping"),
        pytest.param(with_pattern('"^LONG"'), "x", id="pattern"),
        pytest.param(with_key("optional: ^LONG"), "x", id="boolean"),
        pytest.param(with_calibrator("{name: percentile, percentile: ^LONG:1.5}"), "1", id="number"),
        pytest.param("^LONG\n", "x", id="file"),
    ],
)
def test_a_scalar_that_fills_the_file_is_not_quoted_whole(text: str, letter: str, tmp_path: Path) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", text.replace("LONG", letter * ((1 << 16) - 1000)))
    error = refusal(path)
    assert (error.path, error.line, error.column) == (path.resolve(), line, column)
    assert len(error.found) + len(error.fix) < 420


# -- a file of a stranger --------------------------------------------------------------------------------------------

SECRET = "root:x:0:0:secret:/root:/bin/sh"


@pytest.fixture(params=["fifo", "device", "directory", "link-to-a-fifo"])
def special(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "special.yaml"
    if request.param == "fifo":
        os.mkfifo(path)
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    elif request.param == "directory":
        path.mkdir()
    else:
        os.mkfifo(tmp_path / "fifo")
        path.symlink_to(tmp_path / "fifo")
    return path


def test_a_special_file_is_never_opened(special: Path, tmp_path: Path) -> None:
    # Opening a FIFO would block for ever.
    assert "is neither a shipped rule set nor a file" in refusal(special).found
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: ^{special.name}\n")
    check(refusal(path), path, line, column, "extends: 'special.yaml' is neither", "give the path")


def test_a_special_file_that_takes_the_place_of_a_rule_file_is_never_opened(
    special: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "is_file", lambda _: True)
    error = refusal(special)
    assert re.search(r"^cannot be read: it is a (FIFO|device|directory), no regular file$", error.found)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "secret", "secret.txt", "../secret.json", "secret.yaml/", "secret.YAML"]
)
def test_extends_names_only_rule_files(name: str, tmp_path: Path) -> None:
    for file in ("secret", "secret.txt", "secret.YAML"):
        write(tmp_path / file, SECRET)
    path, line, column = write_marked(tmp_path / "mine.yaml", f"{HEAD}extends: ^{name}\n")
    check(refusal(path), path, line, column, "^extends: '.*' is neither a shipped rule set nor a file$", ".yaml file$")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(SECRET, id="a-word"),
        pytest.param(f"{SECRET}\n{SECRET}\n", id="lines"),
        pytest.param(f"[{SECRET}]", id="list"),
        pytest.param("secret: 1\n", id="key"),
        pytest.param("a: !secret b\n", id="tag"),
        pytest.param("a: !secret!x b\n", id="tag-handle"),
        pytest.param("a: *secret\n", id="alias"),
        pytest.param("%secret 1\n--- a\n", id="directive"),
        pytest.param('a: "\\secret"\n', id="escape"),
        pytest.param("- secret: 1\n  - secret\n", id="indentation"),
        pytest.param("secret: 1\nsecret: 2\n", id="twice"),
        pytest.param("secret: {a: @b}\n", id="at-sign"),
    ],
)
def test_nothing_is_quoted_from_what_is_no_rule_file(text: str, tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", text)
    path = write(tmp_path / "mine.yaml", f"{HEAD}extends: base.yaml\n")
    error = refusal(path)
    assert error.path == base.resolve()
    assert "secret" not in str(error).replace(str(tmp_path), "")


@pytest.mark.parametrize(
    ("letter", "code"),
    [
        (r"\0", "0000"),
        (r"\x1b", "001B"),
        (r"\x7f", "007F"),
        (r"\x85", "0085"),
        (r"\u200b", "200B"),
        (r"\u202e", "202E"),
        (r"\u2028", "2028"),
        (r"\ufeff", "FEFF"),
        (r"\n", "000A"),
    ],
)
@pytest.mark.parametrize(
    ("text", "what"),
    [
        pytest.param(f'schema: 1\nname: ^"aXb"\n{RULES}', "name", id="name"),
        pytest.param(f'{HEAD}extends: ^"aXb"\n', "extends", id="extends"),
        pytest.param(f'{HEAD}specs: {{^"aXb": default}}\n{RULES}', "a key", id="spec"),
        pytest.param(GOOD.replace("first", '^"aXb"'), "name", id="rule"),
        pytest.param(GOOD.replace("it pays", '^"aXb"'), "why", id="why"),
        pytest.param(with_quantize('{x: ^"aXb"}'), "quantize.x", id="place"),
        pytest.param(with_exclude('{why: w, sites: [a, ^"aXb"]}'), "sites", id="glob"),
        pytest.param(with_exclude('{^"aXb": w, sites: a}'), "a key", id="key"),
        pytest.param(with_key('expect: {model_types: {^"aXb": 1}}'), "a key", id="model-type"),
    ],
)
def test_hidden_characters_are_refused_where_they_stand(
    text: str, what: str, letter: str, code: str, tmp_path: Path
) -> None:
    path, line, column = write_marked(tmp_path / "mine.yaml", text.replace("X", letter))
    if (what, letter) == ("why", r"\n"):
        assert load_rules(path).rules[0].why == "a\nb"  # a reason may take several lines
        return
    error = refusal(path)
    check(error, path, line, column, rf"^{what} has the hidden character U\+{code}$", "remove it")
    assert str(error).isprintable()


@pytest.mark.parametrize("name", ["a\x1b[2J.yaml", "a\nb.yaml", "a\u202eb.yaml"])
def test_names_of_files_are_printed_so_that_they_show(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / name, GOOD)
    assert load_rules(path).rules[0].source == f"{printable(name)}:4"
    write(path, GOOD.replace("x: default", "x: nope"))
    error = refusal(path)
    assert error.line == 4
    assert str(error).isprintable()


# -- what reading costs ----------------------------------------------------------------------------------------------


def test_a_file_is_read_once_and_each_value_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for rules in (16, 32, 64, 128):
        path = write(tmp_path / f"{rules}.yaml", f"{HEAD}rules:\n" + "".join(map(RULE.format, range(rules))))
        with monkeypatch.context() as patch:
            made = nodes_made(patch)
            assert len(load_rules(path).rules) == rules
        counts.append(len(made))
    # Twice the rules are twice the nodes, whatever the rest has.
    first, *steps = [after - before for before, after in pairwise(counts)]
    assert steps == [2 * first, 4 * first]


RULE = '  - {{name: rule{0}, why: w, match: {{pattern: "linear(x, w)"}}, quantize: {{x: {{as: x{0}_quantizer}}}}}}\n'


@pytest.mark.parametrize(
    ("text", "found"),
    [
        pytest.param(
            f"{HEAD}rules:\n" + "".join(map(RULE.format, range(129))), "^rules has 129 entries$", id="129-rules"
        ),
        pytest.param(f"{HEAD}rules:\n" + "".join(map(RULE.format, range(400))), "too many values$", id="400-rules"),
        pytest.param(
            with_exclude("{why: w, rules: [" + "first, " * 1025 + "]}"), "more than 1024 entries$", id="1025-globs"
        ),
        pytest.param(
            f"{GOOD}exclude:\n" + "  - {why: w, rules: [first]}\n" * 260,
            "^exclude has 260 entries$",
            id="260-entries",
        ),
        pytest.param(
            with_exclude("{why: w, rules: [" + "first, " * 6000 + "]}"), "more than 1024 entries$", id="6000-globs"
        ),
        pytest.param(
            f"{HEAD}specs: {{{', '.join(f's{index}: default' for index in range(1025))}}}\n{RULES}",
            "^specs has 1025 keys$",
            id="1025-specs",
        ),
    ],
)
def test_what_a_rule_file_has_too_much_of_is_refused(text: str, found: str, tmp_path: Path) -> None:
    path = write(tmp_path / "mine.yaml", text)
    error = refusal(path)
    assert re.search(found, error.found)
    assert error.line is not None


def test_a_chain_of_files_has_one_limit(tmp_path: Path) -> None:
    # Four files of 64 KiB are as much as may be read; the fifth is refused before it is opened.
    comment = "#" * ((1 << 16) - 200) + "\n"
    for index in range(1, 6):
        write(tmp_path / f"{index}.yaml", f"{comment}{HEAD}extends: {index + 1}.yaml\n")
    path = write(tmp_path / "5.yaml", f"{'#' * ((1 << 16) - 200)}\n{GOOD}")
    check(refusal(tmp_path / "1.yaml"), path, None, None, "one too many, with", "at most 262144 bytes")
    assert load_rules(tmp_path / "2.yaml").name == "mine"


def test_a_chain_of_files_has_one_limit_of_values(tmp_path: Path) -> None:
    globs = ", ".join(["first"] * 1000)
    write(tmp_path / "1.yaml", with_exclude(f"{{why: w, rules: [{globs}]}}"))
    for index in range(2, 7):
        write(
            tmp_path / f"{index}.yaml",
            f"{HEAD}extends: {index - 1}.yaml\nexclude:\n  - {{why: w, rules: [{globs}]}}\n",
        )
    assert len(load_rules(tmp_path / "2.yaml").exclude) == 2
    error = refusal(tmp_path / "6.yaml")
    assert "too many values" in error.found
    assert error.path == (tmp_path / "4.yaml").resolve()
