"""Converted models in transformers' own ways: saved, loaded and reported like any other model."""
