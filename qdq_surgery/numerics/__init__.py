"""Pure functions over tensors: fake quantization, histograms, ranges. No model, no rule."""
