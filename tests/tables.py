"""Rules that quantize the tables of embeddings, of tiny models, too."""

from __future__ import annotations

from pathlib import Path

from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.rules.yaml_file import load_rules

_RULES = """schema: 1
name: tables
extends: {base}
specs:
  table: {{{spec}}}
rules:
  - name: embeddings
    why: tables of this size
    match: {{pattern: "embedding(_, w)", rows: {rows}}}
    quantize: {{w: table}}
    optional: true
"""


def table_rules(folder: Path, base: str = "linear-only", rows: str = "{min: 41}", spec: str = "axis: 0") -> RuleSet:
    """The rules of ``base`` with one for tables; of the tiny models' only that of the words has more than 40 rows."""
    path = folder / "tables.yaml"
    path.write_text(_RULES.format(base=base, rows=rows, spec=spec))
    return load_rules(path)
