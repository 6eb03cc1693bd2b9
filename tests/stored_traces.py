"""What torch makes of a model is kept while the tests run: traced once for all tests and workers that ask for the same.

A trace takes seconds, and all the rest of an export a tenth of one. Here the one function that calls torch is replaced
by one that looks first whether the very same was asked for before: the same class, modules, config, parameters,
quantizers, inputs, open axes and opset. Whatever is new is traced; nothing is shared between what differs in any bit.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import short_traces
import torch._dynamo
from kept import kept
from torch import Tensor
from torch.onnx._internal.exporter import _registration
from transformers import PreTrainedModel

from qdq_surgery.export import onnx_trace
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.surgery.model_state import quantizers

__all__ = ["fingerprint", "install", "uninstall"]

_real = onnx_trace._torch_graph
_from_torchlib = _registration.ONNXRegistry.from_torchlib

#: Attributes of a module that go into a trace as they are.
_PLAIN = (bool, int, float, str)


@functools.cache
def _registry(opset: int) -> _registration.ONNXRegistry:
    """torch compiles the source of all its translations anew for each trace, a quarter of a fixed one's time."""
    return _from_torchlib(opset)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is undone, traces come from the store, and new ones are short."""
    short_traces.install(monkeypatch)
    monkeypatch.setattr(onnx_trace, "_torch_graph", _stored)
    own = staticmethod(lambda opset_version: _registry(opset_version))
    monkeypatch.setattr(_registration.ONNXRegistry, "from_torchlib", own)


def uninstall(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it is undone, torch traces as it does elsewhere."""
    short_traces.uninstall(monkeypatch)
    monkeypatch.setattr(onnx_trace, "_torch_graph", _real)
    monkeypatch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(_from_torchlib))


def _stored(
    qmodel: PreTrainedModel,
    tensors: Mapping[str, Tensor],
    shapes: dict[str, Any] | None,
    opset: int,
    fields: list[str],
) -> ir.Model:
    def make(_: Path) -> bytes:
        # torch looks up what each operator gives: where shapes are open that takes longer than to find out.
        with torch._dynamo.config.patch(fake_tensor_cache_enabled=shapes is None):
            return _bytes(_real(qmodel, tensors, shapes, opset, fields))

    asked = {
        "tensors": [(name, value.dtype, tuple(value.shape)) for name, value in tensors.items()],
        "open": None if shapes is None else [(name, tuple(axes)) for name, axes in shapes.items()],
        "bound": _bound_to(qmodel),
        "opset": opset,
        "fields": fields,
    }
    if any("forward" in vars(each) for each in qmodel.modules() if each is not qmodel):  # someone's own: not to be told
        return _real(qmodel, tensors, shapes, opset, fields)
    found = kept(make, "trace", fingerprint(qmodel), asked)
    return ir.from_proto(onnx.ModelProto.FromString(found))


def _bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


def _bound_to(qmodel: PreTrainedModel) -> Any:
    """The arguments that are no tensors, which :func:`qdq_surgery.export.onnx_trace._bound` passes along."""
    cells = dict(zip(qmodel.forward.__code__.co_freevars, qmodel.forward.__closure__, strict=True))
    return sorted(cells["rest"].cell_contents.items())


def fingerprint(qmodel: PreTrainedModel) -> str:
    """Of all that a trace depends on but the inputs; ranges are no part of it."""
    tagged = quantizers(qmodel)
    made = hashlib.sha256()
    for name, module in qmodel.named_modules(remove_duplicate=False):
        own = {key: value for key, value in vars(module).items() if key[0] != "_" and isinstance(value, _PLAIN)}
        if isinstance(module, TensorQuantizer):  # whether it acts at all; its grid and range are no part of a trace
            own = {key: bool(getattr(module, key)) for key in ("_disabled", "_if_quant", "_holders")}
        made.update(f"{name} {type(module).__module__}.{type(module).__qualname__} {sorted(own.items())}".encode())
    made.update(repr((sorted(tagged), qmodel.config._attn_implementation, qmodel.config.to_json_string())).encode())
    states = [*qmodel.named_parameters(remove_duplicate=False), *qmodel.named_buffers(remove_duplicate=False)]
    for name, value in states:
        if name.rpartition(".")[0] not in tagged:
            made.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            made.update(value.detach().numpy().tobytes())
    return made.hexdigest()
