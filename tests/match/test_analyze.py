"""What a model was looked at with is gone when the look is over: at once, not when Python next collects its garbage.

And how the graphs of two looks are compared.
"""

from __future__ import annotations

import gc
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for, build
from torch.fx import Graph

import qdq_surgery as qs
from qdq_surgery.match.analyze import _alike, _difference


@contextmanager
def no_collection() -> Iterator[None]:
    """What lives in here only because it stands in a circle stays."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def activations() -> dict[int, torch.Size]:
    """All float tensors that live, parameters left out. (Buffers of BERT are integers.)"""
    found = [each for each in gc.get_objects() if type(each) is torch.Tensor]
    return {id(tensor): tensor.shape for tensor in found if tensor.is_floating_point()}


def left_by(action: Callable[[], Any]) -> list[torch.Size]:
    """Shapes of the tensors that live after ``action`` and did not before, what it returned dropped."""
    with no_collection():
        before = activations()
        action()
        return [shape for key, shape in activations().items() if key not in before]


@pytest.mark.parametrize("rules", ["qdqbert", "linear-only"])
@pytest.mark.parametrize("call", [qs.convert, qs.plan])
def test_no_example_outlives_a_conversion(call: Callable[..., Any], rules: str) -> None:
    model = build("bert", "BertModel")
    assert left_by(lambda: call(model, rules)) == []


def test_no_example_outlives_a_comparison() -> None:
    before = build("bert", "BertModel")
    after = qs.convert(before)
    assert left_by(lambda: qs.diff(before, after)) == []


def test_no_activation_outlives_a_call() -> None:
    model = qs.convert(build("bert", "BertModel"))
    batch = batch_for(model, (2, 7))
    with torch.no_grad():
        assert left_by(lambda: model(**batch)) == []
        batch.pop("attention_mask", None)
        assert left_by(lambda: model(**batch, output_attentions=True)) == []  # a graph of its own, recorded now


def sliced(make: Callable[[Any], slice]) -> Graph:
    """``x[...]``, by a slice that is made from the size of x."""
    graph = Graph()
    x = graph.placeholder("x")
    size = graph.call_function(operator.getitem, (graph.call_method("size", (x,)), 1))
    graph.output(graph.call_function(operator.getitem, (x, make(size))))
    return graph


def test_graphs_are_compared_to_the_ends_of_their_slices() -> None:
    assert _difference(sliced(lambda size: slice(0, size)), sliced(lambda size: slice(0, size))) is None
    assert _alike(sliced(lambda size: slice(0, size)), sliced(lambda size: slice(0, size)))
    for other in (lambda size: slice(size, 0), lambda size: slice(0, size, 2), lambda _: slice(0, 7)):
        assert _difference(sliced(lambda size: slice(0, size)), sliced(other)) is not None
    difference = _difference(sliced(lambda _: slice(0, 7)), sliced(lambda _: slice(0, 9)))
    assert difference is not None
    assert "slice(0, 7" in difference


MASKED = """
schema: 1
name: masked
why: a test
rules:
  - {name: every-add, why: a test, match: {layers: all, pattern: "add(a, _)"}, quantize: {a: {as: sum_quantizer}}}
"""


def test_what_only_some_calls_compute_gets_no_quantizer(tmp_path: Path) -> None:
    """The mask is added where there is one."""
    (tmp_path / "masked.yaml").write_text(MASKED)
    model = build("bert", "BertModel")
    words = (
        r"rule 'every-add' puts encoder\.layer\.0\.attention\.self\.sum_quantizer at add .*, which some calls do not"
    )
    for use in (qs.convert, qs.plan):
        with pytest.raises(qs.MatchError, match=words):
            use(model, tmp_path / "masked.yaml")
    assert not qs.quantizers(model)
