"""What is left out of the tests' traces changes nothing in a file; of BERT also: test_stored_traces.py."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qdq_surgery as qs

pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")

import short_traces
from exported import calibrated

# What torch says of itself while it exports.
pytestmark = [
    pytest.mark.traces,
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"),
]


@pytest.mark.slow
def test_a_short_trace_gives_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With open shapes, and angles of a float type of their own."""
    model = calibrated("modernbert", num_hidden_layers=1)
    qs.export_onnx(model, tmp_path / "whole.onnx", parity=False)
    short_traces.install(monkeypatch)
    qs.export_onnx(model, tmp_path / "short.onnx", parity=False)
    assert (tmp_path / "short.onnx").read_bytes() == (tmp_path / "whole.onnx").read_bytes()


class Mixed(nn.Module):
    """Types that torch promotes, also to a wider one and back, and operators that onnxscript rewrites."""

    def forward(self, values: Tensor) -> tuple[Tensor, ...]:
        halves = values.half()
        return (
            values + 0.5,
            values / 2 * values,
            (halves * 1.5 + values.float()).double() ** values,
            torch.nn.functional.gelu(halves).softmax(-1),
            torch.where(values > 2, values, 0.5).sum(-1) * values.sum(-1),
            values.float().clamp(min=1.5).relu().clamp(max=2.5),
            values.reshape(3, 2).reshape(-1).float()[None][None],
        )


def _file() -> bytes:
    """What it is exported to, without where its nodes were made."""
    made = torch.onnx.export(Mixed(), (torch.arange(6).reshape(2, 3),), opset_version=20, verbose=False)
    assert made is not None
    for node in made.model.graph:
        node.metadata_props.clear()
    written = io.BytesIO()
    made.save(written)
    return written.getvalue()


def test_types_are_promoted_and_graphs_rewritten(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _file()
    short_traces.install(monkeypatch)
    assert _file() == whole
