"""Each part of a converted model alone in INT8, and alone in float: the error at the model's output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from qdq_surgery.calibration.batches import NO_BATCHES, check_batches, counted
from qdq_surgery.calibration.collect import check_free, unwrapped
from qdq_surgery.errors import CalibrationError, OptionError
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.safety.given_flags import check_flags
from qdq_surgery.sensitivity.outlier_channels import ChannelTops, Tokens, outliers
from qdq_surgery.sensitivity.output_error import Judge, Metric, judge_of, token_mask
from qdq_surgery.sensitivity.parts import KIND, LAYER, SITE, Part, parts_of, sees_channels, sites_of
from qdq_surgery.sensitivity.result import Cost, Sensitivity
from qdq_surgery.sensitivity.resume_file import Figures, identity, open_figures
from qdq_surgery.sensitivity.runs.borrowed import Borrowed, Kept, borrowed
from qdq_surgery.sensitivity.runs.length_groups import length_groups
from qdq_surgery.surgery.model_state import quantizers
from qdq_surgery.text.progress import track

__all__ = ["sensitivity"]

#: The names of the figures of the whole model.
_FLOAT, _INT8 = "float", "int8"


def sensitivity(
    qmodel: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    metric: str | Metric | None = None,
    *,
    sites: bool = True,
    kinds: bool = True,
    layers: bool = True,
    resume: str | Path | None = None,
) -> Sensitivity:
    """Measure what each part of a calibrated model costs at its output: alone in INT8, and alone left in float.

    A part is a site (one quantizer; a linear's input and its weight are two), a kind of sites (those of one rule and
    operand in all layers, such as ``residual-add(local)``), or an encoder layer. The errors of parts do not add up:
    what is to be left in float together has to be measured together. (Squared errors of the tensors at the sites would
    be quicker to have, and rank the sites wrongly.)

    What does not change is not run again: layers and linears before the part give what they gave, and weights are
    rounded once. Linears whose operands are both in INT8 multiply integers where the machine has a kernel. The figures
    are those of whole runs, but for the rounding of such products, which are exact where float32 is not. Rows run
    together with others of their length, unless the model's outputs depend on the padding beside them, or the metric
    is the user's.

    Args:
        qmodel: A converted, calibrated model, alone or in DistributedDataParallel, ``torch.compile`` or a PEFT model.
            It is left as it was.
        batches: Keyword arguments of the model's forward, such as a tokenizer gives. Padding does not count.
        metric: ``"mse"``, squared error as a share of the squares of the float model's output, which holds for every
            output and is meant if this is left out; ``"cosine"``, 1 - the mean cosine of tokens or rows; ``"kl"``,
            Kullback-Leibler divergence of the logits' probabilities, in nats. Or a function of the model's outputs and
            of its inputs, those without columns that are padding in all rows, to a number of which more is better, such
            as accuracy; its mean over the batches counts by their rows, and the table shows by how much it falls.
        sites: Whether to measure each site, which takes by far the longest.
        kinds: Whether to measure each kind of sites.
        layers: Whether to measure each encoder layer.
        resume: A JSON file that keeps the figures while they are made. If it is there, the measurement goes on from it.

    Returns:
        The table, the largest error first, with the outlier channels of what each site sees.

    Raises:
        CalibrationError: No quantizer is enabled, one has no range, there are no batches, or one cannot be used.
        ModelError: The model is not converted.
        OptionError: The metric is none, or not for such a model; nothing is to be measured; a flag is neither true nor
            false; or ``resume`` is of another model, of other rules, ranges, batches or of another metric: says which.
    """
    check_flags(sites=sites, kinds=kinds, layers=layers)
    check_batches(batches)
    judge = judge_of(metric)
    wanted = [what for what, asked in ((SITE, sites), (KIND, kinds), (LAYER, layers)) if asked]
    if not wanted:
        raise OptionError("sites, kinds and layers are all False, so nothing is to be measured; leave one of them True")
    model = unwrapped(qmodel)
    check_free(model)  # whoever has borrowed the quantizers may have them off
    measured = _measured(model)
    parts = parts_of(model, measured, wanted)
    figures = open_figures(resume, identity(model, judge.identity, measured) if resume is not None else {})
    tokens = Tokens()
    # (Of two texts it cannot be told which a tensor belongs to.)
    seen = {} if getattr(model.config, "is_encoder_decoder", False) else sites_of(model, measured)
    tops = {name: ChannelTops(tokens) for name, site in seen.items() if sees_channels(site)}
    with figures.kept(), borrowed(model, measured, tops) as trial:
        run = _Measurement(model, trial, judge, figures, parts, tokens, tuple(measured))
        total = len(batches) * len(run.names) if isinstance(batches, Sized) else None
        for _ in track(run.figures_of(batches), "measuring", total):
            figures.write_at_times()
    return _result(run, {name: each.tops for name, each in tops.items()})


def _measured(model: PreTrainedModel) -> dict[str, TensorQuantizer]:
    found = {name: each for name, each in quantizers(model).items() if each.quantizes}
    if not found:
        raise CalibrationError(
            "no quantizer quantizes, so the model is in float: enable() those that are to be measured, and call this "
            "outside of quantization_disabled"
        )
    without = [name for name, each in found.items() if each.amax is None]
    if without:
        raise CalibrationError(
            f"{len(without)} of {len(found)} quantizers have no range (first: {without[0]}); calibrate the model "
            "(qdq_surgery.calibrate), or disable them"
        )
    return found


@dataclass
class _Measurement:
    model: PreTrainedModel
    trial: Borrowed
    judge: Judge
    figures: Figures
    parts: list[Part]
    tokens: Tokens
    every: tuple[str, ...]
    rows: int = 0
    tokens_seen: int = 0
    batches: float = 0.0

    @property
    def names(self) -> list[str]:
        return [_FLOAT, _INT8, *(name for part in self.parts for name in (part.alone, part.left))]

    def figures_of(self, batches: Iterable[Mapping[str, Any]]) -> Iterator[None]:
        """Group by group, so that only one has its layers' outputs kept; as often as there are figures of batches."""
        done, said, index = 0.0, 0, -1
        run = None if self.judge.own else self.trial.run_plain
        for index, group in enumerate(length_groups(self.model, batches, run)):
            self.figures.begin(index, group.inputs)
            try:
                for _ in self._group(index, group.inputs):
                    done += group.batches
                    yield from [None] * (round(done) - said)
                    said = round(done)
            except CalibrationError as error:
                raise CalibrationError(f"{group.name}: {error}") from error
            rows, tokens = counted(group.inputs)
            self.batches += group.batches
            self.rows, self.tokens_seen = self.rows + rows, self.tokens_seen + tokens
        if index < 0:
            raise CalibrationError(NO_BATCHES)
        self.figures.end(index + 1, self.names)

    def _group(self, index: int, inputs: Mapping[str, Any]) -> Iterator[None]:
        missing = set(self.figures.missing(index, self.names))
        self.tokens.mask = token_mask(self.model, inputs)
        outputs, plain = self.trial.run_float(inputs)
        figure = self.judge.begin(self.model, inputs, outputs)
        if _FLOAT in missing:
            self.figures.add(_FLOAT, figure)
        yield from [None] * (len(self.names) - len(missing) + (_FLOAT in missing))
        if not missing - {_FLOAT}:
            return
        reusable = not self.trial.depends(inputs, outputs, plain)
        outputs, rounded = self.trial.run_kept(inputs, self.every)
        if _INT8 in missing:
            self.figures.add(_INT8, self.judge.figure(outputs))
            yield
        for part in self.parts:
            rest = tuple(name for name in self.every if name not in set(part.quantizers))
            for name, chosen, kept in ((part.alone, part.quantizers, plain), (part.left, rest, rounded)):
                if name in missing:
                    self.figures.add(name, self._figure(part, inputs, chosen, kept, reusable))
                    yield

    def _figure(
        self, part: Part, inputs: Mapping[str, Any], chosen: Iterable[str], kept: Kept, reusable: bool
    ) -> tuple[float, float]:
        skipped = kept.layers.before(part.homes) if reusable else ()
        return self.judge.figure(self.trial.run_after(inputs, chosen, kept, skipped))


def _result(run: _Measurement, tops: Mapping[str, Any]) -> Sensitivity:
    plain, sign = run.figures.value(_FLOAT), -1.0 if run.judge.own else 1.0

    def error(name: str) -> float:
        return sign * (run.figures.value(name) - plain)

    costs = []
    for part in run.parts:
        alone, left = error(part.alone), error(part.left)
        layer = None if part.layer is None else str(part.layer)
        named = {} if part.what == LAYER else outliers(tops.get(name) for name in part.quantizers)
        gain = error(_INT8) - left
        costs.append(Cost(part.what, part.name, layer, len(part.quantizers), alone, left, gain, named))
    costs.sort(key=lambda cost: -cost.alone)
    counts = round(run.batches), run.rows, run.tokens_seen
    return Sensitivity(run.judge.name, tuple(costs), plain if run.judge.own else None, error(_INT8), *counts)
