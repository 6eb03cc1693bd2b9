"""The plan of a saved model, kept with its weights, so that loading need not look for the sites again.

It stands in the metadata of the safetensors files and holds only under the circumstances it was made in: the same
modelling code, the same config, the same rules. Under any others it is passed over, and the rules are matched anew.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytorch_quantization
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from qdq_surgery.converted import plan_of
from qdq_surgery.linear import QuantLinear
from qdq_surgery.plan import Plan
from qdq_surgery.plan_data import folded_sites, known_from_data, known_to_data, plan_from_data, plan_to_data
from qdq_surgery.quantizer import TensorQuantizer
from qdq_surgery.rewritten import Rewritten
from qdq_surgery.rule_data import rules_to_data
from qdq_surgery.spec import RuleSet
from qdq_surgery.surgery import Known, base_class
from qdq_surgery.version import __version__

__all__ = ["METADATA", "Lock", "fingerprint", "lock_of", "read_lock"]

#: Its key in the metadata of a safetensors file.
METADATA = "qdq_surgery"

#: What a config says that makes no difference to where an operator stands.
_BESIDE = (
    "architectures",
    "dtype",
    "torch_dtype",
    "id2label",
    "label2id",
    "model_type",  # an attribute of its own only where the config was read from a file
    "problem_type",
    "quantization_config",
    "transformers_version",
)


@dataclass(frozen=True)
class Lock:
    """A plan, and of each block that it rewrites the places that it has seen."""

    plan: Plan
    known: Known


def fingerprint(model: PreTrainedModel, rules: RuleSet, modules: Mapping[str, nn.Module]) -> str:
    """What a plan depends on: code, config, rules, modules. A converted model has that of its float model.

    Args:
        modules: The model's modules by name.
    """
    own = vars(model.config).items()
    config = {name: value for name, value in own if name not in _BESIDE and not name.startswith("_")}
    classes = [(name, _plain_class(module)) for name, module in modules.items()]
    facts = [
        [transformers.__version__, torch.__version__, pytorch_quantization.__version__, __version__],
        list(sys.version_info[:2]),
        [model.config.model_type, config],
        rules_to_data(rules),
        [entry for entry in classes if entry[1] is not None],
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def _plain_class(module: nn.Module) -> str | None:
    if isinstance(module, TensorQuantizer):
        return None
    cls = nn.Linear if type(module) is QuantLinear else base_class(type(module))
    return f"{cls.__module__}.{cls.__qualname__}"


def lock_of(qmodel: PreTrainedModel) -> str:
    """The lock of a converted model, as JSON."""
    plan = plan_of(qmodel)
    layers = {site.owner: site.layer for site in plan.sites}
    known: dict[tuple[str, str], frozenset[Any]] = {}
    for name, module in qmodel.named_modules():
        for kind in ("forward", "attention"):
            rewritten = vars(module).get(f"_qdq_{kind}")
            if isinstance(rewritten, Rewritten):
                known[name, kind] = rewritten.known
    data = {
        "schema": 1,
        "fits": fingerprint(qmodel, plan.rules, dict(qmodel.named_modules())),
        "plan": plan_to_data(plan),
        "known": known_to_data(known, layers),
    }
    return json.dumps(data, separators=(",", ":"))


def read_lock(
    text: str | None,
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    rules: RuleSet,
    sites: Mapping[str, str | None],
) -> Lock | None:
    """The lock in a checkpoint; ``None`` if there is none, or none that holds for ``model``.

    Args:
        text: What :func:`lock_of` gave, from the metadata of the checkpoint's files.
        modules: The model's modules by name.
        sites: The sites that the checkpoint's config lists, see :func:`~qdq_surgery.layered.fold`.
    """
    try:
        data = None if text is None else json.loads(text)
        if not isinstance(data, Mapping) or data.get("schema") != 1:
            return None
        if data.get("fits") != fingerprint(model, rules, modules):
            return None
        if folded_sites(data["plan"]) != sites:
            return None
        order = {name: index for index, name in enumerate(modules)}
        return Lock(plan_from_data(data["plan"], rules, order.__getitem__), known_from_data(data["known"]))
    except (AttributeError, KeyError, TypeError, ValueError):
        return None  # it is no lock: the rules are matched anew, which needs none
