"""QDQBERT's classes under their own names."""
