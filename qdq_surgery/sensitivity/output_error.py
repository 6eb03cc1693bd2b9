"""How far a model's output is from that of the float model, in one number, without what belongs to padded tokens."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from qdq_surgery.errors import CalibrationError, OptionError
from qdq_surgery.padding.token_masks import rows_of, texts_of

__all__ = [
    "DEFAULT",
    "METRICS",
    "Judge",
    "Metric",
    "Sum",
    "compared_rows",
    "is_by_token",
    "is_score",
    "judge_of",
    "main_outputs",
    "real_rows",
    "summed",
    "token_mask",
]

#: A user's own: outputs of the model and its inputs to a number, higher is better.
Metric: TypeAlias = Callable[[Any, Mapping[str, Any]], float]

#: A sum and what it is divided by; those of several batches are added.
Sum: TypeAlias = tuple[float, float]

#: Outputs that a model is used for, the first that it has counts; a loss is none.
_MAIN = (("last_hidden_state",), ("logits",), ("prediction_logits",), ("start_logits", "end_logits"))

#: Numbers that are compared at a time: in float64, the logits of a vocabulary would fill the memory.
_PIECE = 1 << 22

#: A logit of what cannot be chosen: its probability is 0.
_NEVER = -1e4


def squared_error(found: Tensor, wanted: Tensor) -> Sum:
    """Squared error, and the squares that it is a share of."""
    return float((found - wanted).square().sum()), float(wanted.square().sum())


def cosine_distance(found: Tensor, wanted: Tensor) -> Sum:
    """1 - cosine of the rows, and their number."""
    ours, theirs = found.norm(dim=1), wanted.norm(dim=1)
    lengths = ours * theirs
    product = torch.linalg.vecdot(found, wanted)
    cosine = torch.where(lengths > 0, product / lengths.clamp(min=torch.finfo(lengths.dtype).tiny), 0.0)
    return float((1.0 - cosine.masked_fill((ours == 0) & (theirs == 0), 1.0)).sum()), float(len(wanted))


def divergence(found: Tensor, wanted: Tensor) -> Sum:
    """Kullback-Leibler divergence of the probabilities in nats, and the number of rows."""
    ours, theirs = functional.log_softmax(found, 1), functional.log_softmax(wanted, 1)
    return float((theirs.exp() * (theirs - ours)).sum()), float(len(wanted))


#: By name; from rows of the output and those of the float model, (rows, channels) in float64.
METRICS: dict[str, Callable[[Tensor, Tensor], Sum]] = {
    "mse": squared_error,
    "cosine": cosine_distance,
    "kl": divergence,
}

#: It holds for every output, a single number too, and sees a wrong length as well as a wrong direction.
DEFAULT = "mse"


class Judge:
    """A metric, and what the float model gives for the batch that runs.

    Attributes:
        name: Of the metric.
        own: Whether the metric is the user's: then higher is better.
    """

    def __init__(self, metric: str | Metric) -> None:
        self.own = not isinstance(metric, str)
        self._metric = metric
        self.name = metric if isinstance(metric, str) else _name(metric)
        self._wanted = torch.empty(0)
        self._model: PreTrainedModel | None = None
        self._inputs: Mapping[str, Any] = {}

    @property
    def identity(self) -> str:
        """Its name and, as many functions are called ``<lambda>``, something of what it does."""
        code = getattr(self._metric, "__code__", None)
        if code is None:
            return self.name
        constants = [each for each in code.co_consts if isinstance(each, (str, bytes, int, float))]
        return f"{self.name} {zlib.crc32(repr((code.co_code, code.co_names, constants)).encode()):08x}"

    def begin(self, model: PreTrainedModel, inputs: Mapping[str, Any], outputs: Any) -> Sum:
        """A batch and the float model's outputs for it; returns the figure of these.

        Raises:
            CalibrationError: They cannot be judged.
            OptionError: The metric is for other models.
        """
        self._model, self._inputs = model, inputs
        if self.own:
            return self.figure(outputs)
        self._wanted = self._rows(outputs)
        if self.name != "mse" and self._wanted.shape[1] < 2:  # no direction, and a probability that is always 1
            raise OptionError(
                f"metric='{self.name}' compares several numbers, and {type(model).__name__} gives one a row: take 'mse'"
            )
        return 0.0, summed(self.name, self._wanted, self._wanted)[1]

    def figure(self, outputs: Any) -> Sum:
        """The sum of the batch, and what it is divided by.

        Raises:
            CalibrationError: It is no finite number.
        """
        if callable(self._metric):
            rows = float(rows_of(self._inputs, texts_of(self._inputs)))
            value = self._metric(outputs, self._inputs)
            try:
                score = float(value)
            except (TypeError, ValueError):
                raise OptionError(f"{self.name} returns a {type(value).__name__}, wanted a number") from None
            found = score * rows, rows
        else:
            found = summed(self.name, self._rows(outputs), self._wanted)
        if not all(map(math.isfinite, found)):
            raise CalibrationError(f"its {self.name} is {found[0]}; look for NaN and infinite values in the outputs")
        return found

    def _rows(self, outputs: Any) -> Tensor:
        assert self._model is not None
        parts = list(main_outputs(outputs))
        if self.name == "kl" and not all(map(is_score, (name for name, _ in parts))):
            raise OptionError(
                f"metric='kl' compares probabilities, and {type(self._model).__name__} has no logits but "
                f"'{parts[0][0]}'; take 'mse' or 'cosine'"
            )
        return torch.cat([compared_rows(self._model, self._inputs, *part, self.name) for part in parts])


def summed(name: str, found: Tensor, wanted: Tensor) -> Sum:
    """A metric by its name over rows of the output and those of the float model, a piece at a time."""
    rows = max(1, _PIECE // max(1, wanted.shape[1]))
    pieces = [slice(start, start + rows) for start in range(0, len(wanted), rows)]
    sums = [METRICS[name](found[piece].double(), wanted[piece].double()) for piece in pieces]
    return math.fsum(total for total, _ in sums), math.fsum(weight for _, weight in sums)


def judge_of(metric: str | Metric | None) -> Judge:
    """The judge by a name or a function.

    Raises:
        OptionError: It is neither.
    """
    if metric is None:
        metric = DEFAULT
    if metric not in METRICS if isinstance(metric, str) else not callable(metric):
        raise OptionError(f"the metric {metric!r} is none; give {', '.join(map(repr, METRICS))} or a function")
    return Judge(metric)


def _name(metric: Metric) -> str:
    named = getattr(metric, "__qualname__", type(metric).__qualname__)
    return f"{getattr(metric, '__module__', '')}.{named}".lstrip(".")


def is_score(name: str) -> bool:
    """Whether an output of that name holds scores of classes, of which the highest is the answer."""
    return "logits" in name


def main_outputs(outputs: Any) -> Iterator[tuple[str, Tensor]]:
    """What of a model's outputs is compared, by name.

    Raises:
        CalibrationError: There is nothing.
    """
    if not isinstance(outputs, (Mapping, tuple, list)):
        raise CalibrationError(
            f"the model returns a {type(outputs).__name__}, wanted an output of transformers, a dict or a tuple"
        )
    named = outputs if isinstance(outputs, Mapping) else dict(zip(map(str, range(len(outputs))), outputs, strict=True))
    chosen = next((names for names in _MAIN if all(named.get(name) is not None for name in names)), None)
    floats = (n for n, v in named.items() if n != "loss" and isinstance(v, Tensor) and v.is_floating_point() and v.ndim)
    for name in chosen or [next(floats, "")]:
        if not isinstance(named.get(name), Tensor):
            raise CalibrationError("the model returns no tensor of numbers that could be compared; give a metric")
        yield name, named[name]


def token_mask(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor | None:
    """(rows, tokens), true for tokens of the text that the output is about; ``None`` if nothing is padded."""
    own = "decoder_attention_mask" if getattr(model.config, "is_encoder_decoder", False) else "attention_mask"
    text = next((each for each in texts_of(inputs) if each.mask == own), None)
    if text is None:
        return None
    mask: Tensor = (inputs[own] != 0).reshape(-1, text.length)
    return None if bool(mask.all()) else mask


def real_rows(values: Tensor, mask: Tensor | None) -> Tensor | None:
    """``values`` as (rows, channels), without padding; ``None`` if it cannot be told what in it is padding.

    Args:
        mask: As :func:`token_mask` gives it.
    """
    rows = values.reshape(-1, values.shape[-1])
    if mask is None or (values.ndim == 2 and len(values) != mask.numel()):
        return rows  # one row for each text
    return rows[mask.reshape(-1)] if len(rows) == mask.numel() else None


def compared_rows(model: PreTrainedModel, inputs: Mapping[str, Any], name: str, values: Tensor, metric: str) -> Tensor:
    """An output as (rows, channels), without padding: what a metric compares.

    Args:
        inputs: What the model was called with.
        name, values: As :func:`main_outputs` gives them.
        metric: One of :data:`METRICS`.

    Raises:
        CalibrationError: It cannot be told what in it is padding.
    """
    mask = token_mask(model, inputs)
    values = values.detach()
    if values.ndim == 1:
        values = values[:, None]
    if name in _MAIN[-1]:  # one number for each token, of which one is chosen
        filling = _NEVER if metric == "kl" else 0.0
        return values if mask is None or values.shape != mask.shape else values.masked_fill(~mask, filling)
    if values.ndim == 2 and is_by_token(model.config, inputs, values):
        values = values[..., None]
    rows = real_rows(values, mask)
    if rows is None:
        raise CalibrationError(
            f"{name} has the shape {tuple(values.shape)}, in which padding cannot be told from text; bring batches "
            "without padding (group texts by length), or a metric of your own"
        )
    return rows


def is_by_token(config: Any, inputs: Mapping[str, Any], values: Tensor) -> bool:
    """Whether scores, (rows, n, ...), are those of tokens, and not of classes.

    Args:
        config: The model's.
        inputs: What it was called with.
    """
    tokens = any(tuple(values.shape[:2]) == text.shape for text in texts_of(inputs))
    return tokens and (values.ndim > 2 or values.shape[1] != getattr(config, "num_labels", None))
