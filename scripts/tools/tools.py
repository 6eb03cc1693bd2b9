"""The tools: which program runs in which environment, on the folder for which runtime."""

from __future__ import annotations

from typing import NamedTuple

from tools.given import EMBEDDINGS, LOGITS

__all__ = ["TOOLS", "Tool"]


class Tool(NamedTuple):
    """A tool that loads deployed folders.

    Attributes:
        name: What its people call it.
        environment: Folder of its environment; what is in it stands in ``requirements/`` under the same name.
        program: File beside this one, called as ``given.py`` says.
        target: Which folder it loads, by the runtime that it was written for.
        wanted: What it is asked for.
    """

    name: str
    environment: str
    program: str
    target: str
    wanted: tuple[str, ...] = (EMBEDDINGS,)


TOOLS = (
    Tool("sentence-transformers", "optimum-onnx", "in_sentence_transformers.py", "onnxruntime"),
    Tool("sentence-transformers", "optimum-intel", "in_sentence_transformers.py", "openvino"),
    Tool("optimum-onnx", "optimum-onnx", "in_optimum_onnx.py", "onnxruntime", (EMBEDDINGS, LOGITS)),
    Tool("optimum-intel", "optimum-intel", "in_optimum_intel.py", "openvino", (EMBEDDINGS, LOGITS)),
    Tool("fastembed", "fastembed", "in_fastembed.py", "onnxruntime"),
    # (No server: its own schema reads the config, and the file is run with what the config says.)
    Tool("Triton's config", "triton", "in_triton.py", "onnxruntime"),
    Tool("Transformers.js", "transformers-js", "in_transformers_js.mjs", "onnxruntime", (EMBEDDINGS, LOGITS)),
)
