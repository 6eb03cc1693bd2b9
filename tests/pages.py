"""The pages for people: their code, in order, run as a reader would run it, in a folder with a tiny model and texts."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from architectures import build
from repository import ROOT
from tiny_checkpoint import tiny_tokenizer
from transformers import AutoModelForSequenceClassification, BertConfig, BertModel

import qdq_surgery as qs
from qdq_surgery.cli.commands import main

__all__ = ["PAGES", "SENTENCES", "Block", "Reader", "anchors", "blocks", "commands", "furnish", "prose"]

PAGES = [
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    *sorted(f"docs/{each.name}" for each in ROOT.glob("docs/*.md")),
]

#: Where the README's model lies on the Hub, and here a tiny one.
SENTENCES = "sentence-transformers/all-MiniLM-L6-v2"

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_NOUNS = "parcel letter train garden window river teacher engine market doctor".split()


@dataclass(frozen=True)
class Block:
    """One block between fences: its language, its text and the line of the page on which the text begins."""

    language: str
    text: str
    line: int

    @property
    def elsewhere(self) -> str | None:
        """Which environment of scripts/other_tools.sh it needs, by its first line."""
        found = re.match(r"# In an environment with ([\w-]+):\n", self.text)
        return "transformers-js" if self.language == "js" else found and found[1]


def blocks(page: str) -> list[Block]:
    """The blocks of a page, by the page's name."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(each[1], each[2], text.count("\n", 0, each.start()) + 2) for each in _FENCE.finditer(text)]


def commands(block: Block) -> list[str]:
    """The command lines of a block of bash, each whole."""
    return [line for line in block.text.replace("\\\n", " ").splitlines() if shlex.split(line, comments=True)]


def prose(page: str) -> str:
    """A page without its blocks."""
    return _FENCE.sub("", (ROOT / page).read_text(encoding="utf-8"))


def anchors(page: str) -> list[str]:
    """What links to the headings of a page end in, as GitHub makes them."""
    found: list[str] = []
    for heading in re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        slug = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        again = sum(re.fullmatch(rf"{re.escape(slug)}(-\d+)?", each) is not None for each in found)
        found.append(f"{slug}-{again}" if again else slug)
    return found


def furnish(folder: Path, layers: int = 1) -> None:
    """What the pages say that a reader has: models in folders, their tokenizer, texts."""
    texts = [f"the {noun} of the {other} came late" for noun in _NOUNS for other in _NOUNS[:3] if noun != other]
    (folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    (folder / "other-texts.txt").write_text("\n".join(reversed(texts[:8])) + "\n", encoding="utf-8")
    tokenizer = tiny_tokenizer(texts)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "num_hidden_layers": layers}
    build("bert", "BertForSequenceClassification", num_labels=2, **sizes).save_pretrained(folder / "my-bert")
    tokenizer.save_pretrained(folder / "my-bert")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(**sizes, **small)).save_pretrained(folder / SENTENCES)
    tokenizer.save_pretrained(folder / SENTENCES)


class Reader:
    """Somebody who runs the blocks of a page one after the other, in the folder in which they sit.

    Attributes:
        scope: The names that the page's Python has made.
        ran: What was run: the first words of commands, and the languages of the other blocks.
    """

    def __init__(self, page: str) -> None:
        self.page = page
        self.scope: dict[str, Any] = {"__name__": "page"}
        self.ran: list[str] = []
        self._said = ""

    def read(self) -> None:
        """Run the whole page. (The README begins with a picture, which test_docs.py holds against the diff.)"""
        for block in blocks(self.page)[self.page == "README.md" :]:
            try:
                getattr(self, f"_{block.language}")(block)
            except Exception as error:
                raise AssertionError(f"{self.page}:{block.line}: {type(error).__name__}: {error}") from error

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            yield
        self._said = said.getvalue()

    def _python(self, block: Block) -> None:
        code = compile("\n" * (block.line - 1) + block.text, self.page, "exec")
        if block.elsewhere is not None:  # test_other_tools.py runs it there
            self.ran.append(block.elsewhere)
            return
        with self._listening():
            exec(code, self.scope)
        self.ran.append("python")

    def _js(self, block: Block) -> None:
        """Whether it is a program, where there is node; test_other_tools.py runs it where its packages are."""
        node = shutil.which("node")
        if node is not None:
            command = [node, "--input-type=module", "--check", "-"]
            done = subprocess.run(command, input=block.text, text=True, capture_output=True, check=False)
            assert done.returncode == 0, done.stderr
        self.ran.append("js")

    def _yaml(self, block: Block) -> None:
        """A rule file, whole, whose first line is its name; the model of the pages takes it."""
        name = re.match(r"# (\S+\.yaml)\n", block.text)
        assert name is not None, "the first line of a rule file names it: # mine.yaml"
        Path(name[1]).write_text(block.text, encoding="utf-8")
        rules = qs.load_rules(name[1])
        qs.plan(AutoModelForSequenceClassification.from_pretrained("my-bert"), rules)
        self.ran.append(name[1])

    def _text(self, block: Block) -> None:
        """What the block before printed; lines of ``...`` stand for any number of lines."""
        parts = [re.escape(part.strip("\n")) for part in re.split(r"^\.\.\.\n", block.text, flags=re.MULTILINE)]
        said = "\n".join(line.rstrip() for line in self._said.splitlines())
        assert re.search(r"\n(?:.*\n)*?".join(parts), said), f"it printed:\n{said}"

    def _mermaid(self, block: Block) -> None:
        """A picture, which a test of its own draws again."""

    def _bash(self, block: Block) -> None:
        self._said = ""
        for line in commands(block):
            words = shlex.split(line, comments=True)
            self.ran.append(" ".join(words[:2]))
            self._command(words)

    def _command(self, words: list[str]) -> None:
        if words[0] == "qdq-surgery":
            said = self._said
            with self._listening():
                assert main(words[1:]) == 0
            self._said = said + self._said
        elif words[:2] == ["pip", "install"]:
            installs(words[2:])
        elif words[0] in ("bash", "python") and words[1] not in ("-c", "-m"):
            takes(words[1], words[2:])
        else:
            assert "=" in words[0] or (ROOT / words[0]).exists() or words[:2] == ["bash", "-c"], words


def installs(words: list[str]) -> None:
    """Whether pip finds that: extras that there are, packages that the scripts pin."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    pins = (ROOT / "scripts" / "constraints.txt").read_text(encoding="utf-8")
    for word in words:
        extra = re.fullmatch(r"\.(?:\[([\w,]+)\])?", word)
        if extra is not None:
            for name in filter(None, (extra[1] or "").split(",")):
                assert re.search(rf"^{name} = \[", project, re.MULTILINE), word
        elif not word.startswith("-"):
            assert re.search(rf"^{re.escape(word)}==", pins, re.MULTILINE), word


def takes(script: str, words: list[str]) -> None:
    """Whether there is such a script, and its source, or that of what it is made of, knows each option."""
    path = ROOT / script
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        source += "".join(each.read_text(encoding="utf-8") for each in ROOT.glob("scripts/tasks/*.py"))
    else:
        source += "".join((ROOT / each).read_text(encoding="utf-8") for each in re.findall(r"scripts/\w+\.py", source))
    for word in words:
        option = word.partition("=")[0]
        known = (option, option.removeprefix("--"))
        assert not option.startswith("--") or any(each in source for each in known), f"{script} {option}"
