"""A tokenizer of a few words, and folders of tiny random models with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, BertTokenizerFast, PreTrainedTokenizerFast

#: Of different lengths.
TEXTS = ["a short one", "a text with some more words in it", "words", "the longest of all of these texts, by some way"]


def write_texts(folder: Path) -> Path:
    """:data:`TEXTS`, one in each line."""
    path = folder / "texts.txt"
    path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    return path


def tiny_tokenizer(texts: Iterable[str], size: int = 600) -> PreTrainedTokenizerFast:
    """Trained on ``texts``; words that are not in them fall into letters."""
    trained = BertWordPieceTokenizer(lowercase=True)
    trained.train_from_iterator(
        [*texts, *("abcdefghijklmnopqrstuvwxyz0123456789")], vocab_size=size, min_frequency=1, show_progress=False
    )
    made: PreTrainedTokenizerFast = BertTokenizerFast(tokenizer_object=trained._tokenizer)
    return made


def save_tiny_bert(folder: Path, texts: Iterable[str]) -> Path:
    """A random encoder without a head, and its tokenizer, as ``save_pretrained`` writes them."""
    tokenizer = tiny_tokenizer(texts)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
