"""sentence-transformers' own exporter: dynamic INT8 for ONNX Runtime, made in an environment of its own."""

from __future__ import annotations

from pathlib import Path

from qdq_surgery.cli.demo.files import checkpoint
from runtimes.workspace import Missing
from versions.environments import MissingError, run

__all__ = ["quantize_by_sentence_transformers"]

_PROGRAM = Path(__file__).parents[1] / "tools" / "export_in_sentence_transformers.py"
_FILE = Path("onnx", "model_qint8_avx512_vnni.onnx")


def quantize_by_sentence_transformers(tools: Path | None, folder: Path) -> Path:
    """The file of all-MiniLM-L6-v2, made once in ``folder``.

    Args:
        tools: The environments that ``scripts/other_tools.sh`` made.

    Raises:
        Missing: There is none that has it, or the exporter fails.
    """
    file = folder / "sentence-transformers" / _FILE
    python = Path() if tools is None else tools / "optimum-onnx" / "bin" / "python"
    if not python.is_file():
        raise Missing("for minilm only, in an environment that --tools names and scripts/other_tools.sh makes")
    if not file.is_file():
        try:
            run([python, _PROGRAM, checkpoint(), folder / "sentence-transformers"], HF_HUB_OFFLINE="1", PYTHONPATH="")
        except MissingError as error:
            raise Missing(str(error)) from error
    return file
