"""The docstrings of Python's standard library as a corpus."""

from __future__ import annotations

from qdq_surgery.texts.standard_library import standard_library_texts


def test_the_text_is_english_and_always_the_same() -> None:
    texts = standard_library_texts(120)
    assert len(texts) == 120
    assert texts == standard_library_texts(120)
    assert texts[:40] == standard_library_texts(40)
    assert len(set(texts)) == len(texts)
    assert all(40 <= len(text) <= 400 and text[0].isupper() for text in texts)
