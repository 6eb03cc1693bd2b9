"""A graph must do on its example what the forward did: what was not seen shows before a model is touched."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.replay import check_replay
from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.trace.recorder import record


class Plain(nn.Module):
    """All of it is seen."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class HiddenOutput(nn.Module):
    """Something is added where no mode looks."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        with torch._C.DisableTorchFunction():
            y.add_(1)
        return y


class HiddenArgument(nn.Module):
    """The argument is changed there."""

    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        with torch._C.DisableTorchFunction():
            x.add_(1)
        return y


def test_what_was_seen_is_repeated() -> None:
    block = shadow(Plain())
    check_replay(record(block, Plain.forward, (torch.ones(2, 3),), {})[0])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (HiddenOutput, "gives another output than the forward on the example it was recorded on"),
        (HiddenArgument, "leaves its arguments otherwise than the forward does"),
    ],
)
def test_what_was_not_seen_is_refused(kind: type[nn.Module], message: str) -> None:
    block = shadow(kind())
    graph, _ = record(block, kind.forward, (torch.ones(2, 3),), {})
    with pytest.raises(TraceError, match=f"{kind.__name__}.forward: its recorded graph {message}"):
        check_replay(graph)
