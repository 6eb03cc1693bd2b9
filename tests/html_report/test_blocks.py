"""The diff as a tree: each block in the one that calls it, with every line of the diff and every quantizer."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from architectures import build

import qdq_surgery as qs
from qdq_surgery.html_report.blocks import Block, tree_of
from qdq_surgery.html_report.cards import cards_of
from qdq_surgery.html_report.given import Given


def walk(blocks: list[Block]) -> Iterator[Block]:
    for block in blocks:
        yield block
        yield from walk(block.inside)


@pytest.mark.parametrize(
    ("model_type", "head"),
    [
        ("bert", "BertForMaskedLM"),
        ("albert", "AlbertModel"),
        ("deberta-v2", "DebertaV2Model"),
        ("modernbert", "ModernBertModel"),
    ],
)
def test_every_line_and_every_quantizer_stands_in_it(model_type: str, head: str) -> None:
    model = build(model_type, head)
    qmodel = qs.convert(model)
    diff, cards = qs.diff(model, qmodel), cards_of(qmodel, Given())
    blocks = list(walk(tree_of(diff, cards)))
    assert sorted(block.name for block in blocks) == sorted(block.block for block in diff.blocks)
    lines = sorted("" if row.after is None else row.after.text for block in diff.blocks for row in block.rows)
    assert sorted(str(row.after) for block in blocks for row in block.rows) == lines
    named = [at for block in blocks for row in block.rows for at in row.cards]
    assert sorted(named) == list(range(len(cards)))
    for block in blocks:
        for row in block.rows:
            assert (row.mark == "+") >= bool(row.cards)
            assert len({cards[at].site for at in row.cards}) <= 1


def test_blocks_stand_in_those_that_call_them() -> None:
    model = build("bert", "BertModel")
    qmodel = qs.convert(model)
    roots = tree_of(qs.diff(model, qmodel), cards_of(qmodel, Given()))
    assert [block.name for block in roots] == ["BertEmbeddings", "BertLayer", "BertPooler"]
    layer = roots[1]
    assert [block.name for block in layer.inside] == ["BertAttention", "BertIntermediate", "BertOutput"]
    attention, output = layer.inside[0].inside
    assert (attention.name, output.name) == ("BertSelfAttention", "BertSelfOutput")
    assert [block.name for block in attention.inside] == ["BertSelfAttention: eager_attention_forward"]
    assert [block.opened for block in roots] == [False, True, False]
    assert attention.quantizers == 6
    assert layer.quantizers == 0
