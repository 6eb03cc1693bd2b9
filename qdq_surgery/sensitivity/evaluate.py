"""What a quantized model, or a file that was made from it, loses against the float model: on texts that nobody saw."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sized
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qdq_surgery.calibration.batches import NO_BATCHES, check_batches, counted, prepared
from qdq_surgery.calibration.collect import only_borrower, unwrapped
from qdq_surgery.errors import CalibrationError, LossError, ModelError, OptionError
from qdq_surgery.numerics.real_numbers import is_number
from qdq_surgery.padding.token_masks import is_label, token_means
from qdq_surgery.safety.transaction import kept_modes
from qdq_surgery.sensitivity.output_error import (
    DEFAULT,
    METRICS,
    compared_rows,
    is_score,
    main_outputs,
    real_rows,
    summed,
    token_mask,
)
from qdq_surgery.sensitivity.runs.borrowed import gpus_of, run_seeded
from qdq_surgery.surgery.model_state import quantization_disabled, quantizers
from qdq_surgery.text.progress import track
from qdq_surgery.text.view import Column, Line, Part, Result, Table, data_words, line, number

__all__ = ["Evaluation", "evaluate", "nearest_texts"]

_HIDDEN = "last_hidden_state"

#: Texts whose nearest ones are looked for at a time.
_SLICE = 1024

#: What each figure says.
_WORDS = {
    "mse": "squared error of the output, as a share of the output's squares",
    "cosine": "1 - mean cosine of the output's rows",
    "kl": "divergence of the classes' probabilities, in nats",
    "worst_cosine": "lowest cosine of a row",
    "same_answer": "share of rows whose highest score is of the same class",
    "text_cosine": "mean cosine of the texts' embeddings (means of their tokens)",
    "worst_text_cosine": "lowest cosine of a text",
    "same_nearest_text": "share of texts whose nearest other text is the same",
}


@dataclass(frozen=True, repr=False)
class Evaluation(Result):
    """What :func:`evaluate` found.

    Attributes:
        model: The class of the float model.
        metric: Which figure is :attr:`loss`: ``mse``, ``cosine`` or ``kl``.
        figures: By name. ``mse``, and where rows of the output have more than one number ``cosine`` and
            ``worst_cosine``; of scores ``kl`` and ``same_answer``; of hidden states ``text_cosine``,
            ``worst_text_cosine`` and, of three texts or more, ``same_nearest_text``.
        batches, rows, tokens: How much data it was; padding is no token.
        runtime: What the candidate ran on, such as ``"PyTorch"`` or ``"onnxruntime 1.31.1"``; ``None`` if it does not
            say.
        file: The name of the file that was judged; ``None`` if it was a model.
    """

    model: str
    metric: str
    figures: Mapping[str, float]
    batches: int
    rows: int
    tokens: int
    runtime: str | None = None
    file: str | None = None

    @property
    def where(self) -> str:
        """What was judged, in words: ``in PyTorch``, ``as model.onnx on onnxruntime 1.31.1``; empty if nobody says."""
        if self.file is not None:
            return f"as {self.file} on {self.runtime}"
        return "" if self.runtime is None else f"in {self.runtime}"

    @property
    def loss(self) -> float:
        """The figure of the metric that was asked for: 0 where nothing was lost."""
        return self.figures[self.metric]

    def require(self, loss: float) -> None:
        """Nothing, if the loss is at most that: for a CI that gates on quality.

        Raises:
            LossError: It is more.
            OptionError: ``loss`` is no such number.
        """
        if not is_number(loss) or not 0 <= loss < math.inf:
            raise OptionError(f"a loss of at most {loss!r} cannot be asked for; give a number from 0 on")
        if not self.loss <= loss:
            raise LossError(
                f"{self.model} loses {self.loss:.4g} against float ({self.metric}: {_WORDS[self.metric]}), and at most "
                f"{loss:g} is asked for; see what costs it (sensitivity), find better rules (tune), or train"
            )

    def to_json(self) -> dict[str, Any]:
        """As plain data; ``schema`` is the version of this form."""
        return {"schema": 1, **asdict(self), "figures": dict(self.figures), "loss": self.loss}

    def _title(self) -> Line:
        data = data_words(self.batches, self.rows, self.tokens)
        judged = " ".join(filter(None, (self.model, self.where)))
        return line(f"{judged} against float, on {data}: ", (f"{self.metric} {self.loss:.3g}", "bold"))

    def _parts(self) -> Iterable[Part]:
        rows = tuple((name, _shown(name, value), _WORDS[name]) for name, value in self.figures.items())
        yield Table((Column("figure", wraps=False), number("value"), Column("what it is")), rows)


def evaluate(
    candidate: Any,
    batches: Iterable[Mapping[str, Any]],
    reference: nn.Module | None = None,
    metric: str | None = None,
) -> Evaluation:
    """Compare a converted model, or a file made from one, with the float model at its output.

    Bring texts that were not calibrated on. Padding does not count. Both run in eval mode, without gradients, with the
    same random numbers; models are left as they were.

    Args:
        candidate: A converted model, alone or wrapped, or a frozen one; or what :func:`~qdq_surgery.load_onnx` opened;
            or anything else that takes the same keyword arguments and returns outputs of the same names.
        batches: Keyword arguments of the model's forward, such as a tokenizer gives.
        reference: The float model. Left out, the converted model itself with its quantizers off, which is that to the
            bit.
        metric: Which figure is the loss: ``mse`` if left out, ``cosine``, or ``kl`` for models with logits.

    Returns:
        The figures; :meth:`Evaluation.require` fails a build that loses too much.

    Raises:
        CalibrationError: There are no batches, or one cannot be used or judged.
        ModelError: There is no float model: no reference is given, and the candidate is no converted model; or the
            reference is none of Hugging Face.
        OptionError: There is no such metric, or it is not for such outputs.
    """
    chosen = DEFAULT if metric is None else metric
    if not isinstance(chosen, str) or chosen not in METRICS:
        raise OptionError(f"the metric {metric!r} is none; give {', '.join(map(repr, METRICS))}")
    module = candidate if isinstance(candidate, nn.Module) else None
    plain = unwrapped(module) if reference is None and module is not None else reference
    if not isinstance(plain, PreTrainedModel):
        raise ModelError(
            f"there is no float model to compare a {type(candidate).__name__} with; pass reference=, the Hugging Face "
            "model that it was made from"
        )
    check_batches(batches)
    # (Of the labels of an encoder-decoder its decoder's inputs are made.)
    needed = ("labels",) if getattr(plain.config, "is_encoder_decoder", False) else ()
    found = _Sums(plain)
    total = len(batches) if isinstance(batches, Sized) else None
    models = [plain] if module is None else [plain, module]
    # Who looked at the model meanwhile, in another thread, would see it in float, and count float against itself.
    every = list({id(each): each for model in models for each in quantizers(model).values()}.values())
    with only_borrower(plain, every), kept_modes(*models), torch.no_grad():
        for model in models:
            model.eval()
        for index, batch in enumerate(track(batches, "comparing", total)):
            inputs = prepared(plain, batch, index)
            try:
                with quantization_disabled(plain) if quantizers(plain) else nullcontext():
                    wanted = run_seeded(plain, inputs, gpus_of(plain))
                found.add(inputs, wanted, _outputs(candidate, module, inputs, needed))
            except CalibrationError as error:
                raise CalibrationError(f"batch {index}: {error}") from error
    figures = found.figures()
    if chosen not in figures:
        raise OptionError(
            f"metric='{chosen}' is not for the outputs of {type(plain).__name__}; take one of "
            f"{', '.join(repr(name) for name in METRICS if name in figures)}"
        )
    runtime, file = _judged(candidate)
    return Evaluation(type(plain).__name__, chosen, figures, *found.counts, runtime, file)


def _judged(candidate: Any) -> tuple[str | None, str | None]:
    """What it runs on, and the name of the file that it is."""
    if isinstance(candidate, nn.Module):
        return "PyTorch", None
    path, runs_on = getattr(candidate, "path", None), getattr(candidate, "runs_on", None)
    return (runs_on, path.name) if isinstance(path, Path) and isinstance(runs_on, str) else (None, None)


def _outputs(candidate: Any, module: nn.Module | None, inputs: Mapping[str, Any], needed: Container[str]) -> Any:
    """What the candidate makes of a batch; a file, which has no loss, is not given the labels for it."""
    if module is not None:
        device = next((each.device for each in itertools.chain(module.parameters(), module.buffers())), None)
        on = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        return run_seeded(module, on, gpus_of(module))
    kept = {name: value for name, value in inputs.items() if not is_label(name) or name in needed}
    try:
        return candidate(**{name: value.cpu() if isinstance(value, Tensor) else value for name, value in kept.items()})
    except ModelError as error:  # of a file that does not take it
        raise CalibrationError(str(error)) from error


@dataclass
class _Sums:
    """What is added up over the batches."""

    model: PreTrainedModel
    counts: tuple[int, int, int] = (0, 0, 0)
    sums: dict[str, tuple[float, float]] = field(default_factory=dict)
    lowest: float = 1.0
    texts: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, inputs: Mapping[str, Any], wanted: Any, found: Any) -> None:
        """Take note of a batch: its inputs, what the float model gives for it, and what the other one does."""
        pairs = itertools.zip_longest(main_outputs(wanted), main_outputs(found), fillvalue=("nothing", torch.empty(0)))
        for (name, one), (other_name, other) in pairs:
            if name != other_name or one.shape != other.shape:
                raise CalibrationError(
                    f"the float model returns {name} with the shape {tuple(one.shape)}, the other {other_name} with "
                    f"{tuple(other.shape)}; compare models with the same head"
                )
            self._compare(inputs, name, one.float(), other.to(one.device).float())
        rows, tokens = counted(inputs)
        self.counts = (self.counts[0] + 1, self.counts[1] + rows, self.counts[2] + tokens)

    def _compare(self, inputs: Mapping[str, Any], name: str, wanted: Tensor, found: Tensor) -> None:
        for metric in METRICS:
            if metric == "kl" and not is_score(name):
                continue
            rows = [compared_rows(self.model, inputs, name, each, metric) for each in (wanted, found)]
            if metric != "mse" and rows[0].shape[1] < 2:  # a single number has no direction, and a probability of 1
                continue
            for each, whose in zip(rows, ("the float model", "what is compared with it"), strict=True):
                if not bool(each.isfinite().all()):
                    raise CalibrationError(f"{name} of {whose} has a NaN or an infinite value")
            self._count(metric, summed(metric, rows[1], rows[0]))
            if metric == "cosine":
                cosines = functional.cosine_similarity(rows[0], rows[1], dim=1)
                both_zero = (rows[0] == 0).all(1) & (rows[1] == 0).all(1)
                self.lowest = min(self.lowest, float(cosines.masked_fill(both_zero, 1.0).min()))
            if metric == "kl":
                same = rows[0].argmax(1) == rows[1].argmax(1)
                self._count("same_answer", (float(same.sum()), float(len(same))))
        if name == _HIDDEN:
            self.texts.append((_pooled(self.model, inputs, wanted), _pooled(self.model, inputs, found)))

    def _count(self, name: str, more: tuple[float, float]) -> None:
        total, weight = self.sums.get(name, (0.0, 0.0))
        self.sums[name] = (total + more[0], weight + more[1])

    def figures(self) -> dict[str, float]:
        """All of them, by name.

        Raises:
            CalibrationError: There were no batches.
        """
        if not self.counts[0]:
            raise CalibrationError(NO_BATCHES)
        made = {name: total / weight if weight else total for name, (total, weight) in self.sums.items()}
        if "cosine" in made:
            made["worst_cosine"] = self.lowest
        if self.texts and all(len(each) for pair in self.texts for each in pair):
            made.update(_of_texts(*(torch.cat(each) for each in zip(*self.texts, strict=True))))
        return {name: made[name] for name in _WORDS if name in made}


def _pooled(model: PreTrainedModel, inputs: Mapping[str, Any], values: Tensor) -> Tensor:
    """(texts, channels): the mean of each text's tokens, of length 1; empty if it cannot be told which these are."""
    mask = token_mask(model, inputs)
    if values.ndim != 3 or real_rows(values, mask) is None:
        return values.new_empty(0, 0)
    weights = values.new_ones(values.shape[:2]) if mask is None else mask.reshape(values.shape[:2])
    texts = weights.any(1)
    return functional.normalize(token_means(values[texts], weights[texts]), dim=-1).cpu()


def _of_texts(wanted: Tensor, found: Tensor) -> Iterator[tuple[str, float]]:
    cosines = (wanted * found).sum(-1)
    yield "text_cosine", float(cosines.mean())
    yield "worst_text_cosine", float(cosines.min())
    if len(wanted) > 2:  # of two texts, each is the nearest of the other
        yield "same_nearest_text", float((nearest_texts(wanted) == nearest_texts(found)).float().mean())


def nearest_texts(embeddings: Tensor) -> Tensor:
    """(texts,): for each text the number of the one, of all others, whose embedding is nearest.

    Args:
        embeddings: (texts, channels), each of length 1.
    """
    found = []
    for start in range(0, len(embeddings), _SLICE):  # all at once they would take the memory of texts x texts
        near = embeddings[start : start + _SLICE] @ embeddings.T
        near.diagonal(start).fill_(-2.0)
        found.append(near.argmax(-1))
    return torch.cat(found)


def _shown(name: str, value: float) -> str:
    return f"{value:.4f}" if "cosine" in name and name != "cosine" else f"{value:.3g}"
