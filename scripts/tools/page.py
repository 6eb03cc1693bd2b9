"""The table of docs/deployment.md, between two marks."""

from __future__ import annotations

import re

__all__ = ["BEGIN", "END", "written"]

BEGIN = "<!-- written by scripts/other_tools.py -->\n\n"
END = "\n<!-- end of what is written -->"


def written(page: str, table: str) -> str:
    """The page with the table between its marks.

    Raises:
        ValueError: The page has no such marks.
    """
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    if len(re.findall(pattern, page, re.DOTALL)) != 1:
        raise ValueError(f"the page has to have {BEGIN.strip()} and {END.strip()} once each")
    return re.sub(pattern, lambda _: f"{BEGIN}{table}{END}", page, flags=re.DOTALL)
