"""Loads deployed folders with other tools and holds their numbers against ours, on the same texts.

bash scripts/other_tools.sh [--folder .tools] [--environments fastembed ...] [--write-page]

The folders are made anew from the real all-MiniLM-L6-v2 by `qdq-surgery quantize`; the tools run in environments of
their own, which are made where they are not there. Ends with 1 if a tool gives other numbers, or none.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from tools.compared import Comparison, compared, page_table, printed
from tools.deployed import deploy, given_batches, ours
from tools.environments import make, rows_in
from tools.page import written
from tools.tools import TOOLS, Tool
from versions.environments import ROOT, MissingError

_PAGE = ROOT / "docs" / "deployment.md"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tools; 0 if all give our numbers."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.write_page and arguments.environments:
        parser.error("--write-page writes the rows of all tools; leave out --environments")
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    asked = [tool for tool in TOOLS if not arguments.environments or tool.environment in arguments.environments]
    page = _PAGE.read_text(encoding="utf-8")
    if arguments.write_page:
        written(page, "")  # whether it can be, before minutes of work
    made = _compare(asked, folder)
    print(printed(made))
    if arguments.write_page:
        _PAGE.write_text(written(page, page_table(made)), encoding="utf-8")
    return 0 if all(each.right for each in made) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=ROOT / ".tools", help="where environments and results are kept")
    names = sorted({tool.environment for tool in TOOLS})
    parser.add_argument("--environments", nargs="+", choices=names, help="run what is in these alone")
    parser.add_argument("--write-page", action="store_true", help="write the table of docs/deployment.md")
    return parser


def _compare(tools: Sequence[Tool], folder: Path) -> list[Comparison]:
    batches_file = folder / "batches.json"
    batches = given_batches(batches_file)
    made = []
    for target, wanted in dict.fromkeys((tool.target, wanted) for tool in tools for wanted in tool.wanted):
        deployed = deploy(folder / f"deployed-{target}-{wanted}", target, wanted)
        own = ours(deployed, target, batches, wanted)
        for tool in tools:
            if tool.target == target and wanted in tool.wanted:
                print(f"{tool.name}, {wanted}...", file=sys.stderr, flush=True)
                try:
                    make(tool, folder)
                    made.append(compared(tool.name, wanted, own, rows_in(tool, folder, deployed, batches_file, wanted)))
                except MissingError as error:
                    made.append(compared(tool.name, wanted, own, str(error)))
    return made


if __name__ == "__main__":
    raise SystemExit(main())
