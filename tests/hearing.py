"""What is logged while a test runs, for the few that listen."""

from __future__ import annotations

import logging

__all__ = ["Heard"]


class Heard(logging.Handler):
    """A handler that keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def text(self) -> str:
        """The messages, a line each."""
        return "\n".join(record.getMessage() for record in self.records)
