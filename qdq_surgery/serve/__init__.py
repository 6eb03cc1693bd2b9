"""An exported file, run like a Hugging Face model."""
