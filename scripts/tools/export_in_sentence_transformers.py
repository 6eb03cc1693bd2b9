"""What sentence-transformers' own exporter makes of a model: dynamic INT8 for ONNX Runtime, by its preset for VNNI.

Called with a folder of sentence-transformers and the folder to write.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sentence_transformers import SentenceTransformer, export_dynamic_quantized_onnx_model


def main() -> None:
    """Write the folder; its file is onnx/model_qint8_avx512_vnni.onnx."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    options = {"provider": "CPUExecutionProvider", "export": True}
    model = SentenceTransformer(str(arguments.model), backend="onnx", device="cpu", model_kwargs=options)
    model.save_pretrained(str(arguments.output))
    export_dynamic_quantized_onnx_model(model, "avx512_vnni", str(arguments.output))


if __name__ == "__main__":
    main()
