"""SQuAD v1.1 files: every question has an answer, which is a span of its context."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tasks.errors import TaskFileError
from tasks.text_file import read_text

__all__ = ["Answer", "Question", "read_squad"]


@dataclass(frozen=True)
class Answer:
    """A span of a context; ``start`` counts characters."""

    text: str
    start: int


@dataclass(frozen=True)
class Question:
    """A question, the text to find the answer in, and every answer that counts as right."""

    id: str
    question: str
    context: str
    answers: tuple[Answer, ...]


def read_squad(path: Path) -> list[Question]:
    """All questions of a SQuAD v1.1 file.

    Raises:
        TaskFileError: The file is no such JSON, an answer is not at its offset, or an id comes twice. Says where.
    """
    text = read_text(path)
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskFileError(path, error.lineno, f"no JSON: {error.msg}", "give a SQuAD v1.1 file") from error
    questions = list(_Reader(path, text).questions(document))
    if not questions:
        raise TaskFileError(path, 1, "no question in it", "give a SQuAD v1.1 file with questions")
    return questions


class _Reader:
    """Walks the document and knows at each step how that place is called."""

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text = path, text
        self._ids: dict[str, str] = {}
        self._line = 1

    def questions(self, document: object) -> Iterator[Question]:
        for article, at in self._each(document, "", "data"):
            for paragraph, inner in self._each(article, at, "paragraphs"):
                context = self._field(paragraph, inner, "context", str)
                for question, place in self._each(paragraph, inner, "qas"):
                    yield self._question(question, place, context)

    def _question(self, entry: object, at: str, context: str) -> Question:
        name = self._field(entry, at, "id", str)
        self._line = self._line_of(name)
        if name in self._ids:
            self._fail(at, f"id '{name}' is also that of {self._ids[name]}", "give every question an id of its own")
        self._ids[name] = at
        answers = tuple(self._answer(answer, place, context) for answer, place in self._each(entry, at, "answers"))
        if not answers:
            self._fail(
                at,
                f"question '{name}' has no answer",
                "leave unanswerable questions (SQuAD v2) out: only v1.1 is supported",
            )
        return Question(name, self._field(entry, at, "question", str), context, answers)

    def _answer(self, entry: object, at: str, context: str) -> Answer:
        text, start = self._field(entry, at, "text", str), self._field(entry, at, "answer_start", int)
        if not text:
            self._fail(at, "the answer is empty", "give a span of the context")
        if start < 0 or context[start : start + len(text)] != text:
            there = context[max(start, 0) : max(start, 0) + len(text)]
            found = context.find(text)
            fix = "give a span of the context" if found < 0 else f"it is at {found}"
            self._fail(at, f"the answer '{text[:60]}' is not at character {start}, where '{there[:60]}' is", fix)
        return Answer(text, start)

    def _each(self, entry: object, at: str, key: str) -> Iterator[tuple[object, str]]:
        inner = f"{at}.{key}" if at else key
        for index, item in enumerate(self._field(entry, at, key, list)):
            yield item, f"{inner}[{index}]"

    def _field(self, entry: object, at: str, key: str, kind: type[Any]) -> Any:
        value = entry.get(key) if isinstance(entry, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            what = {str: "text", int: "whole number", list: "list"}[kind]
            self._fail(at or "the document", f"no {what} named '{key}'", "give a SQuAD v1.1 file")
        return value

    def _line_of(self, name: str) -> int:
        """Line of a question's id; JSON keeps no lines, so it is looked for in the text."""
        for quoted in (json.dumps(name), json.dumps(name, ensure_ascii=False)):
            found = self._text.find(quoted)
            if found >= 0:
                return self._text.count("\n", 0, found) + 1
        return self._line

    def _fail(self, at: str, found: str, fix: str) -> NoReturn:
        raise TaskFileError(self._path, self._line, f"{at}: {found}", fix)
