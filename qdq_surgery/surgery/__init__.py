"""The only editor of models."""
