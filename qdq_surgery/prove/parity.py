"""The certificate: the file computes what the PyTorch model computes, site by site.

Fake-quantized values lie on a grid, so a difference in the last bit of a float becomes, at a value half-way between two
steps, a difference of a whole step, and one step leads to others further on. A comparison of the outputs alone can
therefore not tell a wrong scale from an unlucky tie. So each site is compared by itself: the runtime's value at every
site is fetched, PyTorch runs with these values in place of its own quantizers' results, and each quantizer's own result
is held against the runtime's. What differs then arose between two neighboring sites.

A site agrees if every element is the same but for elements that lie half-way between two steps, which may be one step
apart. With optimizations on, values inside are fused away; there the outputs are compared, which ties move, too:
:mod:`qdq_surgery.prove.output_distance` tells how far.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from qdq_surgery.calibration.collect import refuse_borrowed
from qdq_surgery.errors import ExportError, ParityError
from qdq_surgery.hf.config_facts import without_ffn_chunking
from qdq_surgery.onnx_file.metadata import Site
from qdq_surgery.onnx_file.opened import OnnxFile, open_exported
from qdq_surgery.prove.output_distance import Distances, Texts, distances, joined, other_texts, together
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.serve.intermediates import Runtime, probe, runtimes
from qdq_surgery.surgery.model_state import plan_of, quantization_disabled, quantizers, refuse_disabled
from qdq_surgery.targets.registry import DEFAULT, session_on
from qdq_surgery.text.view import Column, Line, Part, Result, Table, line

__all__ = ["Check", "Parity", "SiteCheck", "certify"]

#: How far from the middle between two steps a value may lie that two float computations round apart, in steps. A
#: float32 product of 3072 terms is off by about 1e-6 of its range, which is 127 steps wide. In half precision any
#: value may be.
_TIE = {torch.float32: 0.02, torch.float16: 1.0}
#: How far from the grid a runtime's value may lie, in steps: only the multiplication by the scale is between.
_OFF_GRID = {torch.float32: 2e-3, torch.float16: 0.25}
#: How far apart two values may always lie: by what half precision rounds the smallest scales, times 128.
_NOTHING = {torch.float32: 0.0, torch.float16: 2.0**-17}
#: Largest difference of outputs over their largest magnitude, when all quantizers agree.
_OUTPUT = {torch.float32: 1e-4, torch.float16: 2e-2}


@dataclass(frozen=True)
class SiteCheck:
    """One quantizer's values, the runtime's against PyTorch's own.

    Attributes:
        quantizer: Its name.
        elements: How many there were.
        ties: How many lie half-way between two steps and were rounded the other way.
        wrong: How many differ otherwise.
        worst: The largest difference, in steps.
    """

    quantizer: str
    elements: int
    ties: int
    wrong: int
    worst: float


@dataclass(frozen=True)
class Check:
    """A runtime in one mode against PyTorch.

    Attributes:
        runtime: In words.
        version: Of the runtime.
        sites: In the order of the graph; none where optimizations fuse them away.
        outputs: For each output the largest difference over its largest magnitude. Site by site: with the runtime's
            values at all sites. Optimized: with PyTorch's own, so that ties count.
        share: Optimized: the norm of the outputs' difference over the norm of what quantization changes.
        error: Optimized: the distance to the float model's outputs over that of PyTorch's quantized ones.
        agrees: The verdict.
    """

    runtime: str
    version: str
    sites: tuple[SiteCheck, ...]
    outputs: dict[str, float]
    share: float | None
    error: float | None
    agrees: bool

    @property
    def first(self) -> SiteCheck | None:
        """The first site that diverges."""
        return next((site for site in self.sites if site.wrong), None)

    def words(self) -> str:
        """The verdict in a sentence."""
        if self.agrees:
            return "agrees"
        if self.first is not None:
            site = self.first
            return (
                f"diverges first at {site.quantizer}: {site.wrong} of {site.elements} values differ, by up to "
                f"{site.worst:.3g} steps"
            )
        worst = max(self.outputs, key=lambda name: self.outputs[name])
        if self.share is not None and self.error is not None:
            return (
                f"differs from PyTorch by {self.share:.0%} of what quantization changes, and from the float model by "
                f"{self.error:.2f} x what PyTorch does"
            )
        return f"every site agrees, and the output '{worst}' differs by {self.outputs[worst]:.1e} of its magnitude"


@dataclass(frozen=True, repr=False)
class Parity(Result):
    """The certificate of one file.

    Attributes:
        model: Name of the model's class, with its head.
        checks: One for each runtime and mode.
        left_out: Runtimes that were not asked, and why.
    """

    model: str
    checks: tuple[Check, ...]
    left_out: tuple[str, ...] = field(default=())

    @property
    def agrees(self) -> bool:
        """Whether every check does."""
        return all(check.agrees for check in self.checks)

    def require(self) -> None:
        """Nothing, if all agree.

        Raises:
            ParityError: Names the runtime and the first site that diverges.
        """
        failed = [check for check in self.checks if not check.agrees]
        if failed:
            # Where a site is known, its name says more than what became of the outputs.
            check = next((check for check in failed if check.first is not None), failed[0])
            raise ParityError(
                f"{self.model} on {check.runtime} is not the PyTorch model: {check.words()}; nothing is wrong with "
                "your model, the file or the runtime is: report it, or export with parity=False to look at the file"
            )

    def to_json(self) -> dict[str, Any]:
        """All of it, and the verdict; ``schema`` is the version of this form."""
        return {"schema": 1, "agrees": self.agrees, **asdict(self)}

    def _title(self) -> Line:
        return line((f"parity of {self.model} with PyTorch", "bold"))

    def _parts(self) -> Iterable[Part]:
        numbers = [Column(name, right=True) for name in ("sites", "values", "ties", "outputs differ by", "error")]
        yield Table((Column("runtime"), *numbers, Column("verdict")), tuple(map(_row, self.checks)))
        yield (
            "ties: values half-way between two steps, rounded the other way. error: distance to the float model over "
            "that of PyTorch's quantized one."
        )
        yield from (f"not checked: {reason}" for reason in self.left_out)


def _row(check: Check) -> tuple[str, ...]:
    return (
        f"{check.runtime} {check.version}",
        str(len(check.sites)) if check.sites else "fused",
        f"{sum(site.elements for site in check.sites):,}" if check.sites else "",
        f"{sum(site.ties for site in check.sites):,}" if check.sites else "",
        f"{max(check.outputs.values()):.1e}",
        "" if check.error is None else f"{check.error:.2f} x",
        check.words(),
    )


def certify(
    qmodel: PreTrainedModel,
    path: str | Path | OnnxFile,
    inputs: Mapping[str, Any],
    asked: Sequence[str] = (DEFAULT,),
) -> Parity:
    """Compare a file with the model it was exported from.

    Args:
        qmodel: The model, in eval mode, in the precision of the file.
        path: The file, or one that is opened.
        inputs: Keyword arguments for both.
        asked: Names of runtimes.

    Returns:
        Each runtime's outputs beside the model's, and what each quantizer gives on it; ``agrees`` says whether all do.

    Raises:
        ModelError: A runtime is not installed; or the model is in ``quantization_disabled``, or is being calibrated or
            measured.
        ExportError: A runtime cannot run the file, or the file is of another model.
    """
    plan_of(qmodel)
    refuse_borrowed(qmodel, "certificate")
    refuse_disabled(qmodel, "certify")
    for name in asked:
        session_on(name).package("the parity certificate")
    arrays = _arrays_of(inputs)
    file = path if isinstance(path, OnnxFile) else open_exported(path)
    named = {name for site in file.sites for name in (*site.quantizers, site.divided) if name is not None}
    missing = sorted(named - set(quantizers(qmodel)))
    if missing:
        raise ExportError(
            f"{file.path} is of another model: this {type(qmodel).__name__} has no quantizer {missing[0]}"
        )
    checks = []
    for name in asked:
        modes = runtimes(name)
        for mode in modes:
            if mode.optimized:
                checks.append(_outputs_alone(qmodel, file, inputs, mode))
            if mode is modes[0]:
                checks.append(_site_by_site(qmodel, file, inputs, arrays, mode))
    return Parity(type(qmodel).__name__, tuple(checks))


def _site_by_site(
    qmodel: PreTrainedModel,
    file: OnnxFile,
    inputs: Mapping[str, Any],
    arrays: Mapping[str, NDArray[Any]],
    runtime: Runtime,
) -> Check:
    values = list(
        dict.fromkeys(
            site.value
            for site in file.sites
            if site.role != "weight" or site.quantize is not None or site.rows is not None
        )
    )
    found = {**probe(file, arrays, values, runtime), **file.weights}
    forced = _Forced(qmodel, file.sites, found)
    with forced:
        outputs = _differences(_run(qmodel, inputs), found)
    tolerance = _OUTPUT[_precision(qmodel)]
    checked = tuple(forced.checks)
    agrees = not any(site.wrong for site in checked) and all(value <= tolerance for value in outputs.values())
    words = runtime.words if not runtime.optimized else f"{runtime.words}, site by site"
    return Check(words, runtime.version, checked, outputs, None, None, agrees)


def _outputs_alone(qmodel: PreTrainedModel, file: OnnxFile, inputs: Mapping[str, Any], runtime: Runtime) -> Check:
    """Each output by itself; the figures are those of the one that is farthest off."""
    texts = other_texts(inputs)
    outputs, found = _apart(qmodel, file, next(texts), runtime)
    same = _OUTPUT[_precision(qmodel)]
    # What quantization changes, and ties may be why; or it is no number, and then nothing is less than it.
    open_ones = [name for name, each in found.items() if not (outputs[name] <= same or each.near)]
    if open_ones:
        others = list(texts)
        more = [_apart(qmodel, file, each, runtime)[1] for each in (together(others) if file.any_batch else others)]
        found |= {name: joined([found[name], *(each[name] for each in more)]) for name in open_ones}
    agrees = all(found[name].near or found[name].explained for name in open_ones)
    told = open_ones or [max(outputs, key=lambda name: outputs[name])]
    worst = max((found[name] for name in told), key=lambda each: each.nearness)
    return Check(runtime.words, runtime.version, (), outputs, worst.share, worst.nearness, agrees)


def _apart(
    qmodel: PreTrainedModel, file: OnnxFile, texts: Texts, runtime: Runtime
) -> tuple[dict[str, float], dict[str, Distances]]:
    found, wanted = probe(file, _arrays_of(texts.inputs), (), runtime), _run(qmodel, texts.inputs)
    with quantization_disabled(qmodel):
        floating = _run(qmodel, texts.inputs)
    return _differences(wanted, found), distances(found, wanted, floating, texts.new)


def _arrays_of(inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    return {name: value.detach().cpu().numpy() for name, value in inputs.items() if isinstance(value, Tensor)}


class _Forced:
    """While it holds, every quantizer returns what the runtime has in its place, and is held against it."""

    def __init__(self, qmodel: PreTrainedModel, sites: Sequence[Site], values: Mapping[str, NDArray[Any]]) -> None:
        self._model, self._modules = qmodel, quantizers(qmodel)
        self._values, self._kind = values, _precision(qmodel)
        self._sites: dict[str, list[Site]] = {}
        for site in sites:
            for name in site.quantizers:
                self._sites.setdefault(name, []).append(site)
        self._calls = Counter[tuple[str, int]]()
        self._hooks: list[Any] = []
        self.checks: list[SiteCheck] = []

    def __enter__(self) -> _Forced:
        for name, sites in self._sites.items():
            module: nn.Module = self._modules[name]
            replace: Callable[..., Tensor] = self._replace
            if sites[0].rows is not None:
                module, replace = self._model.get_submodule(name.rpartition(".")[0]), self._replace_rows
            hook = module.register_forward_hook(
                lambda module, inputs, output, name=name, replace=replace: replace(name, module, inputs[0], output)
            )
            self._hooks.append(hook)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _replace(self, name: str, quantizer: TensorQuantizer, inputs: Tensor, output: Tensor) -> Tensor:
        site = self._site(name, output)
        value = self._values[site.value].astype(np.float32) / np.float32(site.factor)
        theirs = torch.from_numpy(value.T.copy() if site.transposed else value).reshape(output.shape)
        if site.scaled and quantizer.channel_scale is not None:
            theirs = theirs * quantizer.channel_scale.cpu()
        behind = None if site.divided is None else self._modules[site.divided].channel_scale
        if behind is not None:
            theirs = theirs * behind.cpu()[:, None]
        scale = _scale(quantizer, quantizer._get_amax(inputs))
        self.checks.append(self._compare(name, scale, inputs.float().cpu(), output.float().cpu(), theirs, site))
        return theirs.to(output)

    def _replace_rows(self, name: str, embedding: QuantEmbedding, rows: Tensor, output: Tensor) -> Tensor:
        """The same of the rows that are looked up in a table."""
        site = self._site(name, output)
        value = self._values[site.value].astype(np.float32)
        theirs = torch.from_numpy(value).reshape(output.shape)
        given = functional.embedding(rows, embedding.weight)
        scale = _scale(embedding._weight_quantizer, embedding.ranges_of(rows, given))
        self.checks.append(self._compare(name, scale, given.float().cpu(), output.float().cpu(), theirs, site))
        return theirs.to(output)

    def _site(self, name: str, output: Tensor) -> Site:
        """The place of this call: a layer that runs several times has one for each run, but one for a weight.

        What it is given need not come in the order of the file's graph: a linear of DeBERTa's projects tokens, and then
        a table of positions.
        """
        places = self._sites[name]
        size = output.numel()
        fitting = [site for site in places if self._values[site.value].size == size]
        if not fitting:
            given = self._values[places[0].value].size
            raise ExportError(f"the file is of another model: it has {given} values at {name}, and this model {size}")
        call = self._calls[name, size]
        self._calls[name, size] += 1
        return fitting[min(call, len(fitting) - 1)]

    def _compare(self, name: str, scale: Tensor, inputs: Tensor, ours: Tensor, theirs: Tensor, site: Site) -> SiteCheck:
        steps = (theirs - ours) / scale
        whole = steps.round()
        on_grid = (steps - whole).abs() <= _OFF_GRID[self._kind]
        place = inputs / scale
        near_tie = (place - place.floor() - 0.5).abs() <= _TIE[self._kind]
        same = on_grid & (whole == 0) | ((theirs - ours).abs() <= _NOTHING[self._kind] / min(site.factor, 1.0))
        tied = on_grid & (whole.abs() == 1) & near_tie
        wrong = ~(same | tied) | steps.isnan()
        return SiteCheck(
            name, inputs.numel(), int(tied.sum()), int(wrong.sum()), float(steps.abs().nan_to_num(torch.inf).max())
        )


def _scale(quantizer: TensorQuantizer, ranges: Tensor) -> Tensor:
    amax = ranges.detach().float().cpu()
    return quantizer.grid.step(amax).clamp(min=float(np.finfo(np.float32).tiny))


def _run(model: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False), without_ffn_chunking(model):
        returned = model(**inputs)
    return {name: value for head, part in returned.items() for name, value in _arrays(head, part)}


def _arrays(name: str, value: Any) -> Iterator[tuple[str, NDArray[Any]]]:
    if isinstance(value, Tensor):
        yield name, value.float().cpu().numpy()
    elif isinstance(value, (tuple, list)):
        for at, each in enumerate(value):
            yield from _arrays(f"{name}.{at}", each)


def _differences(wanted: Mapping[str, NDArray[Any]], found: Mapping[str, NDArray[Any]]) -> dict[str, float]:
    """For each output, the largest difference over the largest magnitude.

    Raises:
        ExportError: The file gives others.
    """
    made = {}
    for name, value in wanted.items():
        given = found[name].shape if name in found else "none"
        if given != value.shape:
            raise ExportError(
                f"the file is of another model: it gives {name} of the shape {given}, and this model {value.shape}"
            )
        magnitude = max(float(np.abs(value).max(initial=0.0)), float(np.finfo(np.float32).tiny))
        made[name] = float(np.abs(found[name].astype(np.float32) - value).max(initial=0.0)) / magnitude
    return made


def _precision(model: PreTrainedModel) -> torch.dtype:
    return model.dtype if model.dtype in _TIE else torch.float32
