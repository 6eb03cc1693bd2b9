"""A calibrated model for inference in PyTorch itself: its quantized linears multiply integers."""
