"""The before/after diff: a golden text, its data, narrow terminals, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import re
from pathlib import Path

import pytest
import torch
from architectures import build
from repository import TESTS
from rich.console import Console

import qdq_surgery as qs

GOLDEN = TESTS / "golden"


def without_lines(text: str) -> str:
    """Line numbers of transformers' files move with its releases; they are not part of the golden text."""
    return re.sub(r"(modeling_\w+\.py):\d+", r"\1", text)


@pytest.mark.parametrize(("name", "width"), [("wide", 140), ("narrow", 72)])
@pytest.mark.parametrize(
    "model_type_head", [("bert", "BertForSequenceClassification"), ("distilbert", "DistilBertModel")]
)
def test_golden_text(name: str, width: int, model_type_head: tuple[str, str]) -> None:
    model = build(*model_type_head)
    text = without_lines(qs.diff(model, qs.convert(model)).to_text(width)) + "\n"
    path = GOLDEN / f"diff-{model_type_head[0]}-{name}.txt"
    if os.environ.get("REWRITE_GOLDEN"):
        path.write_text(text)
    assert text == path.read_text()


@pytest.mark.parametrize("width", [140, 100, 72, 40])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    model = build("modernbert", "ModernBertModel")
    lines = qs.diff(model, qs.convert(model)).to_text(width).splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.startswith("+ Wqkv.input_q") or " + Wqkv.input_q" in line for line in lines)


def test_each_block_type_is_shown_once() -> None:
    model = build("bert", "BertModel", num_hidden_layers=4)
    made = qs.diff(model, qs.convert(model))
    shown = [block for block in made.blocks if block.changed]
    assert [block.block for block in shown] == [
        "BertSelfAttention",
        "BertSelfAttention: eager_attention_forward",
        "BertSelfOutput",
        "BertIntermediate",
        "BertOutput",
    ]
    assert all(block.layers == (0, 1, 2, 3) for block in shown)
    assert "encoder.layer.0.output, in 4 layers" in made.to_text()
    assert "unchanged: BertEmbeddings, BertLayer, BertAttention, BertPooler" in made.to_text()


def test_a_layer_that_is_left_out_is_shown_apart(tmp_path: Path) -> None:
    rules = tmp_path / "rules.yaml"
    rules.write_text("schema: 1\nname: r\nextends: qdqbert\nexclude:\n  - {layers: 1, sites: 'add_*', why: accuracy}\n")
    model = build("bert", "BertModel", num_hidden_layers=3)
    made = qs.diff(model, qs.convert(model, rules))
    layers = {(block.block, block.layers) for block in made.blocks if block.block == "BertOutput"}
    assert layers == {("BertOutput", (0, 2)), ("BertOutput", (1,))}
    assert "left in float by rules.yaml:5" in made.to_text()


def test_as_data() -> None:
    model = build("bert", "BertModel")
    qmodel = qs.convert(model)
    data = json.loads(json.dumps(qs.diff(model, qmodel).to_json()))
    assert data["schema"] == 1
    inserted = {
        (block["paths"][0], row["quantizer"])
        for block in data["blocks"]
        for row in block["rows"]
        if "quantizer" in row and row["mark"] == "+"
    }
    layer = {f"{path}.{name}" for path, name in inserted}
    assert layer == {name for name in qs.quantizers(qmodel) if name.startswith("encoder.layer.0.")}
    [row] = [
        row
        for block in data["blocks"]
        for row in block["rows"]
        if row.get("quantizer") == "add_local_input_quantizer" and block["block"] == "BertOutput"
    ]
    assert row["before"] is None
    assert row["after"] == "add_local_input_quantizer = quantize(dropout)"
    assert row["provenance"]["rule"] == "residual-add"
    assert row["provenance"]["declared"].startswith("qdqbert.yaml:")
    assert data["plan"]["quantizers"]["residual-add"] == 8


def test_colour_only_where_the_terminal_has_it() -> None:
    model = build("bert", "BertModel", num_hidden_layers=1)
    made = qs.diff(model, qs.convert(model))
    assert "\x1b" not in str(made)
    assert "\x1b" not in made.to_text()
    screen = io.StringIO()
    Console(file=screen, force_terminal=True, color_system="standard", width=120).print(made)
    assert "\x1b[32m" in screen.getvalue()  # inserted lines are green
    assert "\x1b[33m" in screen.getvalue()  # changed lines are yellow
    plain = io.StringIO()
    Console(file=plain, force_terminal=True, no_color=True, width=120).print(made)
    assert "\x1b[32m" not in plain.getvalue()


def test_the_diff_shows_what_is_there_not_what_was_planned() -> None:
    model = build("bert", "BertModel")
    qmodel = qs.convert(model)
    full = qs.diff(model, qmodel)
    output = qmodel.encoder.layer[1].output
    output.dense._input_quantizer = None  # somebody's own edit
    edited = qs.diff(model, qmodel)
    assert full.to_text() != edited.to_text()
    blocks = [block for block in edited.blocks if block.block == "BertOutput"]
    assert [block.layers for block in blocks] == [(0,), (1,)]


def test_what_the_diff_refuses() -> None:
    model = build("bert", "BertModel")
    qmodel = qs.convert(model)
    with pytest.raises(qs.ModelError, match="is not converted"):
        qs.diff(model, model)
    with pytest.raises(qs.ModelError, match="wants the float model first"):
        qs.diff(qmodel, qmodel)
    with pytest.raises(qs.ModelError, match=r"is no conversion of the first .DistilBertModel."):
        qs.diff(build("distilbert", "DistilBertModel"), qmodel)


def test_explain() -> None:
    model = build("bert", "BertModel")
    qmodel = qs.convert(model)
    found = qs.explain(qmodel, "encoder.layer.1.output")
    assert list(found.found) == [
        "encoder.layer.1.output.dense._input_quantizer",
        "encoder.layer.1.output.dense._weight_quantizer",
        "encoder.layer.1.output.add_local_input_quantizer",
        "encoder.layer.1.output.add_residual_input_quantizer",
    ]
    text = found.to_text()
    assert re.search(r"add\(local\) at modeling_bert.py:\d+, by rule residual-add of qdqbert, qdqbert.yaml:\d+", text)
    assert "because: both inputs of an add" in text
    assert found.to_json()["quantizers"]["encoder.layer.1.output.add_local_input_quantizer"]["rule"] == "residual-add"
    pooler = qs.explain(qmodel, "pooler").to_text()
    assert "no rule is about a linear outside the encoder layers" in pooler
    assert "nothing here" in qs.explain(qmodel, "embeddings").to_text()
    assert len(qs.explain(qmodel).found) == 40
    with pytest.raises(
        qs.ModelError, match=r"there is no module 'encoder.layer.1.outptu'; near it: encoder.layer.1.output"
    ):
        qs.explain(qmodel, "encoder.layer.1.outptu")
    with pytest.raises(qs.ModelError, match="is not converted"):
        qs.explain(model)


def test_explain_shows_the_range() -> None:
    qmodel = qs.convert(build("bert", "BertModel"))
    next(iter(qs.quantizers(qmodel).values())).amax = torch.tensor(1.5)
    assert "amax=1.5000" in qs.explain(qmodel).to_text()
