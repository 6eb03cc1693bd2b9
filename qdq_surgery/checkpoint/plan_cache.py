"""The plan of a saved model, kept with its weights, so that loading need not look for the sites again.

It stands in the metadata of the safetensors files and holds only under the circumstances it was made in (the same
modeling code, the same config, the same rules) and only whole: it is bound to its content by a digest. Otherwise it is
passed over, and the rules are matched anew.

Whoever writes a file can write its digest, too. So nothing in a lock is believed: its names are those that the rules
give, its modules are the model's, its operands are in the order of the patterns. What a forged lock can still do, to
exchange the two operands of an addition, is what a forged file does by exchanging their ranges.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytorch_quantization
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from qdq_surgery.graph.operators import is_plain_embedding, is_plain_linear
from qdq_surgery.match.plan import Plan
from qdq_surgery.match.plan_data import folded_sites, known_from_data, known_to_data, plan_from_data, plan_to_data
from qdq_surgery.quantize.embedding import QuantEmbedding
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.quantize.quantizer import TensorQuantizer
from qdq_surgery.rules.json_data import rules_to_data
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.safety.untrusted import DamagedError, Item, parse_json, quoted
from qdq_surgery.surgery.apply import Known, base_class
from qdq_surgery.surgery.model_state import plan_of, quantized_forwards
from qdq_surgery.version import __version__

__all__ = ["DIGEST", "METADATA", "Lock", "fingerprint", "lock_of", "read_lock"]

logger = logging.get_logger(__name__)

#: Version of the form. Up to 1 there was no digest.
_SCHEMA = 2

#: Its key in the metadata of a safetensors file.
METADATA = "qdq_surgery"

#: The key of its digest, SHA-256.
DIGEST = "qdq_surgery_sha256"

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

#: What a module was before it took quantizers.
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {QuantLinear: nn.Linear, QuantEmbedding: nn.Embedding}


@dataclass(frozen=True)
class Lock:
    """A plan, and of each block that it rewrites the places that it has seen."""

    plan: Plan
    known: Known


#: What passed all checks in this process, by the digest of its text and the fingerprint of the model that it was held
#: against, with the sites of its config: the same file for the same model is not checked again. The newest few.
_ACCEPTED: dict[tuple[str, str], tuple[dict[str, str | None], Lock]] = {}
_MOST_ACCEPTED = 8


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
    cls = _PLAIN.get(type(module)) or base_class(type(module))
    return f"{cls.__module__}.{cls.__qualname__}"


def lock_of(qmodel: PreTrainedModel) -> dict[str, str]:
    """The lock of a converted model, as entries of the metadata of its files."""
    plan = plan_of(qmodel)
    layers = {site.owner: site.layer for site in plan.sites}
    known = {
        (name, kind): rewritten.known
        for name, module in qmodel.named_modules()
        for kind, rewritten in quantized_forwards(module).items()
    }
    data = {
        "schema": _SCHEMA,
        "fits": fingerprint(qmodel, plan.rules, dict(qmodel.named_modules())),
        "plan": plan_to_data(plan),
        "known": known_to_data(known, layers),
    }
    text = json.dumps(data, separators=(",", ":"))
    return {METADATA: text, DIGEST: _digest(text)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def read_lock(
    metadata: Mapping[str, str],
    model: PreTrainedModel,
    modules: Mapping[str, nn.Module],
    rules: RuleSet,
    sites: Mapping[str, str | None],
) -> Lock | None:
    """The lock in a checkpoint; ``None`` if there is none, or none that holds for ``model``.

    Args:
        metadata: Of a checkpoint's files, with what :func:`lock_of` gave.
        modules: The model's modules by name.
        sites: The sites that the checkpoint's config lists, see :func:`~qdq_surgery.text.layer_names.fold`.
    """
    text = metadata.get(METADATA)
    if text is None:
        return None
    fits, digest = fingerprint(model, rules, modules), _digest(text)
    accepted = _ACCEPTED.get((digest, fits))
    if accepted is not None and metadata.get(DIGEST) == digest and accepted[0] == sites:
        return replace(accepted[1], plan=replace(accepted[1].plan, rules=rules))
    try:
        data = parse_json(text, f"the plan stored under '{METADATA}'")
        if isinstance(data.value, dict) and data.value.get("schema") != _SCHEMA:
            return None  # of another release
        fields = data.fields(("schema", "fits", "plan", "known"))
        if metadata.get(DIGEST) != digest:
            raise DamagedError(f"{data.where} is not what was saved: its digest is another")
        if fields["fits"].value != fits or folded_sites(fields["plan"]) != sites:
            return None  # made under other circumstances
        lock = _checked(fields, model, modules, rules)
    except DamagedError as error:
        logger.warning(f"{error}; the rules are matched anew, which needs none")
        return None
    while len(_ACCEPTED) >= _MOST_ACCEPTED:
        _ACCEPTED.pop(next(iter(_ACCEPTED)), None)
    _ACCEPTED[digest, fits] = dict(sites), lock
    return lock


def _checked(
    fields: Mapping[str, Item], model: PreTrainedModel, modules: Mapping[str, nn.Module], rules: RuleSet
) -> Lock:
    order = {name: index for index, name in enumerate(modules)}
    plan = plan_from_data(fields["plan"], rules, order.__getitem__)
    if (plan.model, plan.model_type) != (type(model).__name__, model.config.model_type):
        raise DamagedError(f"the stored plan is of {quoted(plan.model)} ({quoted(plan.model_type)})")
    for site in plan.sites:
        module = modules[site.owner]
        swapped = "linear" if is_plain_linear(module) else "embedding" if is_plain_embedding(module) else None
        if (site.operator if site.routine == "module" else None) != swapped:
            raise DamagedError(f"the stored plan puts {site.quantizer} into a {type(module).__name__}")
    known = known_from_data(fields["known"])
    for owner, _ in known:
        if owner not in modules:
            raise DamagedError(f"the stored plan knows operators of {quoted(owner)}, which the model has not")
    return Lock(plan, known)
