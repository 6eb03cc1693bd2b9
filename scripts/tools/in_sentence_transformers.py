"""A deployed folder in sentence-transformers, which pools and normalizes by the folder's own modules.

With the environment's optimum-onnx it loads the ONNX file, with optimum-intel OpenVINO's form.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

from given import Given, give, given
from sentence_transformers import SentenceTransformer

_ONNX = {"file_name": "onnx/model_quantized.onnx", "provider": "CPUExecutionProvider"}
_OPENVINO = {
    "file_name": "openvino/openvino_model_qint8_quantized.xml",
    "ov_config": {"INFERENCE_PRECISION_HINT": "f32"},
}


def main(task: Given) -> None:
    """Run the task."""
    runtime = "onnxruntime" if importlib.util.find_spec("onnxruntime") is not None else "openvino"
    options: dict[str, Any] = _ONNX if runtime == "onnxruntime" else _OPENVINO
    backend: Literal["onnx", "openvino"] = "onnx" if runtime == "onnxruntime" else "openvino"
    model = SentenceTransformer(str(task.folder), backend=backend, device="cpu", model_kwargs=dict(options))

    def run(texts: Sequence[str]) -> Any:
        return model.encode(list(texts), batch_size=len(texts))

    file = task.folder / options["file_name"]
    give(task, file, ["sentence-transformers", "transformers"], run, runtime)


if __name__ == "__main__":
    main(given())
