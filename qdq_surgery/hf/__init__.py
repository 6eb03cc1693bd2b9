"""What only Hugging Face's configs know: sizes, examples, wrappers."""
