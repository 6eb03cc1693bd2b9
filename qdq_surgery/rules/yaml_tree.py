"""The text of a rule file as a tree of YAML nodes, read once, with its line and column in every error.

A rule file is data: tags, anchors and aliases are refused where they stand, before anything is made of them, and so is
whatever is nested too deep or has too much in it. A scalar is what it looks like (``no`` is not silently ``False``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml

from qdq_surgery.errors import RuleFileError
from qdq_surgery.rules.limits import MAX_LIST
from qdq_surgery.safety.untrusted import read_regular_file

__all__ = ["MAX_BYTES", "TAG", "Budget", "compose", "cut", "kind_of", "read_text"]

#: What a rule file may have.
MAX_BYTES = 1 << 16
_MAX_DEPTH = 16

TAG = "tag:yaml.org,2002:"

_SCHEMA_KEY = re.compile(r"""(^|[{,])[ \t]*["']?schema["']?[ \t]*:""", re.MULTILINE)


@dataclass
class Budget:
    """What may still be read, of a file and all that it extends.

    Attributes:
        bytes: Of the files.
        values: Scalars, lists and mappings in them; the recipe has some 250.
    """

    bytes: int = 4 * MAX_BYTES
    values: int = 3000

    def spend_bytes(self, size: int, path: Path) -> None:
        """Take the size of the file ``path``, in bytes, from what is left.

        Raises:
            RuleFileError: It is more than is left.
        """
        if size > self.bytes:
            fix = f"a rule file has with those at most {4 * MAX_BYTES} bytes"
            raise RuleFileError("the file is one too many, with the files that extend it", fix, path=path)
        self.bytes -= size


def read_text(path: Path, budget: Budget) -> str:
    """The text of a file.

    Raises:
        RuleFileError: It is no regular file, too large, unreadable or not UTF-8.
    """
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise RuleFileError(f"the file has {size} bytes", f"a rule file has at most {MAX_BYTES}", path=path)
        budget.spend_bytes(size, path)
        # Line ends as Python's texts have them.
        return read_regular_file(path, size).decode().replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise RuleFileError(f"not UTF-8 at byte {error.start}", "save the file as UTF-8", path=path) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RuleFileError(f"cannot be read: {reason}", "check the path and its permissions", path=path) from None


def compose(path: Path, text: str, budget: Budget) -> yaml.MappingNode:
    """The mapping at the top of the file at ``path``.

    Raises:
        RuleFileError: The text is no YAML, has no mapping at the top, or holds what no rule file may.
    """
    # What is no rule file may be anybody's secret: nothing of it is quoted.
    named = _SCHEMA_KEY.search(text) is not None

    def refuse(found: str, fix: str, mark: Any) -> NoReturn:
        raise RuleFileError(
            found, fix, path=path, line=mark.line + 1 if mark else None, column=mark.column + 1 if mark else None
        ) from None

    try:
        root = _Loader(text, budget, named).get_single_node()
    except _NotAllowedError as error:
        refuse(error.found, error.fix, error.mark)
    except yaml.MarkedYAMLError as error:
        if "another document" in (error.problem or ""):
            refuse("found a second document", "a rule file is one document: remove '---'", error.problem_mark)
        found = f"not YAML: {error.problem}" if named else "not YAML, and no rule file"
        refuse(found, "check the indentation and the brackets", error.problem_mark)
    except yaml.reader.ReaderError as error:
        refuse(f"not YAML: {error.reason}", "remove the character", None)
    except (ValueError, OverflowError) as error:
        refuse(f"not YAML: {cut(str(error))}", "remove the escape or the directive", None)
    if root is None:
        refuse("the file is empty", "write at least schema, name and rules", None)
    if not isinstance(root, yaml.MappingNode):
        found = f"found {kind_of(root) if named else 'no mapping'} at the top"
        refuse(found, "write keys: schema, name, why, specs, rules", root.start_mark)
    if not named and not any(key.value == "schema" for key, _ in root.value):
        refuse("the key 'schema' is missing", "write schema: 1 if this is a rule file", root.start_mark)
    return root


def kind_of(node: yaml.Node) -> str:
    """What ``node`` is, in words."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"'{cut(node.value)}' ({node.tag.removeprefix(TAG)})"


def cut(text: str, length: int = 60) -> str:
    """The beginning of ``text``."""
    return text if len(text) <= length else text[: length - 3] + "..."


class _NotAllowedError(Exception):
    """What a rule file may not hold, at its ``mark``."""

    def __init__(self, found: str, fix: str, mark: Any) -> None:
        super().__init__(found)
        self.found, self.fix, self.mark = found, fix, mark


class _Loader(yaml.SafeLoader):
    """PyYAML's, which looks at each event before it makes a node of it.

    It is the one written in Python, whose marks and messages are the same wherever this is installed.
    """

    def __init__(self, text: str, budget: Budget, named: bool) -> None:
        super().__init__(text)
        self._budget, self._named, self._depth = budget, named, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise _NotAllowedError("found an anchor or alias", "write the value out", event.start_mark)
        tag = getattr(event, "tag", None)
        if tag is not None:
            found = f"found the YAML tag '{cut(tag)}'" if self._named else "found a YAML tag"
            raise _NotAllowedError(found, "rule files are plain data: remove the tag", event.start_mark)
        if self._budget.values == 0:
            found = "the file has, with those that it extends or that extend it, too many values"
            raise _NotAllowedError(
                found, f"write at most {Budget().values} words, lists and mappings", event.start_mark
            )
        if isinstance(index, int) and index == MAX_LIST:
            found = f"a list has more than {MAX_LIST} entries"
            raise _NotAllowedError(found, "write fewer, or globs for many", event.start_mark)
        if self._depth == _MAX_DEPTH and isinstance(event, yaml.CollectionStartEvent):
            found = f"nested deeper than {_MAX_DEPTH} levels"
            raise _NotAllowedError(found, "a rule file needs five", event.start_mark)
        self._budget.values -= 1
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node
