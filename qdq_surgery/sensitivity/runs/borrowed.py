"""A converted model while it is measured: which of its quantizers quantize is chosen for each run.

Afterwards it is as it was. Weights are rounded once for all runs, linears that are all in INT8 multiply integers, and
layers and linears that would give what they gave before are not run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import only_borrower
from qdq_surgery.errors import CalibrationError
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.safety.random_state import kept_random, seed_generators
from qdq_surgery.safety.transaction import kept_modes, put_back_after
from qdq_surgery.sensitivity.outlier_channels import ChannelTops
from qdq_surgery.sensitivity.parts import layer_paths
from qdq_surgery.sensitivity.runs.integer_products import integer_products
from qdq_surgery.sensitivity.runs.kept_products import KeptProducts, Shortcut, shortcut
from qdq_surgery.sensitivity.runs.layer_outputs import LayerOutputs, kept_outputs, same_tensors, without_running
from qdq_surgery.surgery.model_state import quantizers

__all__ = ["Borrowed", "Kept", "borrowed", "gpus_of", "run_seeded"]

_HOLDERS = itertools.count()
_SEED = 0
_ROUNDED = "quantized_weight"


def gpus_of(model: nn.Module) -> list[torch.device]:
    """Where its parameters are, but for the CPU."""
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)


def run_seeded(model: nn.Module, inputs: Mapping[str, Any], devices: Iterable[torch.device]) -> Any:
    """The model's outputs, with the same random numbers each time; what the user's batches draw stays their own.

    Args:
        devices: As :func:`gpus_of` gives them.

    Raises:
        CalibrationError: It cannot run.
    """
    try:
        gpus = list(devices)
        with kept_random(gpus):
            seed_generators(_SEED, gpus)
            return model(**inputs)
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise CalibrationError(f"{type(model).__name__} cannot run it: {error}") from error


@dataclass(frozen=True)
class Kept:
    """What a run gave on its way."""

    layers: LayerOutputs
    products: KeptProducts


class Borrowed:
    """The model, to be run with some of its quantizers.

    Args:
        measured: The quantizers that quantize when nothing is chosen.
        tops: Calibrators, by the name of the quantizer whose inputs they see.
        how: What its linears do meanwhile.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        measured: Mapping[str, TensorQuantizer],
        tops: Mapping[str, ChannelTops],
        how: Shortcut,
    ) -> None:
        self._model, self._measured, self._tops, self._shortcut = model, measured, tops, how
        self._holder = next(_HOLDERS)
        self._devices = gpus_of(model)
        self._layers = {path: model.get_submodule(path) for path in layer_paths(model)}
        if any(getattr(layer, "_compiled_call_impl", None) is not None for layer in self._layers.values()):
            self._layers = {}  # it would be compiled anew for each run

    def let_go(self) -> None:
        """Every quantizer is free again."""
        for quantizer in self._measured.values():
            quantizer.let_go(self._holder)

    def run(self, inputs: Mapping[str, Any], chosen: Iterable[str]) -> Any:
        """The outputs of the model where only the ``chosen`` quantizers quantize.

        Raises:
            CalibrationError: The model cannot run.
        """
        free = set(chosen)
        for name, quantizer in self._measured.items():
            (quantizer.let_go if name in free else quantizer.hold_off)(self._holder)
        return run_seeded(self._model, inputs, self._devices)

    def run_plain(self, inputs: Mapping[str, Any]) -> Any:
        """The float model's outputs."""
        return self.run(inputs, ())

    def run_kept(self, inputs: Mapping[str, Any], chosen: Iterable[str]) -> tuple[Any, Kept]:
        """The same, and what the encoder layers and the linears gave."""
        products = self._shortcut.keeps = KeptProducts()
        try:
            with kept_outputs(self._layers) as layers:
                return self.run(inputs, chosen), Kept(layers, products)
        finally:
            self._shortcut.keeps = None

    def run_after(self, inputs: Mapping[str, Any], chosen: Iterable[str], kept: Kept, skipped: Iterable[str]) -> Any:
        """The same, without running the ``skipped`` layers, which give what is kept of them, as linears do."""
        self._shortcut.uses = kept.products
        try:
            with without_running(self._layers, kept.layers, skipped):
                return self.run(inputs, chosen)
        finally:
            self._shortcut.uses = None

    def run_float(self, inputs: Mapping[str, Any]) -> tuple[Any, Kept]:
        """The float model's outputs and those of its layers, and the calibrators see what comes by."""
        for name, tops in self._tops.items():
            self._measured[name]._calibrator, self._measured[name]._if_calib = tops, True
        outputs, kept = self.run_kept(inputs, ())
        for name in self._tops:
            self._measured[name]._if_calib = False
        return outputs, kept

    def depends(self, inputs: Mapping[str, Any], outputs: Any, kept: Kept) -> bool:
        """Whether the float model's outputs are others if all layers but the last one are not run."""
        if len(kept.layers.order) < 2 or not kept.layers.usable:
            return True
        return not same_tensors(outputs, self.run_after(inputs, (), kept, kept.layers.order[:-1]))


@contextmanager
def borrowed(
    model: PreTrainedModel, measured: Mapping[str, TensorQuantizer], tops: Mapping[str, ChannelTops]
) -> Iterator[Borrowed]:
    """The model in eval mode, without gradients and without its calibrators; afterwards it is as it was.

    Raises:
        CalibrationError: Something else has borrowed it.
    """
    how = Shortcut()
    made = Borrowed(model, measured, tops, how)
    every = list(quantizers(model).values())
    before = [(each, each._calibrator, each._if_calib) for each in every]

    def put_back() -> None:
        made.let_go()
        for each, calibrator, calibrating in before:
            each._calibrator, each._if_calib = calibrator, calibrating

    with only_borrower(model, every), kept_modes(model), put_back_after(put_back):
        for each in every:
            each._if_calib = False
        model.eval()
        with torch.inference_mode(False), torch.no_grad(), _faster(model, how):
            yield made


@contextmanager
def _faster(model: nn.Module, how: Shortcut) -> Iterator[None]:
    """Neither weights nor ranges change meanwhile. What is compiled runs as it is: it would be compiled anew."""
    compiled = any(getattr(each, "_compiled_call_impl", None) is not None for each in model.modules())
    with _weights_rounded_once(model):
        if compiled:
            yield
            return
        with integer_products(model), shortcut(model, how):
            yield


@contextmanager
def _weights_rounded_once(model: nn.Module) -> Iterator[None]:
    """Each linear keeps its rounded weight."""
    linears = [each for each in model.modules() if isinstance(each, QuantLinear) and each._weight_quantizer is not None]

    def put_back() -> None:
        for linear in linears:
            linear.__dict__.pop(_ROUNDED, None)

    with put_back_after(put_back):
        for linear in linears:
            linear.__dict__[_ROUNDED] = _rounded_once(linear, linear.quantized_weight)
        yield


def _rounded_once(linear: QuantLinear, rounded: Callable[[], Tensor]) -> Callable[[], Tensor]:
    kept: list[Tensor] = []

    def weight() -> Tensor:
        if linear._weight_quantizer is None or not linear._weight_quantizer.quantizes:
            return rounded()
        if not kept:
            kept.append(rounded())
        return kept[0]

    return weight
