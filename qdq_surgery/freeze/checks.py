"""What can be frozen: refusals of whole models, and linears and tables that stay as they are, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedModel

from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.hf.tied_weights import tied_names
from qdq_surgery.integers.choice import PLACES, PRODUCTS, unsupported
from qdq_surgery.integers.weight import why_float
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.surgery.model_state import quantizers, refuse_broken, refuse_lost

__all__ = ["Choice", "choose", "reasons_kept"]

_MOST_NAMED = 5


@dataclass(frozen=True)
class Choice:
    """Which linears become integer linears.

    Attributes:
        integer: Their paths.
        kept: Of each quantized linear, and each quantized embedding, that stays in float, why.
        tables: Paths of the embeddings whose tables become integers.
    """

    integer: tuple[str, ...]
    kept: dict[str, str]
    tables: tuple[str, ...] = ()


def choose(qmodel: PreTrainedModel) -> Choice:
    """Look a calibrated model over; it stays as it is.

    Raises:
        ModelError: It is not converted, is on a device without integer products, has no linear that can be frozen, or
            integer products do not run here.
        CalibrationError: A quantizer has no range, or is collecting.
    """
    refuse_lost(qmodel, "the frozen model")
    _check_place(qmodel)
    _check_ranges(qmodel)
    refuse_broken(qmodel)
    linears, found = _linears(qmodel)
    integer = tuple(name for name, reason in found.items() if reason is None)
    kept = {name: reason for name, reason in found.items() if reason is not None}
    if not integer:
        first = next(iter(kept.items()), None)
        told = "it has no quantized linear" if first is None else f"{first[0]}: {first[1]}"
        raise ModelError(f"nothing of this {type(qmodel).__name__} can be frozen: {told}")
    weights = {(linears[name].weight.device, linears[name].weight.dtype) for name in integer}
    for device, dtype in sorted(weights, key=str):
        problem = unsupported(device, dtype)
        if problem is not None:
            raise ModelError(
                f"this {type(qmodel).__name__} cannot be frozen: {problem}; use it with fake quantization, or "
                "qdq_surgery.export_onnx"
            )
    tables = _tables(qmodel)
    kept |= {name: reason for name, reason in tables.items() if reason is not None}
    return Choice(integer, kept, tuple(name for name, reason in tables.items() if reason is None))


def reasons_kept(model: PreTrainedModel) -> dict[str, str]:
    """Of each quantized linear and embedding that a frozen model still has, why; of a model that was loaded."""
    found = {**_linears(model)[1], **_tables(model)}
    return {name: reason or "its weight was float when the model was saved" for name, reason in found.items()}


def _linears(qmodel: PreTrainedModel) -> tuple[dict[str, QuantLinear], dict[str, str | None]]:
    linears = {name: module for name, module in qmodel.named_modules() if isinstance(module, QuantLinear)}
    return linears, {name: _why_not(linear, name) for name, linear in linears.items()}


def _tables(qmodel: PreTrainedModel) -> dict[str, str | None]:
    embeddings = {name: each for name, each in qmodel.named_modules() if isinstance(each, QuantEmbedding)}
    return {name: _why_no_rows(qmodel, name, each) for name, each in embeddings.items()}


def _why_no_rows(qmodel: PreTrainedModel, name: str, embedding: QuantEmbedding) -> str | None:
    """Why the table of a quantized embedding stays as it is; ``None`` if it does not."""
    quantizer, amax = embedding._weight_quantizer, embedding._weight_quantizer.amax
    if not quantizer.quantizes:
        return "the quantizer of its table is disabled"
    if (
        quantizer._modules
        or not quantizer._fake_quant
        or quantizer.use_fb_fake_quant
        or quantizer._scale_amax is not None
    ):
        return "the quantizer of its table clips, scales, or rounds by a formula of torch's own"
    if quantizer.grid.bits != 8 or quantizer.grid.unsigned:
        return f"its table is on another grid than int8 ({quantizer.grid})"
    if quantizer.rounding is not None:
        return "the rounding of its table is adapted"
    if amax is not None and amax.numel() != 1 and tuple(amax.shape) != (embedding.num_embeddings, 1):
        return "its table has ranges along another axis than that of the rows"
    others = tied_names(qmodel, f"{name}.weight")
    if others:
        return f"its table is {others[0]}, too"
    return "it has a forward of its own, set on the instance" if "forward" in vars(embedding) else None


def _check_place(qmodel: PreTrainedModel) -> None:
    devices = {tensor.device.type for tensor in (*qmodel.parameters(), *qmodel.buffers())} - PRODUCTS.keys()
    if devices:
        raise ModelError(
            f"this {type(qmodel).__name__} is on {', '.join(sorted(devices))}, and a model is frozen on {PLACES}; move "
            "it there first, or use qdq_surgery.export_onnx or fake quantization"
        )


def _check_ranges(qmodel: PreTrainedModel) -> None:
    active = {name: each for name, each in quantizers(qmodel).items() if not each._disabled}
    without = [name for name, each in active.items() if each.amax is None]
    if without:
        named = ", ".join(without[:_MOST_NAMED])
        more = f" and {len(without) - _MOST_NAMED} more" if len(without) > _MOST_NAMED else ""
        raise CalibrationError(
            f"{named}{more} ha{'s' if len(without) == 1 else 've'} no range; call qdq_surgery.calibrate first, or "
            "disable what is not to be quantized"
        )
    bad = [name for name, each in active.items() if each.amax is not None and not bool(each.amax.isfinite().all())]
    if bad:
        raise CalibrationError(f"the range of {bad[0]} is not a finite number; calibrate the model again")
    collecting = [name for name, each in active.items() if each._if_calib]
    if collecting:
        raise CalibrationError(f"{collecting[0]} is collecting statistics; wait for it, or call disable_calib()")


def _why_not(linear: QuantLinear, name: str) -> str | None:
    """Why a quantized linear stays as it is; ``None`` if it does not.

    Raises:
        ModelError: A grid does not have 8 bits.
    """
    sides = {"input": linear._input_quantizer, "weight": linear._weight_quantizer}
    reason = why_float(linear)
    for side, quantizer in sides.items():
        if reason is None and quantizer is not None and quantizer._num_bits != 8:
            raise ModelError(
                f"{name}: its {side} is on a grid of {quantizer._num_bits} bits ({quantizer.grid}), and integer "
                "products have 8; change the rule's num_bits, or disable this quantizer"
            )
    return reason
