"""The ``quantization_config`` of a converted model: what ``from_pretrained`` takes and ``config.json`` keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from qdq_surgery.checkpoint.quantizer_states import Folded, Record, expanded_names, folded_names
from qdq_surgery.errors import ModelError, RuleFileError
from qdq_surgery.rules.json_data import rules_from_data, rules_to_data
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.rules.yaml_file import load_rules, shipped_rules
from qdq_surgery.safety.untrusted import DamagedError, Item, quoted

__all__ = ["FROZEN_METHOD", "QUANT_METHOD", "FrozenConfig", "QDQConfig"]

#: The name under which transformers knows this kind of quantization.
QUANT_METHOD = "qdq_surgery"

#: The same of models whose weights are integers: a release before them says that it does not know it.
FROZEN_METHOD = "qdq_surgery_frozen"

#: Version of the form in ``config.json``.
_SCHEMA = 1


@register_quantization_config(QUANT_METHOD)
class QDQConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How a model is converted.

    ``AutoModelForX.from_pretrained(float_checkpoint, quantization_config=QDQConfig("linear-only"))`` converts while it
    loads. A converted model has one as ``model.config.quantization_config``, and ``save_pretrained`` keeps it.

    Args:
        rules: A shipped rule set, the path of a rule file, or a rule set.
        record: What a saved model says about its quantizers; ``None`` for a model that is to be converted.

    Raises:
        RuleFileError: The rules are wrong.
    """

    method: ClassVar[str] = QUANT_METHOD

    def __init__(self, rules: str | Path | RuleSet = "qdqbert", record: Record | None = None) -> None:
        super().__init__(self.method)
        self.rules = load_rules(rules)
        self.record = record
        #: Called when a config with this one in it is written, once.
        self.once_written: Callable[[], None] | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, QDQConfig) and self.to_dict() == other.to_dict()

    def get(self, name: str, default: Any = None) -> Any:
        """One entry of :meth:`to_dict`, or ``default``: transformers asks so for a loaded model's config."""
        return self.to_dict().get(name, default)

    def __deepcopy__(self, _: dict[int, Any]) -> QDQConfig:
        # Rules and record do not change, and transformers copies configs several times while it loads one.
        return copy.copy(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What :meth:`to_dict` gave; called by transformers.

        Raises:
            RuleFileError: The rules are wrong.
            ModelError: It is of another version, or damaged.
        """
        data = {str(name): value for name, value in config_dict.items() if name != "quant_method"}
        schema = data.pop("schema", _SCHEMA)
        if schema != _SCHEMA:
            raise ModelError(
                f"the model's quantization_config has schema {quoted(schema)}, and this release of qdq_surgery reads "
                f"{_SCHEMA}; install the release that wrote it"
            )
        rules = data.pop("rules", "qdqbert")
        made = cls._made(_rules(rules), data)
        return (made, kwargs) if return_unused_kwargs else made

    @classmethod
    def _made(cls, rules: RuleSet, data: dict[str, Any]) -> QDQConfig:
        return cls(rules, _record(data) if data else None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        written, self.once_written = self.once_written, None
        if written is not None:
            written()
        record = {} if self.record is None else self.record.to_data()
        return {"quant_method": self.method, "schema": _SCHEMA, "rules": rules_to_data(self.rules), **record}


@register_quantization_config(FROZEN_METHOD)
class FrozenConfig(QDQConfig):
    """What a frozen model was: how it was converted, and which weights are integers in its files.

    Args:
        rules, record: As of the quantized model.
        integers: The quantizers of these weights, folded.

    Raises:
        ModelError: It is not of a saved model.
    """

    method: ClassVar[str] = FROZEN_METHOD

    def __init__(
        self, rules: str | Path | RuleSet = "qdqbert", record: Record | None = None, integers: Folded | None = None
    ) -> None:
        super().__init__(rules, record)
        if record is None or not integers:
            raise ModelError(
                f"a quantization_config with '{FROZEN_METHOD}' is what a saved frozen model has; to freeze a model, "
                "call qdq_surgery.freeze"
            )
        self.integers = integers

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able data."""
        return {**super().to_dict(), "integers": dict(self.integers)}

    @classmethod
    def _made(cls, rules: RuleSet, data: dict[str, Any]) -> FrozenConfig:
        stated = Item(data.pop("integers", {}), "quantization_config.integers")
        record = _record(data) if data else None
        try:
            integers = folded_names(stated)
            unknown = set(expanded_names(stated, integers)) - set(() if record is None else record.names())
            if unknown:
                raise DamagedError(f"{stated.where} has {quoted(min(unknown))}, which is not in sites")
        except DamagedError as error:
            raise ModelError(f"config.json is damaged: {error}; save the model again") from None
        return cls(rules, record, integers)


def _rules(given: Any) -> RuleSet:
    """The rules that a config states: in full, or by the name of a shipped rule set.

    Raises:
        RuleFileError: They are neither. A config comes with a model, from a stranger: it may not name files to read.
    """
    if isinstance(given, RuleSet):
        return given
    if not isinstance(given, str):
        return rules_from_data(given)
    shipped = shipped_rules()
    if given not in shipped:
        raise RuleFileError(
            f"the rules of the model's quantization_config are '{given[:60]}', which is no shipped rule set",
            f"write one of {', '.join(shipped)}, or give the rules: quantization_config=QDQConfig(rules=...)",
        )
    return load_rules(given)


def _record(data: dict[str, Any]) -> Record:
    try:
        return Record.from_data(Item(data, "quantization_config"))
    except DamagedError as error:
        raise ModelError(
            f"config.json is damaged: {error}; save the model again, or remove all of its quantization_config but "
            "'quant_method' and 'rules', which converts the model anew"
        ) from None
