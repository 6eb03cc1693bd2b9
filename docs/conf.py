"""How Sphinx makes a site of these pages: ``bash scripts/docs.sh``.

The pages stay plain Markdown, so that they read well where they lie. What a site needs beside it is made here: the tree
of pages from the links of the first one, and the full docstrings of the names in the tables of ``api.md``.
"""

from __future__ import annotations

import pydoc
import re
import sys
import warnings
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # pytorch-quantization's, which torch deprecates
    import qdq_surgery

project = "qdq_surgery"
release = version = qdq_surgery.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinxcontrib.mermaid"]
exclude_patterns = ["build"]
html_theme = "furo"
html_title = "qdq_surgery"
html_show_copyright = False
highlight_language = "none"

# Anchors as GitHub makes them; pictures in fences.
myst_heading_anchors = 3
myst_fence_as_directive = ["mermaid"]

# Signatures in the words of the source: the names of torch's and transformers' own modules are long.
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented_params"
autodoc_member_order = "bysource"
python_use_unqualified_type_names = True
napoleon_use_ivar = True
add_module_names = False


def _with_what_a_site_needs(_: Any, name: str, source: list[str]) -> None:
    """The page ``name`` as Sphinx is to read it."""
    if name == "index":
        pages = re.findall(r"\]\(([\w-]+)\.md\)", source[0])
        source[0] += "\n".join(["", "```{toctree}", ":hidden:", "", *dict.fromkeys(pages), "```", ""])
    if name == "api":
        source[0] = re.sub(r"(?m)(?:^\|.*\n)+", _with_docstrings, source[0])


def _with_docstrings(table: re.Match[str]) -> str:
    names = re.findall(r"(?m)^\| `([\w.]+)` \|", table[0])
    return "\n".join([table[0], "```{eval-rst}", *map(_directive, names), "```", ""])


def _directive(name: str) -> str:
    thing = pydoc.locate(f"qdq_surgery.{name}")
    if not isinstance(thing, type):
        return f".. autofunction:: qdq_surgery.{name}\n"
    own = "" if name.startswith("QDQBert") or issubclass(thing, Exception) else "   :members:\n"
    return f".. autoclass:: qdq_surgery.{name}\n{own}"


def _names_without_spaces(_: Any, __: str, ___: str, ____: Any, _____: Any, lines: list[str]) -> None:
    """``batches, rows: How much.`` is about both; with a space Sphinx takes the first for the type of the second."""
    for number, line in enumerate(lines):
        names = re.match(r" *[a-z]\w*(, [a-z]\w*)+: ", line)
        if names is not None:
            lines[number] = names[0].rstrip().replace(", ", ",") + line[names.end() - 1 :]


def setup(app: Any) -> None:
    """Sphinx calls this."""
    app.connect("autodoc-process-docstring", _names_without_spaces, priority=400)  # before napoleon's
    app.connect("source-read", _with_what_a_site_needs)
