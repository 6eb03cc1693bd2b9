"""What a run needs to know of a task: how its files, features and metrics are made."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor

from tasks.features import Feature
from tasks.options import Options

__all__ = ["Task"]

Example = TypeVar("Example")


class Task(ABC, Generic[Example]):
    """One kind of task over examples of one kind.

    Attributes:
        name: For messages.
        head: Ending of the model classes, such as ``ForQuestionAnswering``.
        outputs: Names of what the model gives, in its order.
        words: Whether the tokenizer gets lists of words.
    """

    name: ClassVar[str]
    head: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]] = ("logits",)
    words: ClassVar[bool] = False

    @abstractmethod
    def read(self, path: Path) -> list[Example]:
        """The examples of a file."""

    @abstractmethod
    def labels(self, examples: Sequence[Example]) -> set[str]:
        """Names of the classes that occur; empty if the task has none."""

    @abstractmethod
    def features(
        self, examples: Sequence[Example], tokenizer: Any, options: Options, labels: Mapping[str, int]
    ) -> list[Feature]:
        """The examples for the model, with targets."""

    @abstractmethod
    def score(
        self,
        examples: Sequence[Example],
        features: Sequence[Feature],
        logits: Sequence[Sequence[Tensor]],
        options: Options,
        labels: Sequence[str],
    ) -> tuple[dict[str, float], dict[str, str]]:
        """The metrics, in percent, and files to write beside them: names and texts.

        Args:
            logits: For each feature the model's outputs.
            labels: Names of the classes by number.
        """
