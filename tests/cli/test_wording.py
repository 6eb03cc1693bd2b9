"""Advice in the words of the command line: every sentence that is replaced is one that the package says."""

from __future__ import annotations

import re

import pytest
from repository import PACKAGE

from qdq_surgery.cli.wording import ADVICE, in_words_of_the_command


@pytest.mark.parametrize("python", ADVICE)
def test_it_is_said_somewhere(python: str) -> None:
    sources = [path.read_text() for path in PACKAGE.rglob("*.py") if path.name != "wording.py"]
    joined = [re.sub(r'"\s*\n\s*f?"', "", source).replace("{{", "{").replace("}}", "}") for source in sources]
    assert any(python in source for source in joined)


def test_python_becomes_what_is_typed() -> None:
    message = in_words_of_the_command("it has 2 rows; give more, or dynamic=False")
    assert message == "it has 2 rows; give more, or --static"
    assert in_words_of_the_command("max_loss=2 is none, and a_max_loss=2", ["--max-loss"]) == (
        "--max-loss 2 is none, and a_max_loss=2"
    )
    assert in_words_of_the_command("/data/max_loss=2/a is missing", ["--max-loss"]) == "/data/max_loss=2/a is missing"
    taken = "x.onnx exists; pass overwrite=True (--overwrite on the command line), or give another path"
    assert in_words_of_the_command(taken, ["--overwrite"]) == "x.onnx exists; add --overwrite, or give another path"
    assert in_words_of_the_command(taken, ["--json"]) == "x.onnx exists; give another path"
    assert in_words_of_the_command("nothing to replace") == "nothing to replace"
    assert not [words for words in ADVICE.values() if re.search(r"\w=", words)]
