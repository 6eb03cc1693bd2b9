"""Text files as batches of tokens."""
