"""What was saved against what is made: sites, ranges and states of a checkpoint, by their names in the model."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming
from transformers.utils import logging

from qdq_surgery.checkpoint.quantizer_states import Record, misfit
from qdq_surgery.checkpoint.range_files import Misfit, read_roundings
from qdq_surgery.errors import MatchError, ModelError
from qdq_surgery.match.plan import Plan
from qdq_surgery.match.site_names import LINEAR_NAMES
from qdq_surgery.quantize.misfits import rounding_misfit
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.surgery.apply import Implant
from qdq_surgery.text.layer_names import fold, layer_in

__all__ = [
    "Names",
    "check_fits",
    "check_known",
    "check_ranges",
    "check_sites",
    "refused_tables",
    "roundings_of",
    "take_state",
]

logger = logging.get_logger(__name__)


class Names:
    """Names in a checkpoint against those in the model: a head's may have the base model's prefix, or lack it."""

    def __init__(self, model: PreTrainedModel, known: Mapping[str, Any]) -> None:
        self.model, self.prefix, self.known = model, f"{model.base_model_prefix}.", known

    def here(self, name: str) -> str:
        """The name of a quantizer of the saved model; where there is none, that of its place, if there is one."""
        if name in self.known:
            return name
        candidates = (name, self.prefix + name, name.removeprefix(self.prefix))
        known = next((each for each in candidates if each in self.known), None)
        return known or next((each for each in candidates if each.rpartition(".")[0] in self._modules), name)

    def loaded(self, name: str) -> str:
        """The same by the name in a file, which transformers may have been told to change."""
        for conversion in getattr(self.model, "_weight_conversions", None) or ():
            if isinstance(conversion, WeightRenaming):
                name = conversion.rename_source_key(name)[0]
        return self.here(name)

    @functools.cached_property
    def _modules(self) -> set[str]:
        return {name for name, _ in self.model.named_modules()}


def check_sites(record: Record, plan: Plan, model: PreTrainedModel) -> None:
    """Whether the rules still find the sites that were saved.

    In another class than the saved one (the bare model of a head, a head on a bare model), sites in modules that it
    lacks go with them, so do tables that it shares with a linear in float, and sites that the saved one did not have
    are new.

    Raises:
        MatchError: They do not; names the sites.
    """
    layers = {site.quantizer: site.layer for site in plan.sites}
    names = Names(model, layers)
    saved = {names.here(name) for name in record.names()}
    lost, new = saved - layers.keys(), layers.keys() - saved
    if record.model != type(model).__name__:
        modules = {name for name, _ in model.named_modules()} - refused_tables(plan)
        lost = {name for name in lost if name.rpartition(".")[0] in modules}
        new = set()
    if lost or new:
        parts = [
            f"{what.format(len(sites))}: {', '.join(_listed(sites, layers))}"
            for what, sites in (("do not find {} of them", lost), ("find {} beyond them", new))
            if sites
        ]
        made = ", ".join(f"{name} {version}" for name, version in record.versions.items())
        raise MatchError(
            f"the checkpoint's rules '{plan.rules.name}' no longer fit {type(model).__name__}: of the "
            f"{len(saved)} quantizers that it was saved with (by {made}) they {'; and they '.join(parts)}. Load it "
            "with the versions that saved it and the config.json that was saved, or convert the float model again and "
            "calibrate it"
        )


def _listed(sites: set[str], layers: Mapping[str, int | None]) -> list[str]:
    folded = fold({name: layers.get(name, layer_in(name)) for name in sorted(sites)})
    listed = [name if where is None else f"{name} (layers {where})" for name, where in folded.items()]
    return [*listed[:6], f"and {len(listed) - 6} more kinds"] if len(listed) > 6 else listed


def refused_tables(plan: Plan) -> set[str]:
    """The embeddings of a plan whose tables stay in float although a rule is about them."""
    return {each.path for each in plan.refusals if each.operator == "embedding" and each.rule is not None}


def check_known(
    found: Mapping[str, TensorQuantizer],
    ranges: Mapping[str, Tensor],
    model: PreTrainedModel,
    left: Collection[str] = (),
) -> None:
    """Whether the rules make a quantizer for each range; of modules that the model lacks, such as another head, none.

    Args:
        left: Paths of modules whose quantizers were left out knowingly.

    Raises:
        ModelError: They do not; names the first range.
    """
    beyond = ranges.keys() - found.keys()
    if not beyond:
        return
    modules = {name for name, _ in model.named_modules()}.difference(left)
    unknown = sorted(name for name in beyond if name.rpartition(".")[0] in modules)
    if unknown:
        raise ModelError(
            f"the checkpoint has ranges of {len(unknown)} quantizers that its rules do not make (first: {unknown[0]}); "
            "it was written under other rules, or under another version of transformers"
        )


def check_fits(implants: Iterable[Implant], ranges: Mapping[str, Tensor], zeros: bool) -> None:
    """Whether each range is one of its quantizer: of its shape, and not zero where there is something to quantize.

    Args:
        zeros: Whether one of them is zero somewhere.

    Raises:
        ModelError: One is not; names it.
    """
    for each in implants:
        amax = None if each.site is None else ranges.get(each.site.quantizer)
        if each.site is None or each.quantizer is None or amax is None:
            continue
        problem = misfit(each.quantizer, each.name, amax, each.owner, zeros=zeros)
        if problem is not None:
            raise ModelError(
                f"the checkpoint's range of {each.site.quantizer} does not fit: {problem}; its files are not those "
                "that were saved together, or were changed"
            )


def check_ranges(
    found: Mapping[str, TensorQuantizer], ranges: Mapping[str, Tensor], record: Record, names: Names
) -> None:
    """Whether each quantizer that was saved with a range has one; says which quantizers are new.

    Raises:
        ModelError: One has none; names it.
    """
    without = {names.here(name) for name in record.names("without_range")}
    saved = {names.here(name) for name in record.names()}
    missing = sorted(name for name in found.keys() & saved if name not in ranges and name not in without)
    if missing:
        raise ModelError(
            f"the checkpoint has no range for {len(missing)} quantizers that were calibrated when it was saved (first: "
            f"{missing[0]}); its files are not those that were saved together"
        )
    new = sorted(found.keys() - saved)
    if new:
        logger.warning(
            f"{len(new)} quantizers are new in this model and have no range yet (first: {new[0]}); calibrate it"
        )


def roundings_of(
    implants: Iterable[Implant],
    ranges: Mapping[str, Tensor],
    roundings: Mapping[str, str],
    record: Record | None,
    names: Names,
) -> dict[str, Tensor]:
    """What weights are moved by before they are rounded, by the name of the quantizer.

    Args:
        ranges: By the name of the quantizer.
        roundings: The file of each, by the name of its quantizer in the file.

    Raises:
        ModelError: One is missing, is not that of its weight, or is not named in the config; names it.
    """
    wanted = set() if record is None else {names.here(name) for name in record.names("rounded")}
    stored = {names.loaded(name): (name, path) for name, path in roundings.items()}
    made = {each.site.quantizer: each for each in implants if each.site is not None}
    for what, odd in (
        ("no adapted rounding of {}, which was saved with one", wanted - stored.keys()),
        ("an adapted rounding of {}, of which its config says nothing", stored.keys() - wanted),
        ("an adapted rounding of {}, and no range", wanted - ranges.keys()),
    ):
        if odd & made.keys():
            raise ModelError(
                f"the checkpoint has {what.format(min(odd & made.keys()))}; its files are not those that were saved "
                "together"
            )
    by_file: dict[str, dict[str, Misfit]] = {}
    here = {stored[name][0]: name for name in sorted(wanted & made.keys())}
    for there, name in here.items():
        by_file.setdefault(stored[name][1], {})[there] = _misfit(made[name])
    found = [read_roundings(path, misfits) for path, misfits in by_file.items()]
    return {here[there]: value for each in found for there, value in each.items()}


def _misfit(implant: Implant) -> Misfit:
    weight = cast("Tensor", implant.owner.weight).shape if implant.name == LINEAR_NAMES["weight"] else None
    return functools.partial(rounding_misfit, weight=weight)


def take_state(
    found: Mapping[str, TensorQuantizer], ranges: Mapping[str, Tensor], record: Record, names: Names
) -> None:
    """Make each quantizer what it was when it was saved: disabled, without a range, with one that is learned."""
    # Rules or descriptors may have given them what they no longer had.
    for name in map(names.here, record.names("without_range")):
        if name in found and name not in ranges:
            found[name].reset_amax()
    learns = {name for name, each in found.items() if each.learns}
    if learns:
        saved, learned = ({names.here(name) for name in record.names(what)} for what in ("sites", "learned"))
        for name in learns & saved - learned:
            found[name].learn_amax(False)
    steps = {
        "disabled": TensorQuantizer.disable,
        "quant_disabled": TensorQuantizer.disable_quant,
        "learned": TensorQuantizer.learn_amax,
    }
    for what, step in steps.items():
        for name in record.names(what):
            if names.here(name) in found:
                step(found[names.here(name)])
