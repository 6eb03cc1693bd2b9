"""OpenVINO on CPUs: how its files are written, and where the rest of it is."""

from __future__ import annotations

from qdq_surgery.targets.openvino.engine_graph import run_by_openvino
from qdq_surgery.targets.openvino.own_form import run_own_form, write_own_form
from qdq_surgery.targets.openvino.session import OpenVinoSession
from qdq_surgery.targets.target import OwnForm, Target

__all__ = ["OPENVINO"]

#: Unsigned activations everywhere would keep OpenVINO from its fused attention, and cost a conversion in front of each
#: GEMM. Activations with scales along an axis it fails to compile.
OPENVINO = Target(
    "openvino",
    "OpenVINO",
    opset=20,
    opsets=(19, 23),
    activations=("int8",),
    lint="qdq_surgery.targets.openvino.lint",
    executed=run_by_openvino,
    session=OpenVinoSession,
    activation_axes=False,
    scales_apart=True,
    # (As sentence-transformers and optimum call it.)
    own_form=OwnForm("openvino/openvino_model_qint8_quantized.xml", write_own_form, run_own_form),
)
