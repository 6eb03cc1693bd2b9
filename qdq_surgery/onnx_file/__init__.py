"""An ONNX file as a stranger's data: read within limits, written whole, and what it says about itself."""
