"""Runs the smoke set in an environment for each row of scripts/versions/rows.json, and prints the matrix.

bash scripts/test_versions.sh [--folder .venv-versions] [--rows 3.11-2.13.0-5.0.0 ...] [--discard] [--write-page]

One at a time. Environments that are there are used again, and results of rows that are not asked for are taken as they
are. Ends with 1 if any row fails; a row whose Python or packages cannot be had is told in a line, and is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from versions.environments import ROOT, Environments, MissingError, Row, listed_rows
from versions.table import Outcome, document, failures, printed

_SMOKE = ROOT / "scripts" / "smoke_versions.py"
_PAGE = ROOT / "docs" / "versions.md"

#: In seconds: for one row, of which the export's traces take most.
_LONGEST = 1800


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rows; 0 if none fails."""
    arguments = _parser().parse_args(argv)
    rows = listed_rows()
    asked = [row for row in rows if not arguments.rows or row.name in arguments.rows]
    matrix = _Matrix(arguments.folder.resolve(), rows[0])
    for index, row in enumerate(asked):
        matrix.run(row)
        if arguments.discard and row != rows[0]:
            matrix.environments.discard(row, [rows[0], *asked[index + 1 :]])
    outcomes = {row.name: matrix.outcome(row) for row in rows}
    print(printed(rows, outcomes))
    if arguments.write_page:
        _PAGE.write_text(document(rows, outcomes))
    ran = [row for row in rows if not isinstance(outcomes[row.name], str)]
    return 1 if failures(ran, outcomes) else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--folder", type=Path, default=ROOT / ".venv-versions", help="where environments and results are kept"
    )
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="names of rows (Python-torch-transformers); else all")
    parser.add_argument("--discard", action="store_true", help="remove each environment when its rows are done")
    parser.add_argument("--write-page", action="store_true", help="write docs/versions.md")
    return parser


@dataclass(frozen=True)
class _Matrix:
    """The folder of a run.

    Attributes:
        first: The row whose saved models all others load, and which loads theirs.
    """

    folder: Path
    first: Row

    @property
    def environments(self) -> Environments:
        return Environments(self.folder)

    def run(self, row: Row) -> None:
        """Make the environment of a row and run the steps in it; what comes of it lies in the folder."""
        print(f"{row.name}...", file=sys.stderr, flush=True)
        result = self._result(row)
        result.unlink(missing_ok=True)
        self._saved(row).mkdir(parents=True, exist_ok=True)
        try:
            self.environments.make(row)
        except MissingError as error:
            result.write_text(json.dumps(f"not run: {error}"))
            return
        self._smoke(row, result, [str(self._saved(row)), "--read", str(self._saved(self.first))])
        if row != self.first and self.environments.python(self.first).exists():
            back = self._result(row, "back")
            self._smoke(self.first, back, ["--only-read", "--read", str(self._saved(row))])
            self._add_back(result, back)

    def outcome(self, row: Row) -> Outcome:
        """What came of a row when it was last run."""
        result = self._result(row)
        found: Any = json.loads(result.read_text()) if result.exists() else "not run"
        return found if isinstance(found, (str, dict)) else "not run"

    def _smoke(self, row: Row, result: Path, options: list[str]) -> None:
        result.unlink(missing_ok=True)
        command = [str(self.environments.python(row)), str(_SMOKE), str(result), *options]
        log = result.with_suffix(".log")
        with log.open("w") as output:
            try:
                # One thread: the models are too small for more, and threads that wait cost much on a busy machine.
                alone = {**os.environ, "OMP_NUM_THREADS": "1"}
                ended = subprocess.run(command, stdout=output, stderr=output, env=alone, timeout=_LONGEST, check=False)
                done = ended.returncode
            except subprocess.TimeoutExpired:
                done = -1
        if not result.exists():
            last = "".join(log.read_text().splitlines()[-1:])
            steps = {"import": {"": f"ended with {done}: {last}"}}
            result.write_text(json.dumps({"versions": {}, "steps": steps}))

    @staticmethod
    def _add_back(result: Path, back: Path) -> None:
        """A model is right across versions if it is in both directions."""
        found, other = (json.loads(path.read_text()) for path in (result, back))
        across = found["steps"].get("across", {})
        for model, cell in other["steps"].get("across", other["steps"]["import"]).items():
            if across.get(model, "ok") == "ok" and cell != "ok":
                across[model] = f"saved here, loaded by the first row: {cell}"
        result.write_text(json.dumps(found, indent=1))

    def _result(self, row: Row, suffix: str = "") -> Path:
        return self.folder / f"result-{row.name}{'-' if suffix else ''}{suffix}.json"

    def _saved(self, row: Row) -> Path:
        return self.folder / f"saved-{row.name}"


if __name__ == "__main__":
    raise SystemExit(main())
