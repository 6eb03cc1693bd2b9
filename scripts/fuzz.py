"""Inputs of strangers, by the thousand: prints the counts, and fails if one was read wrongly, slowly or not at all.

python scripts/fuzz.py rules --count 10000 --seed 0
python scripts/fuzz.py checkpoints --count 2000
python scripts/fuzz.py interruptions --count 300
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence

import torch
import transformers

from fuzzing import checkpoints, interruptions, rules


def main(argv: Sequence[str] | None = None) -> int:
    """Run one kind; 0 if all was right and cheap."""
    arguments = _parser().parse_args(argv)
    torch.set_num_threads(1)  # the models are tiny: a second thread would wait, and its waiting would count as time
    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "qdq_surgery"):  # what is passed over would be said thousands of times
        logging.getLogger(name).setLevel(logging.CRITICAL)
    outcome = arguments.run(arguments.count, arguments.seed)
    print(outcome)
    return 0 if outcome.is_right and outcome.is_cheap else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    kinds = parser.add_subparsers(title="kinds", required=True, metavar="KIND")
    for name, help_, run, count in (
        ("rules", "rule files and stored rules", rules.run, 10_000),
        ("checkpoints", "saved models", checkpoints.run, 2_000),
        ("interruptions", "exceptions at lines of what changes a model", interruptions.run, 300),
    ):
        kind = kinds.add_parser(name, help=help_)
        kind.add_argument("--count", type=int, default=count, help="cases (default: %(default)s)")
        kind.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
        kind.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
