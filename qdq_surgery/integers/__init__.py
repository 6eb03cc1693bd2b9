"""Integers in place of fake quantization: what rounds to them, and the kernels that multiply them, by device."""
