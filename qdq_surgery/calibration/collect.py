"""One pass over data: what every activation quantizer sees, in float, without the padding.

The model is borrowed: its quantizers get calibrators of this pass, and get everything back when the pass ends, however
it ends. What was seen is returned; nothing is set.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qdq_surgery.calibration.batches import NO_BATCHES, check_batches, counted, prepared
from qdq_surgery.calibration.distributed import agree, gather_histograms, gather_maxima, gather_moments, gather_sums
from qdq_surgery.errors import CalibrationError, ModelError
from qdq_surgery.numerics.grid import Grid
from qdq_surgery.numerics.histogram import Histogram
from qdq_surgery.numerics.range_choice import PERCENTILES, RANGE_METHODS, choose, takes_percentile
from qdq_surgery.numerics.range_methods import relative_error
from qdq_surgery.padding.call_padding import Padding
from qdq_surgery.quantize.calibrators import HistogramCalibrator, MaxCalibrator, MomentCalibrator, Watch
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.safety.given_flags import check_flags
from qdq_surgery.safety.random_state import kept_random, seed_generators
from qdq_surgery.safety.transaction import kept_modes, put_back_after
from qdq_surgery.surgery.model_state import check_module, plan_of, quantizers, refuse_lost
from qdq_surgery.text.progress import track
from qdq_surgery.text.view import Column, Line, Part, Result, Table, line, number

__all__ = [
    "Seen",
    "Statistics",
    "Weighted",
    "activation_quantizers",
    "check_free",
    "collect",
    "only_borrower",
    "planned_name",
    "refuse_borrowed",
    "unwrapped",
    "weight_quantizers",
]

#: A module whose weight has a quantizer of its own.
Weighted: TypeAlias = QuantLinear | QuantEmbedding

#: Seed of the dropout that rules may ask for.
_SEED = 0

#: The quantizers, by identity, that a collection has borrowed, and which one. What changes this are single operations
#: of a dict, which no thread comes between; a lock would stay locked after an interrupt.
_COLLECTING: dict[int, object] = {}


@dataclass(frozen=True)
class Seen:
    """What one quantizer saw.

    Attributes:
        histogram: Of all magnitudes; ``None`` if only the largest was kept.
        amax: The largest magnitude, float32: (), or one for each channel with 1 in every other axis.
        grid: That of the quantizer.
        moments: On the input of a linear, the sum of x x^T over all x, (channels, channels), float32; ``None`` if it
            was not asked for, or if there is no linear behind.
        lowest: Where the grid has a zero point, how large a range reaches down to the lowest value; of the shape of
            ``amax``.
    """

    histogram: Histogram | None
    amax: Tensor
    grid: Grid
    moments: Tensor | None = None
    lowest: Tensor | None = None

    @property
    def needed(self) -> Tensor:
        """The range in which all values lie, of the shape of ``amax``."""
        return self.amax if self.lowest is None else torch.maximum(self.amax, self.lowest)

    def reaching(self, amax: float) -> float:
        """A range for the whole tensor, made large enough to reach down to the lowest value."""
        return amax if self.lowest is None else max(amax, float(self.lowest))


@dataclass(frozen=True, repr=False)
class Statistics(Result):
    """What all activation quantizers saw in one pass, enough for every method.

    Attributes:
        seen: By qualified name of the quantizer.
        batches, rows, tokens: How much data it was; padding is no token.
    """

    seen: Mapping[str, Seen]
    batches: int
    rows: int
    tokens: int

    def compare(self, percentiles: Iterable[float] = PERCENTILES) -> dict[str, dict[str, Any]]:
        """By quantizer and method: ``amax`` and ``error``, the squared quantization error as a share of the squares.

        Quantizers with one range per channel have ``max`` only, and are left out.

        Args:
            percentiles: In percent, to compare beside max, entropy and mse.
        """
        wanted = [{"percentile": each} for each in percentiles]
        settings = [
            (name, options)
            for name, method in RANGE_METHODS.items()
            for options in (wanted if takes_percentile(name) else method.settings)
        ]
        found: dict[str, dict[str, Any]] = {}
        for name, seen in self.seen.items():
            if seen.histogram is None or seen.amax.numel() > 1:
                continue
            table = seen.histogram.table()
            for method, options in settings:
                amax, words = choose(seen.histogram, method, seen.grid, **options)
                amax = seen.reaching(amax)
                error = relative_error(*table, amax, seen.grid)
                found.setdefault(name, {})[words] = {"amax": amax, "error": error}
        return found

    def to_json(self) -> dict[str, Any]:
        """The comparison as plain data."""
        data = {"batches": self.batches, "rows": self.rows, "tokens": self.tokens}
        return {"schema": 1, **data, "quantizers": self.compare()}

    def _title(self) -> Line:
        about = "amax by method, * where the quantization error is least"
        return line(f"{self.tokens} tokens in {self.rows} rows; {about}")

    def _parts(self) -> Iterable[Part]:
        rows, compared = [], self.compare()
        for name, by_method in compared.items():
            best = min(by_method, key=lambda method: by_method[method]["error"])
            rows.append((name, *(f"{each['amax']:.4g}{'*' if m == best else ' '}" for m, each in by_method.items())))
        yield Table((Column("quantizer"), *map(number, next(iter(compared.values()), {}))), tuple(rows))


def collect(
    qmodel: nn.Module, batches: Iterable[Mapping[str, Any]], *, histograms: bool = True, moments: bool = False
) -> Statistics:
    """Run data through a converted model and keep what its activation quantizers see.

    Padding is not counted, in each text as its own mask tells it (``attention_mask`` for ``input_ids``,
    ``decoder_attention_mask`` for ``decoder_input_ids``, ``passage_mask`` for ``passage_ids``), and columns that are
    padding in a whole batch are not run. A model that lets padding into real tokens is warned of: its ranges depend on
    what stands there, as its outputs do.

    Under ``torch.distributed`` every process has to call this, each with batches of its own, and all get the statistics
    of all. A second collection of a model while one is running is refused.

    Args:
        qmodel: A converted model, alone or in DistributedDataParallel, ``torch.compile`` or a PEFT model. It is left as
            it was.
        batches: Keyword arguments of the model's forward, such as a tokenizer gives; tensors may be on any device.
        histograms: Whether to keep histograms, as all methods but ``max`` need them.
        moments: Whether to keep the second moments of what linears are given, as :func:`round_weights` needs them: a
            number of float32 for each pair of channels, 0.6 GB of BERT-base. Every linear of k inputs costs
            another product of k columns.

    Returns:
        By quantizer what it saw, in the units of its activation, for any number of :func:`calibrate`.

    Raises:
        CalibrationError: No quantizer is enabled, there are no batches, one cannot be used, an activation has a NaN or
            an infinite value, or a quantizer saw nothing, or it cannot be told what is padding in what one sees; names
            the quantizer and the batch.
        OptionError: A flag is neither true nor false.
    """
    check_flags(histograms=histograms, moments=moments)
    model = unwrapped(qmodel)
    watched = activation_quantizers(model)
    if not watched:
        raise CalibrationError(
            "no quantizer that sees activations is enabled; enable() those that are to be calibrated"
        )
    counts = [0, 0, 0]
    error: BaseException | None = None
    channels = _channels(model, watched) if moments else {}
    with _collecting(model, watched, histograms, channels) as watch:
        try:
            _run(model, batches, watched, watch, counts)
        except BaseException as raised:
            error = raised
        agree(error, list(watched))  # one process that fails must not leave the others waiting
        seen = _gathered(watched, channels, model.device)
    counts = gather_sums(counts, model.device)
    if not counts[2] and counts[1]:
        raise CalibrationError(
            f"all tokens of the {counts[1]} rows are padding: their attention_mask is 0 everywhere; give 1 for a token"
        )
    unseen = [name for name in watched if name not in seen]
    if unseen:
        raise CalibrationError(
            f"{len(unseen)} of {len(watched)} quantizers saw no value in {counts[0]} batches (first: {unseen[0]}); "
            "bring batches that reach them (cross-attention needs encoder_hidden_states), or disable or exclude them"
        )
    return Statistics(seen, *counts)


def unwrapped(qmodel: nn.Module) -> PreTrainedModel:
    """The converted model inside DistributedDataParallel, DataParallel, ``torch.compile`` or a PEFT model.

    Raises:
        ModelError: There is none, it has lost quantizers since it was converted, or its tensors are offloaded.
    """
    check_module(qmodel)
    model = qmodel
    while True:
        inner = getattr(model, "_orig_mod", None)
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = model.module
        elif callable(get_base_model := getattr(model, "get_base_model", None)):
            inner = get_base_model()
        if not isinstance(inner, nn.Module):
            break
        model = inner
    plan_of(model)
    refuse_lost(model, "the model")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise ModelError(
                f"{name} is not in memory (meta device), as in a model that accelerate has offloaded, and ranges set "
                "now would be lost; take the hooks off first: accelerate.hooks.remove_hook_from_submodules(model)"
            )
    assert isinstance(model, PreTrainedModel)
    return model


def weight_quantizers(model: nn.Module) -> dict[str, tuple[TensorQuantizer, Weighted]]:
    """The quantizers of linears' weights and of embeddings' tables that are enabled, each with its module."""
    return {
        f"{name}._weight_quantizer": (module._weight_quantizer, module)
        for name, module in model.named_modules()
        if isinstance(module, (QuantLinear, QuantEmbedding)) and module._weight_quantizer is not None
        if module._weight_quantizer.enabled
    }


def planned_name(name: str, quantizer: TensorQuantizer) -> str:
    """What the plan calls a quantizer: an adapter around its linear changes its path, and not this."""
    return name if quantizer.provenance is None else quantizer.provenance.quantizer


def activation_quantizers(model: nn.Module) -> dict[str, TensorQuantizer]:
    """The quantizers that are enabled and see something when the model runs: all but those of weights of modules.

    Among them is a constant that a block multiplies by; its role is a weight's, too.
    """
    weights = weight_quantizers(model)
    return {name: each for name, each in quantizers(model).items() if name not in weights and each.enabled}


def _channels(model: PreTrainedModel, watched: Mapping[str, TensorQuantizer]) -> dict[str, int]:
    """By name of the quantizers on inputs of linears with quantized weights, how many channels they see."""
    names = {id(quantizer): name for name, quantizer in watched.items()}
    return {
        names[id(linear._input_quantizer)]: linear.in_features
        for _, linear in weight_quantizers(model).values()
        if isinstance(linear, QuantLinear) and id(linear._input_quantizer) in names
    }


@contextmanager
def _collecting(
    model: PreTrainedModel, watched: Mapping[str, TensorQuantizer], histograms: bool, moments: Container[str] = ()
) -> Iterator[Watch]:
    """The model with fresh calibrators in ``watched``, in float, in eval mode; afterwards it is as it was."""
    every = list(quantizers(model).values())
    before = [(each, each._calibrator, each._if_calib, each._if_quant) for each in every]
    dropout = plan_of(model).rules.calibration.dropout
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    watch = Watch(Padding(model, watched))

    def put_back() -> None:
        for each, calibrator, calibrating, quantizing in before:
            each._calibrator, each._if_calib, each._if_quant = calibrator, calibrating, quantizing

    with only_borrower(model, every), kept_modes(model), put_back_after(put_back):
        for each in every:
            each._if_calib = each._if_quant = False
        for name, quantizer in watched.items():
            calibrator = quantizer.fresh_calibrator(histograms)
            calibrator.watch, calibrator.quantizer = watch, name
            quantizer._calibrator = MomentCalibrator(calibrator) if name in moments else calibrator
            quantizer._if_calib = True
        model.train(dropout)
        with torch.no_grad(), kept_random(devices):
            if dropout:
                seed_generators(_SEED, devices)
            yield watch


@contextmanager
def only_borrower(model: nn.Module, every: Sequence[TensorQuantizer]) -> Iterator[None]:
    """While this holds, nothing else of the package borrows these quantizers.

    Two collections at once would each take the other's calibrators for what was there before.

    Raises:
        CalibrationError: Something has borrowed one of them already.
    """
    own = object()

    def give_back() -> None:
        for each in every:
            if _COLLECTING.get(id(each)) is own:
                _COLLECTING.pop(id(each), None)

    with put_back_after(give_back):
        if any(_COLLECTING.setdefault(id(each), own) is not own for each in every):
            raise _busy(model)
        yield


def check_free(model: nn.Module) -> None:
    """Refuse what would look at quantizers that something of the package has borrowed.

    Raises:
        CalibrationError: As :func:`only_borrower`.
    """
    if _is_borrowed(model):
        raise _busy(model)


def _is_borrowed(model: nn.Module) -> bool:
    return any(id(each) in _COLLECTING for each in quantizers(model).values())


def _busy(model: nn.Module) -> CalibrationError:
    return CalibrationError(
        f"another collection or calibration of this {type(model).__name__} is running, or a measurement; wait for "
        "it, or give each thread a copy of the model"
    )


def refuse_borrowed(model: nn.Module, what: str) -> None:
    """Refuse what would keep a model as it is while something of the package has borrowed it.

    Args:
        what: What is asked for, a noun.

    Raises:
        ModelError: A collection or a measurement of it is running, in this thread or in another one.
    """
    if _is_borrowed(model):
        raise ModelError(
            f"this {type(model).__name__} is being calibrated or measured, with its quantizers off and watched; make "
            f"the {what} before that, or when it is over"
        )


def _run(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Any]],
    watched: Mapping[str, TensorQuantizer],
    watch: Watch,
    counts: list[int],
) -> None:
    check_batches(batches)
    total = len(batches) if isinstance(batches, Sized) else None
    for index, batch in enumerate(track(batches, "calibrating", total)):
        inputs = prepared(model, batch, index)
        try:
            watch.padding.begin(inputs)
        except (ModelError, CalibrationError) as error:
            raise CalibrationError(f"batch {index}: {error}") from None
        watch.seen.clear()
        try:
            model(**inputs)
        except CalibrationError as error:
            raise CalibrationError(f"batch {index}: {error}") from None
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise CalibrationError(f"batch {index}: {type(model).__name__} cannot run it: {error}") from error
        _check_finite(watched, watch.called, index)
        watch.settle(each._calibrator for each in watched.values())
        rows, tokens = counted(inputs)
        counts[0], counts[1], counts[2] = counts[0] + 1, counts[1] + rows, counts[2] + tokens
    watch.seen.clear()
    if counts[0] == 0:
        raise CalibrationError(NO_BATCHES)


def _check_finite(watched: Mapping[str, TensorQuantizer], called: Iterable[str], index: int) -> None:
    """One question to the device for a whole batch. ``called`` is in the order in which data came by."""
    found = [(name, amax) for name in called if (amax := _amax_of(_of_range(watched[name]))) is not None]
    if not found:
        return
    tops = torch.stack([amax.max() for _, amax in found]).cpu()
    if bool(tops.isfinite().all()):
        return
    name, top = next((name, float(top)) for (name, _), top in zip(found, tops, strict=True) if not top.isfinite())
    what = "a NaN" if top != top else "an infinite value"
    raise CalibrationError(f"batch {index} gives {what} at {name}; look for it in that batch or in the weights before")


def _of_range(quantizer: TensorQuantizer) -> Any:
    calibrator = quantizer._calibrator
    return calibrator.beside if isinstance(calibrator, MomentCalibrator) else calibrator


def _amax_of(calibrator: Any) -> Tensor | None:
    if isinstance(calibrator, HistogramCalibrator):
        return None if calibrator.histogram is None else calibrator.histogram.amax
    assert isinstance(calibrator, MaxCalibrator)
    return calibrator.top


def _gathered(
    watched: Mapping[str, TensorQuantizer], channels: Mapping[str, int], device: torch.device
) -> dict[str, Seen]:
    found: dict[str, Histogram | None] = {}
    maxima: dict[str, Tensor | None] = {}
    lows: dict[str, Tensor | None] = {}
    for name, quantizer in watched.items():
        calibrator = _of_range(quantizer)
        if isinstance(calibrator, HistogramCalibrator):
            found[name] = calibrator.histogram
        else:
            maxima[name] = calibrator.top
        if calibrator.lowest is not None:
            lows[name] = calibrator.lowest.top
    both: dict[str, tuple[Histogram | None, Tensor]] = {
        name: (histogram, histogram.amax) for name, histogram in gather_histograms(found, device).items()
    }
    both.update({name: (None, amax) for name, amax in gather_maxima(maxima, device).items()})
    lowest = gather_maxima(lows, device)
    moments = gather_moments({name: watched[name]._calibrator.moments for name in channels}, channels, device)
    seen = {}
    for name, quantizer in watched.items():
        histogram, top = both.get(name, (None, None))
        if top is not None and (histogram is None or histogram.total > 0):
            seen[name] = Seen(histogram, top, quantizer.grid, moments.get(name), lowest.get(name))
    return seen
