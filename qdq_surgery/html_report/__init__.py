"""A model's conversion as one HTML file, to be read, searched and printed: what the other packages found, drawn."""
