"""How large a model is in float and with its weights as integers, and how long its steps took."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import nn

from qdq_surgery.calibration.collect import weight_quantizers
from qdq_surgery.onnx_export import Export
from qdq_surgery.onnx_file.writer import data_beside
from qdq_surgery.text.view import Column, Table, number

__all__ = ["sizes", "times_table"]


def sizes(model: nn.Module, export: Export | None) -> Table:
    """Parameters as they are, the quantized weights as integers, and the exported file if it is still there."""
    rows = tuple((what, f"{size / 1e6:,.2f} MB") for what, size in _sizes(model, export))
    return Table((Column("what"), number("size")), rows)


def _sizes(model: nn.Module, export: Export | None) -> Iterator[tuple[str, float]]:
    every = sum(each.numel() * each.element_size() for each in model.parameters())
    weights = weight_quantizers(model)
    kept = {id(linear.weight): (linear.weight, quantizer) for quantizer, linear in weights.values()}
    before = sum(weight.numel() * weight.element_size() for weight, _ in kept.values())
    after = sum(weight.numel() * quantizer.grid.bits / 8 for weight, quantizer in kept.values())
    yield "all parameters, as they are in memory", every
    yield f"of these, the weights of {len(weights)} quantized linears and tables", before
    yield "these weights as integers", after
    yield "all parameters, with these weights as integers", every - before + after
    if export is not None and export.path.exists():
        files = [export.path, *data_beside(export.path)]
        yield f"the file {export.path.name}, with its weights", sum(file.stat().st_size for file in files)


def times_table(times: Mapping[str, float]) -> Table:
    """Seconds of each step."""
    return Table((Column("step"), number("seconds")), tuple((name, f"{each:.2f}") for name, each in times.items()))
