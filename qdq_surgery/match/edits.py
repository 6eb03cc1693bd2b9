"""What a rule may do, as data: a union of edits, of which a plan is made and which the surgery applies.

Another kind of edit is one more member here, one more key of a rule in :mod:`~qdq_surgery.rules.schema`, and one
function in :mod:`~qdq_surgery.surgery.edits`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

__all__ = ["Edit", "InsertQuantizer", "Origin"]

#: Identity of an operator's call within the source.
Origin: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class InsertQuantizer:
    """A quantizer between an operand and its operator.

    Attributes:
        origin: The operator's call.
        position: Index into the node's args, or a keyword.
        quantizer: Attribute name of the quantizer on the owning block.
        operator: What the node is.
    """

    #: What several of them are called where they are counted.
    counted: ClassVar[str] = "quantizers"

    origin: Origin
    position: int | str
    quantizer: str
    operator: str

    def __str__(self) -> str:
        return self.quantizer


#: All that a rule may do.
Edit: TypeAlias = InsertQuantizer
