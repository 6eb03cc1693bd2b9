"""From a calibrated model to an ONNX graph for one runtime."""
