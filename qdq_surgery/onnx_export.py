"""From a calibrated model to a file for one runtime, in one call."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from qdq_surgery.errors import ExportError, ModelError
from qdq_surgery.export.half_copy import half_copy
from qdq_surgery.export.qparams import read_qparams
from qdq_surgery.export.shared_copy import twin
from qdq_surgery.hf.example_inputs import sample_inputs
from qdq_surgery.numerics.real_numbers import is_whole
from qdq_surgery.onnx_file.metadata import Site
from qdq_surgery.onnx_file.opened import OnnxFile, open_file
from qdq_surgery.onnx_file.writer import data_beside, draft, writable
from qdq_surgery.onnx_graph.findings import Findings
from qdq_surgery.prove.lint import lint
from qdq_surgery.safety.given_flags import check_flags
from qdq_surgery.surgery.model_state import plan_of, refuse_disabled, refuse_lost
from qdq_surgery.targets.registry import DEFAULT, REFERENCE, get_target
from qdq_surgery.targets.target import ACTIVATIONS, PRECISIONS, Target, full_precision
from qdq_surgery.text.optional_imports import require
from qdq_surgery.text.view import Line, Part, Result, line

if TYPE_CHECKING:
    from qdq_surgery.prove.parity import Parity

__all__ = ["Export", "export_onnx"]


@dataclass(frozen=True, repr=False)
class Export(Result):
    """What was written.

    Attributes:
        path: The file.
        target: The name of its target.
        opset: The version of ONNX's operators in it.
        sites: Its Q/DQ pairs.
        findings: What each pair enables or blocks on the target.
        parity: The certificate; ``None`` if none was asked for.
    """

    path: Path
    target: str
    opset: int
    sites: tuple[Site, ...]
    findings: Findings
    parity: Parity | None

    def to_json(self) -> dict[str, Any]:
        """All of it; the path as it was given; ``schema`` is the version of this form."""
        return {
            "schema": 1,
            "path": str(self.path),
            "target": self.target,
            "opset": self.opset,
            "sites": [asdict(site) for site in self.sites],
            "findings": self.findings.to_json(),
            "parity": None if self.parity is None else self.parity.to_json(),
        }

    def _title(self) -> Line:
        files = (self.path, *data_beside(self.path)) if self.path.exists() else ()
        size = sum(file.stat().st_size for file in files)
        weights = sum(site.role == "weight" for site in self.sites)
        return line(
            f"{self.path.name} for {self.target}, opset {self.opset}, {size / 1e6:.1f} MB: {weights} weights in int8, "
            f"{len(self.sites) - weights} Q/DQ pairs for "
            f"{sum(len(site.quantizers) for site in self.sites if site.role != 'weight')} quantizers of activations"
        )

    def _parts(self) -> Iterable[Part]:
        if self.parity is not None:
            yield from ("", self.parity.view())
        yield from ("", self.findings.view())


def export_onnx(
    qmodel: PreTrainedModel,
    path: str | Path,
    example_inputs: Mapping[str, Any] | None = None,
    target: str = DEFAULT,
    *,
    opset: int | None = None,
    dynamic: bool = True,
    parity: bool = True,
    activations: str | None = None,
    precision: str | None = None,
    overwrite: bool = False,
) -> Export:
    """Write a calibrated model as ONNX with Q/DQ pairs, in the form that one runtime turns into integer kernels.

    Weights are stored as int8. A file that is larger than protobuf allows has its weights beside it, in ``PATH.data``
    (``PATH.NUMBER.data`` if that is taken by the file that it replaces, until it does).

    Args:
        qmodel: A converted, calibrated model in eval mode, with any head. It stays as it is.
        path: The file to write, which ends in ``.onnx``.
        example_inputs: Keyword arguments of the model's forward to trace and to check with, such as what a tokenizer
            gives; they decide which inputs the file has. Left out, they are made from the config.
        target: ``onnxruntime``, ``openvino`` or ``tensorrt``; see :data:`qdq_surgery.targets.registry.TARGETS`.
        opset: The version of ONNX's operators; the target's own if left out.
        dynamic: Whether batch and sequence stay open. Otherwise the file takes the example's shapes only.
        parity: Whether to compare the file with the model, site by site, before it takes its place.
        activations: ``int8``, or ``uint8`` with 128 as zero point, which is the same grid. The target's own if left
            out: for ONNX Runtime that of this machine's CPU, so give it if the file is for another (``int8`` for Arm).
        precision: ``float32``, or for TensorRT ``float16``: what is not INT8 is then half precision in the file, as its
            strongly typed networks want it.
        overwrite: Whether a file that exists is replaced, with its weights, when the new one is complete and checked.
            Links, devices and the like are never replaced.

    Returns:
        What was written, with the certificate. The outputs of the file are the fields of the model's output class.

    Raises:
        CalibrationError: Quantizers have no range; names them all.
        ExportError: There is no such target, opset, precision; a quantizer's grid has no form in ONNX; the file cannot
            be written, or is there already; the model cannot be traced.
        ParityError: The file computes something else; names the first site. Nothing is left behind.
        OptionError: A flag is neither true nor false.
        ModelError: The model is not converted, is in train mode or in ``quantization_disabled``, or a package is
            missing; says which extra has it.
    """
    check_flags(dynamic=dynamic, parity=parity, overwrite=overwrite)
    chosen = get_target(target)
    precision = None if precision is None else full_precision(precision)
    form = _Form(
        chosen,
        _opset(chosen, opset),
        _one_of("activations", activations, ACTIVATIONS, chosen.activations, target),
        _one_of("precision", precision, PRECISIONS, chosen.precisions, target),
        dynamic,
    )
    for package in ("onnx", "onnx_ir", "onnxscript"):
        require(package, "exporting to ONNX")
    file = writable(path, overwrite)
    source, inputs, built = _built(qmodel, example_inputs, form)
    findings = lint(built)
    with draft(file, overwrite) as temporary:
        built.save(temporary.graph, temporary.data.name)
        # The certificate is about the file: its graph, with all values and weights, is read back from the disk, once,
        # and the runtimes open the same file. Only the list of sites is the built one: it says which value is compared
        # with which quantizer, and a wrong entry shows as a difference.
        certificate = _certified(source, open_file(temporary.graph, built.sites), inputs, chosen) if parity else None
    return Export(file, target, form.opset, built.sites, findings, certificate)


@dataclass(frozen=True)
class _Form:
    """How a file is written."""

    target: Target
    opset: int
    activations: str
    precision: str
    dynamic: bool


def _built(
    qmodel: PreTrainedModel, example_inputs: Mapping[str, Any] | None, form: _Form
) -> tuple[PreTrainedModel, dict[str, Any], OnnxFile]:
    """The model as it is written (in half precision, it may be), what it was traced with, and the graph."""
    from qdq_surgery.export.onnx_trace import trace
    from qdq_surgery.export.pipeline import build

    plan_of(qmodel)
    refuse_disabled(qmodel, "export_onnx")
    refuse_lost(qmodel, "the file")
    if qmodel.training:
        raise ModelError(f"this {type(qmodel).__name__} is in train mode, with dropout; call .eval() first")
    _check_dtype(qmodel, form.precision)
    qparams = read_qparams(qmodel, form.target)
    source, weights = twin(qmodel), {}
    inputs = sample_inputs(source, example_inputs, form.dynamic)
    if form.precision == "float16":
        weights = _float_weights(source)
        source = half_copy(source, qparams)
        inputs = {
            name: value.half() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in inputs.items()
        }
    traced = trace(source, inputs, form.opset, form.dynamic)
    return source, inputs, build(traced, qmodel, qparams, form.target, form.activations, weights)


def _certified(model: PreTrainedModel, file: OnnxFile, inputs: Mapping[str, Any], target: Target) -> Parity:
    from qdq_surgery.prove.parity import certify

    reason = None if target.session is REFERENCE else _unchecked(target)
    asked = [REFERENCE.runtime] if reason or target.session is REFERENCE else [REFERENCE.runtime, target.name]
    certificate = replace(certify(model, file, inputs, asked), left_out=() if reason is None else (reason,))
    certificate.require()
    return certificate


def _unchecked(target: Target) -> str | None:
    """Why the certificate cannot ask the target's own runtime."""
    if target.session is None:
        return f"{target.title}, {target.unchecked}"
    if importlib.util.find_spec(target.session.runtime) is None:
        return f"{target.title}, which is not installed; pip install 'qdq-surgery[{target.session.extra}]'"
    return None


def _check_dtype(qmodel: PreTrainedModel, precision: str) -> None:
    kinds = {each.dtype for each in qmodel.parameters() if each.is_floating_point()}
    other = sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32, getattr(torch, precision)})
    if other:
        raise ModelError(
            f"this {type(qmodel).__name__} is in {other[0]}, and the file is to be in {precision}; call .float() first"
        )


def _opset(target: Target, opset: int | None) -> int:
    first, last = target.opsets
    if opset is None:
        return target.opset
    if not (is_whole(opset) and first <= opset <= last):
        raise ExportError(f"opset {opset!r} is not supported for {target.name}; choose one of {first} to {last}")
    return int(opset)


def _one_of(what: str, value: str | None, known: tuple[str, ...], allowed: tuple[str, ...], target: str) -> str:
    if value is None:
        return allowed[0]
    if value not in known:
        raise ExportError(f"there is no {what} '{value}'; choose one of {', '.join(known)}")
    if value not in allowed:
        raise ExportError(f"{what} '{value}' is not supported for {target}; choose {' or '.join(allowed)}")
    return value


def _float_weights(model: PreTrainedModel) -> dict[str, NDArray[np.float32]]:
    return {
        name: value.detach().float().cpu().numpy() for name, value in model.named_parameters(remove_duplicate=False)
    }
