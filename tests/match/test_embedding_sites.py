"""Which tables of embeddings get a quantizer, and which stay in float, for what reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import BASE, batch_for, build, tensors_of
from tables import table_rules
from torch import nn
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.errors import RuleFileError
from qdq_surgery.match.plan import Plan
from qdq_surgery.quantize.embedding import QuantEmbedding


def tables_of(plan: Plan) -> list[str]:
    return [site.quantizer for site in plan.sites if site.operator == "embedding"]


def reasons_of(plan: Plan) -> dict[str, str]:
    return {refusal.path: refusal.reason for refusal in plan.refusals if refusal.operator == "embedding"}


WORDS = {"modernbert": "embeddings.tok_embeddings"}


@pytest.mark.parametrize("model_type", list(BASE))
def test_the_table_of_the_words_has_a_site_in_every_architecture(model_type: str, tmp_path: Path) -> None:
    model, rules = build(model_type, BASE[model_type]), table_rules(tmp_path)
    words = WORDS.get(model_type, "embeddings.word_embeddings")
    assert tables_of(qs.plan(model, rules)) == [f"{words}._weight_quantizer"]
    qmodel = qs.convert(model, rules)
    assert type(qmodel.get_submodule(words)) is QuantEmbedding
    batch = batch_for(model, (2, 9))
    wanted, found = tensors_of(model(**batch)), tensors_of(qmodel(**batch))
    assert not torch.equal(next(iter(found.values())), next(iter(wanted.values())))
    with qs.quantization_disabled(qmodel):
        found = tensors_of(qmodel(**batch))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    qmodel.dequantize()
    assert type(qmodel.get_submodule(words)) is nn.Embedding
    assert qmodel.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ("{min: 60}", ["word"]),
        ("{min: 61}", []),
        ("[2, 40]", ["position", "token_type"]),
        ("{max: 40}", ["position", "token_type"]),
    ],
)
def test_rows_say_which_tables(rows: str, found: list[str], tmp_path: Path) -> None:
    plan = qs.plan(build("bert", "BertModel"), table_rules(tmp_path, rows=rows))
    assert sorted(tables_of(plan)) == [f"embeddings.{name}_embeddings._weight_quantizer" for name in found]
    assert plan.matches["embeddings"] == len(found)


def test_rows_belong_to_embeddings(tmp_path: Path) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(
        'schema: 1\nname: wrong\nrules:\n  - name: r\n    why: w\n    match: {pattern: "linear(x, w)", rows: 3}\n'
        "    quantize: {x: default}\n"
    )
    with pytest.raises(RuleFileError, match=r"wrong.yaml:4.*'r' counts rows, and its pattern is about a linear"):
        qs.plan(build("bert", "BertModel"), str(path))


@pytest.mark.parametrize("head", ["BertForMaskedLM", "BertForPreTraining"])
def test_a_table_that_a_float_linear_shares_stays_float(head: str, tmp_path: Path) -> None:
    plan = qs.plan(build("bert", head), table_rules(tmp_path))
    assert tables_of(plan) == []
    [reason] = reasons_of(plan).values()
    assert reason.startswith("its table is the weight of cls.predictions.decoder, too, which stays in float")


def test_a_table_that_a_quantized_linear_shares_has_the_same_ranges(tmp_path: Path) -> None:
    path = tmp_path / "decoder.yaml"
    path.write_text(
        "schema: 1\nname: decoder\nspecs: {activation: default, weight: {axis: 0}}\nrules:\n"
        '  - {name: decoder, why: w, match: {pattern: "linear(x, w)", within: "*.decoder"}, '
        "quantize: {x: activation, w: weight}}\n"
        '  - {name: table, why: w, match: {pattern: "embedding(_, w)", rows: 60}, quantize: {w: weight}}\n'
    )
    qmodel = qs.convert(build("bert", "BertForMaskedLM"), str(path))
    qs.calibrate(qmodel, [batch_for(qmodel, (2, 9))])
    found = qs.quantizers(qmodel)
    names = ["bert.embeddings.word_embeddings._weight_quantizer", "cls.predictions.decoder._weight_quantizer"]
    assert torch.equal(*(found[name].amax for name in names))
    assert qmodel.get_input_embeddings().weight is qmodel.get_output_embeddings().weight


class OwnEmbedding(nn.Embedding):
    pass


def _own_class(model: PreTrainedModel) -> None:
    model.get_input_embeddings().__class__ = OwnEmbedding


def _limited(model: PreTrainedModel) -> None:
    model.get_input_embeddings().max_norm = 1.0


def _taken(model: PreTrainedModel) -> None:
    model.get_input_embeddings()._weight_quantizer = 3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_own_class, "OwnEmbedding is no plain nn.Embedding"),
        (_limited, "Embedding is no plain nn.Embedding"),
        (_taken, "the embedding has an attribute '_weight_quantizer' already"),
    ],
)
def test_other_embeddings_are_refused(change: object, reason: str, tmp_path: Path) -> None:
    model = build("bert", "BertModel")
    change(model)  # type: ignore[operator]
    plan = qs.plan(model, table_rules(tmp_path))
    assert tables_of(plan) == []
    assert reasons_of(plan)["embeddings.word_embeddings"].startswith(reason)


def test_what_an_embedding_is_given_takes_none(tmp_path: Path) -> None:
    path = tmp_path / "ids.yaml"
    path.write_text(
        "schema: 1\nname: ids\nextends: linear-only\nrules:\n"
        '  - {name: ids, why: w, match: {pattern: "embedding(ids, _)", rows: 60}, quantize: {ids: default}}\n'
    )
    assert (
        "integers already" in reasons_of(qs.plan(build("bert", "BertModel"), str(path)))["embeddings.word_embeddings"]
    )


def test_targets_whose_files_gain_quantize_large_tables() -> None:
    model = build("bert", "BertModel", vocab_size=1024)
    for rules in ("onnxruntime", "openvino", "pytorch"):
        assert tables_of(qs.plan(model, rules)) == ["embeddings.word_embeddings._weight_quantizer"]
        assert tables_of(qs.plan(build("bert", "BertModel", vocab_size=1023), rules)) == []
    for rules in ("qdqbert", "qdqbert-scaled", "linear-only", "fuse-qkv", "tensorrt", "tensorrt-both", "tensorrt-none"):
        assert tables_of(qs.plan(model, rules)) == []
