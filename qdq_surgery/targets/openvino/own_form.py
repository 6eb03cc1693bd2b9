"""OpenVINO's own form of a file (IR: .xml and .bin), which tools that know nothing else of it load."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qdq_surgery.targets.openvino.session import OpenVinoSession

__all__ = ["run_own_form", "write_own_form"]


def write_own_form(file: Path, form: Path) -> None:
    """Write the ONNX ``file`` as ``form``, in full precision where it is not INT8.

    Raises:
        ModelError: OpenVINO is not installed.
    """
    openvino = OpenVinoSession.package("writing OpenVINO's own form")
    # As it is read: convert_model would multiply factors with each other, in another order than the file has them, and
    # then values at ties go the other way. That moves the outputs of all-MiniLM-L6-v2 by 2 to 5 % of their norm.
    openvino.save_model(openvino.Core().read_model(file), form, compress_to_fp16=False)


def run_own_form(form: Path, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """Its outputs by name, computed in float32 where it is not INT8, otherwise as a session computes a file.

    Args:
        form: What :func:`write_own_form` wrote a moment ago: nobody else's file is opened here.
    """
    core = OpenVinoSession.package("running OpenVINO's own form").Core()
    options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(form, "CPU", {**options, "INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({port.any_name: inputs[port.any_name] for port in compiled.inputs})
    return {port.any_name: np.array(found[port]) for port in compiled.outputs}
