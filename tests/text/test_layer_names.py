"""Names folded by their layers: what was folded comes back."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdq_surgery.text.layer_names import (
    by_layers,
    expand,
    fold,
    join_layers,
    layer_in,
    split_layers,
    star,
    star_numbers,
    unstar,
)

PROPERTY = settings(max_examples=200, database=None)

#: Numbers among the words, so that a name has the layer's number in several places, or in none.
PARTS = st.sampled_from(["encoder", "layer", "output", "0", "1", "2", "10", "dense_1"])
PATHS = st.lists(PARTS, min_size=1, max_size=6).map(".".join)
NUMBERS = st.none() | st.sampled_from([0, 1, 2, 10])


@PROPERTY
@given(name=PATHS, layer=NUMBERS)
def test_a_star_goes_back(name: str, layer: int | None) -> None:
    assert unstar(star(name, layer), layer) == name


@PROPERTY
@given(layers=st.sets(st.integers(0, 300), min_size=1))
def test_layers_go_back(layers: set[int]) -> None:
    text = join_layers(layers)
    assert split_layers(text) == sorted(layers)
    # No run is written in two pieces.
    ends = [run.partition("-") for run in text.split(", ")]
    assert all(int(after[0]) > int(run[2] or run[0]) + 1 for run, after in itertools.pairwise(ends))


@PROPERTY
@given(names=st.dictionaries(PATHS, NUMBERS, max_size=30))
def test_names_go_back(names: dict[str, int | None]) -> None:
    assert sorted(expand(fold(names))) == sorted(names)


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        ({}, {}),
        ({"pooler.q": None}, {"pooler.q": None}),
        ({f"layer.{i}.q": i for i in range(12)}, {"layer.*.q": "0-11"}),
        ({f"layer.{i}.q": i for i in (0, 1, 2, 5, 7, 8)}, {"layer.*.q": "0-2, 5, 7-8"}),
        ({"shared.q": 3}, {"shared.q": "3"}),
        ({"1.layer.1.q": 1, "1.layer.2.q": 2}, {"*.layer.1.q": "1", "1.layer.*.q": "2"}),
    ],
)
def test_what_it_looks_like(names: dict[str, int | None], folded: dict[str, str | None]) -> None:
    assert fold(names) == folded
    assert expand(folded) == list(names)


def test_things_of_several_layers_are_one() -> None:
    items = [(("q", 1), 2), (("q", 1), 0), (("q", 2), 1), (("p", 0), None), (("q", 1), 1)]
    assert by_layers(items) == {("q", 1): "0-2", ("q", 2): "1", ("p", 0): None}


@pytest.mark.parametrize(
    ("name", "layer"),
    [("encoder.layer.3.output.1", 3), ("layer.10", 10), ("dense_1.q", None), ("", None), ("a.²", None)],
)
def test_the_layer_in_a_name(name: str, layer: int | None) -> None:
    assert layer_in(name) == layer


@pytest.mark.parametrize(
    ("text", "starred"),
    [
        ("encoder.layer.0", "encoder.layer.*"),
        ("encoder.layer.0/MatMul", "encoder.layer.*/MatMul"),
        ("encoder.layer.10.output.dense._input_quantizer", "encoder.layer.*.output.dense._input_quantizer"),
        ("a.0.b, c.1.2.d and (e.3)", "a.*.b, c.*.*.d and (e.*)"),
        ("inside MatMul layers.0.attn/MatMul_2: 2 of 3", "inside MatMul layers.*.attn/MatMul_2: 2 of 3"),
        # No path, or no number in it.
        ("0.5 of 1.31.1 in dense_1", "0.5 of 1.31.1 in dense_1"),
        ("a sentence. 12 more", "a sentence. 12 more"),
        ("", ""),
    ],
)
def test_numbers_of_all_modules_in_a_text(text: str, starred: str) -> None:
    assert star_numbers(text) == starred
    assert star_numbers(starred) == starred


@pytest.mark.parametrize("text", ["", "x", "-1", "3-1", "0,1", "0-99999999999", "1e3", "0--2"])
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"invalid literal|are no layers"):
        split_layers(text)
