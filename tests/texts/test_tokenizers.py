"""Tokenizers of folders: those whose vocabulary is missing, or another model's, are refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path

import pytest
from tiny_checkpoint import save_tiny_bert
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, BertConfig, CanineConfig, PreTrainedTokenizerFast, RobertaConfig, RobertaTokenizer

from qdq_surgery.errors import ModelError
from qdq_surgery.texts.tokenizers import load_tokenizer, special_tokens, unknown_token

TEXTS = ["a short one", "a text with some more words in it"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("models") / "tiny", TEXTS)


def byte_level(folder: Path) -> Path:
    trained = ByteLevelBPETokenizer()
    trained.train_from_iterator(
        TEXTS, 320, min_frequency=1, show_progress=False, special_tokens=["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    )
    RobertaTokenizer(tokenizer_object=trained._tokenizer).save_pretrained(folder)
    trained.save_model(str(folder))
    return folder


@pytest.mark.parametrize(
    "kind",
    "bert roberta distilbert albert xlm-roberta deberta-v2 mpnet modernbert electra camembert esm mobilebert".split(),
)
def test_no_tokenizer_is_made_up_from_the_type_of_the_model(tmp_path: Path, kind: str) -> None:
    config = AutoConfig.for_model(kind)
    config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"has no .*tokenizer.*--tokenizer FOLDER"):
        load_tokenizer(tmp_path, config)


def test_a_tokenizer_that_needs_no_vocabulary_is_taken(tmp_path: Path) -> None:
    config = CanineConfig()
    config.save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path, config)("ab")["input_ids"][1:3] == [97, 98]


def test_half_of_a_vocabulary_is_none(tmp_path: Path) -> None:
    folder, config = byte_level(tmp_path), RobertaConfig(vocab_size=400)
    assert load_tokenizer(folder, config).tokenize("a short one") == ["a", "Ġshort", "Ġone"]
    (folder / "tokenizer.json").unlink()
    assert load_tokenizer(folder, config).tokenize("a short one") == ["a", "Ġshort", "Ġone"]
    (folder / "merges.txt").unlink()
    with pytest.raises(ModelError, match=r"has no .*(merges.txt|tokenizer)"):
        load_tokenizer(folder, config)


@pytest.mark.parametrize("content", ["{}", "[", ""])
def test_a_damaged_file(tmp_path: Path, model: Path, content: str) -> None:
    shutil.copytree(model, tmp_path / "copy")
    (tmp_path / "copy" / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match="copy has no tokenizer that can be used"):
        load_tokenizer(tmp_path / "copy", AutoConfig.from_pretrained(model))


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere is no folder"):
        load_tokenizer(tmp_path / "nowhere", BertConfig())


def test_code_of_strangers_is_not_run(tmp_path: Path, model: Path) -> None:
    shutil.copytree(model, tmp_path / "copy")
    auto = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "copy" / "tokenizer_config.json").write_text(json.dumps(auto))
    ran = tmp_path / "ran"
    (tmp_path / "copy" / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(ModelError):  # it may also be loaded without that code
        load_tokenizer(tmp_path / "copy", AutoConfig.from_pretrained(model))
    assert not ran.exists()


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ({"vocab_size": 20}, "vocabulary of .* tokens, and the model one of 20, so it is another model's"),
        (
            {"vocab_size": 9000, "pad_token_id": 1},
            "agree in no special token .pad is 0 and 1., so it is another model's",
        ),
    ],
)
def test_a_vocabulary_of_another_model(model: Path, sizes: dict[str, int], found: str) -> None:
    with pytest.raises(ModelError, match=found):
        load_tokenizer(model, BertConfig(**sizes))


@pytest.mark.parametrize("sizes", [{}, {"vocab_size": 9000}, {"spare": 3, "pad_token_id": 1}])
def test_what_may_be_the_same_model(model: Path, sizes: dict[str, int]) -> None:
    own = AutoConfig.from_pretrained(model).vocab_size
    config = BertConfig(
        **{"vocab_size": own + sizes.get("spare", 0)} | {k: v for k, v in sizes.items() if k != "spare"}
    )
    assert isinstance(load_tokenizer(model, config), PreTrainedTokenizerFast)


def test_the_unknown_token_is_not_one_that_means_something_else(model: Path) -> None:
    tokenizer = load_tokenizer(model, AutoConfig.from_pretrained(model))
    assert unknown_token(tokenizer) == tokenizer.unk_token_id
    assert special_tokens(tokenizer)["pad"] == 0
    tokenizer.unk_token = tokenizer.sep_token
    assert unknown_token(tokenizer) is None
