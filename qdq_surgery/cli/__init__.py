"""The command line: ``qdq-surgery`` and ``python -m qdq_surgery``."""

from qdq_surgery.cli.commands import main

__all__ = ["main"]
