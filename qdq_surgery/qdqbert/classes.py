"""QDQBERT's classes under their own names: transformers' BERT, converted by the rules ``qdqbert`` when it is made.

``QDQBertForX(config)`` converts itself. In ``from_pretrained`` it does not: there the config's ``quantization_config``
makes transformers convert the model before it loads the weights. What QDQBERT's forward took and BERT's no longer does
is put back, at :class:`QDQBertModel`, to which every head hands it on.
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForNextSentencePrediction,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    BertModel,
    BertTokenizerFast,
    PreTrainedConfig,
    PreTrainedModel,
)

from qdq_surgery.checkpoint.config import QUANT_METHOD
from qdq_surgery.checkpoint.plugin import adopt
from qdq_surgery.convert import convert
from qdq_surgery.errors import ModelError
from qdq_surgery.graph.shell_copy import hollow, real_tensors
from qdq_surgery.match.analyze import analyze, recordings_of
from qdq_surgery.qdqbert.head_mask import head_factors, masked_heads, times
from qdq_surgery.qdqbert.legacy_cache import as_cache
from qdq_surgery.rules.spec import RuleSet
from qdq_surgery.rules.yaml_file import load_rules
from qdq_surgery.surgery.apply import operate

__all__ = [
    "QDQBertConfig",
    "QDQBertForMaskedLM",
    "QDQBertForMultipleChoice",
    "QDQBertForNextSentencePrediction",
    "QDQBertForQuestionAnswering",
    "QDQBertForSequenceClassification",
    "QDQBertForTokenClassification",
    "QDQBertLMHeadModel",
    "QDQBertModel",
    "QDQBertPreTrainedModel",
]

_RULES = "qdqbert"

#: While ``from_pretrained`` runs: which ``quantization_config`` transformers converts by, the config's own or the
#: argument of the call. It does so only with the config's own if there are both.
_LOADING: ContextVar[Literal["", "config", "argument"]] = ContextVar("qdq_surgery_loading", default="")


def _default() -> dict[str, Any]:
    return {"quant_method": QUANT_METHOD, "rules": _RULES}


class QDQBertConfig(BertConfig):  # type: ignore[misc]
    """The config of a QDQBERT model: that of BERT with other token ids, and a ``quantization_config``.

    Arguments that are not in the signature are those of ``BertConfig``, ``is_decoder`` and ``add_cross_attention``
    among them. From a folder whose model type is ``bert``, what the folder leaves out has BERT's default.
    """

    model_type = "qdqbert"

    def __init__(
        self,
        vocab_size: int = 30522,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        hidden_act: str | Callable[..., Any] = "gelu",
        hidden_dropout_prob: float = 0.1,
        attention_probs_dropout_prob: float = 0.1,
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        initializer_range: float = 0.02,
        layer_norm_eps: float = 1e-12,
        use_cache: bool = True,
        pad_token_id: int | None = 1,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            intermediate_size=intermediate_size,
            hidden_act=hidden_act if isinstance(hidden_act, str) else "gelu",
            hidden_dropout_prob=hidden_dropout_prob,
            attention_probs_dropout_prob=attention_probs_dropout_prob,
            max_position_embeddings=max_position_embeddings,
            type_vocab_size=type_vocab_size,
            initializer_range=initializer_range,
            layer_norm_eps=layer_norm_eps,
            use_cache=use_cache,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            **kwargs,
        )
        if not isinstance(hidden_act, str):
            self.__dict__["hidden_act"] = hidden_act  # BERT runs it, but its config lets no function through
        self._complete()

    def _complete(self) -> None:
        if getattr(self, "quantization_config", None) is None and _LOADING.get() != "argument":
            self.quantization_config = _default()

    @classmethod
    def of(cls, config: PreTrainedConfig) -> QDQBertConfig:
        """``config`` itself, or a QDQBERT config with all values of a BERT config.

        Raises:
            ModelError: It is the config of another architecture, or of a BERT that transformers 5 has no more.
        """
        if not isinstance(config, BertConfig):
            raise ModelError(
                f"found a {type(config).__name__}, wanted a QDQBertConfig or a BertConfig; another encoder is "
                "quantized by qdq_surgery.convert(model)"
            )
        positions = getattr(config, "position_embedding_type", None)
        if positions not in (None, "absolute"):
            raise ModelError(
                f"position_embedding_type is '{positions}', and transformers 5 dropped all but 'absolute'; a model "
                "that was trained with it needs transformers 4"
            )
        if isinstance(config, cls):
            return config
        made = cls()
        made.__dict__.clear()
        made.__dict__.update(copy.deepcopy(config.__dict__))
        made._complete()
        return made

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: Any, **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What a folder's config says, a BERT folder's as a QDQBERT config of the same meaning."""
        found, rest = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        if found.get("model_type") == BertConfig.model_type:
            # Else transformers warns of the mismatch; and the token ids that the file leaves out have other defaults.
            meant = BertConfig()
            ids = {name: getattr(meant, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
            found = {**ids, **found, "model_type": cls.model_type}
        return found, rest

    # transformers ties this flag to the attention implementation called "eager"; ours returns attentions as well.

    @property
    def output_attentions(self) -> bool:
        """Whether calls that do not say so return attentions."""
        return bool(self._output_attentions)

    @output_attentions.setter
    def output_attentions(self, value: bool) -> None:
        self._output_attentions = value

    def validate(self) -> None:
        """Check the values, as transformers does for BERT."""
        with _no_attentions(self):
            super().validate()


@contextmanager
def _no_attentions(config: Any) -> Iterator[None]:
    wanted, config._output_attentions = config._output_attentions, False
    try:
        yield
    finally:
        config._output_attentions = wanted


class QDQBertPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What QDQBERT's models share: they convert themselves when they are made from a config."""

    config_class = QDQBertConfig

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        given = QDQBertConfig.of(config)
        # transformers writes its choice of attention into the config that it builds from: into a copy, or the same
        # config would seem to ask for that choice the next time.
        super().__init__(given if _LOADING.get() else copy.deepcopy(given), *args, **kwargs)
        body = getattr(self, self.base_model_prefix, None)
        if body is not None:
            body.__class__ = QDQBertModel
            _announce(body.config)
        if _LOADING.get():
            self._wants_attentions, self.config._output_attentions = self.config._output_attentions, False
        else:
            self._convert()

    def _convert(self) -> None:
        found = self.config.quantization_config
        method, rules = (
            (found.get("quant_method"), found.get("rules"))
            if isinstance(found, Mapping)
            else (getattr(found, "quant_method", None), getattr(found, "rules", None))
        )
        if method != QUANT_METHOD:
            raise ModelError(
                f"config.quantization_config is of the method '{method}', which {type(self).__name__} does not know; "
                f"leave it out, or say {_default()}"
            )
        given = self.config
        with _no_attentions(given):
            if any(parameter.is_meta for parameter in self.parameters()):
                self._convert_without_data(load_rules(rules or _RULES))
            else:
                convert(self, rules or _RULES, inplace=True)
        self.config._output_attentions = given._output_attentions

    def _convert_without_data(self, rules: RuleSet) -> None:
        with real_tensors():
            twin = hollow(self)
            look, plan = analyze(twin, rules, None)
            operate(self, plan, recordings_of(twin, look, plan))
        adopt(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _announce(self.config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *model_args: Any,
        config: Any = None,
        quantization_config: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Load a checkpoint of BERT or of QDQBERT, and its ranges if it has any.

        Args:
            config: A QDQBERT or BERT config, or where to find one.
            quantization_config: In place of the rules ``qdqbert``.
            **kwargs: As for every model of transformers.
        """
        if isinstance(config, PreTrainedConfig):
            config = copy.deepcopy(QDQBertConfig.of(config))
            if quantization_config is not None and config.quantization_config == _default():
                config.quantization_config = None
        token = _LOADING.set("config" if quantization_config is None else "argument")
        try:
            found = super().from_pretrained(
                pretrained_model_name_or_path,
                *model_args,
                config=config,
                quantization_config=quantization_config,
                **kwargs,
            )
        finally:
            _LOADING.reset(token)
        model = found[0] if isinstance(found, tuple) else found  # with the loading info, if that was asked for
        model.config._output_attentions = model._wants_attentions
        del model._wants_attentions
        return found


def _announce(config: Any) -> None:
    """Let transformers know what it can record of a :class:`QDQBertModel`.

    It notes that by class when a model is initialized; one inside a head, or from a pickle, has been something else
    then, or nothing.
    """
    PreTrainedModel.__init__(QDQBertModel.__new__(QDQBertModel), config)


# ---------------------------------------------------------------------------------------------------- the arguments

_INPUTS = "input_ids attention_mask token_type_ids position_ids head_mask inputs_embeds"
_MEMORY = "encoder_hidden_states encoder_attention_mask"
_OUTPUTS = "output_attentions output_hidden_states return_dict"


def _takes(names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a forward QDQBERT's arguments, in its order: each may be left out, and ``None`` is left out."""
    order = names.split()
    kinds = inspect.Parameter
    signature = inspect.Signature(
        [
            kinds("self", kinds.POSITIONAL_OR_KEYWORD),
            *(kinds(name, kinds.POSITIONAL_OR_KEYWORD, default=None) for name in order),
            kinds("kwargs", kinds.VAR_KEYWORD),
        ]
    )

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            if len(args) > len(order):
                raise TypeError(f"forward takes at most {len(order)} positional arguments, {len(args)} were given")
            for name, value in zip(order, args, strict=False):
                if name in kwargs:
                    raise TypeError(f"forward got two values for '{name}'")
                kwargs[name] = value
            given = {name: value for name, value in kwargs.items() if value is not None or name not in order}
            return function(self, **given)

        forward.__doc__ = f"As QDQBERT's: {', '.join(order)}. More keywords are those of transformers' BERT."
        forward.__signature__ = signature  # type: ignore[attr-defined]
        return forward

    return decorate


# ------------------------------------------------------------------------------------------------------ the classes


class QDQBertModel(QDQBertPreTrainedModel, BertModel):  # type: ignore[misc]
    """The encoder (a decoder, if the config says so) without a head."""

    def __init__(self, config: PreTrainedConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer=add_pooling_layer)

    @_takes(f"{_INPUTS} {_MEMORY} past_key_values use_cache {_OUTPUTS}")
    def forward(
        self, head_mask: Any = None, past_key_values: Any = None, return_dict: bool | None = None, **kwargs: Any
    ) -> Any:
        layers = self.encoder.layer
        crosses = self.config.add_cross_attention and kwargs.get("encoder_hidden_states") is not None
        kwargs["past_key_values"] = as_cache(past_key_values, len(layers), crosses)
        if head_mask is None:
            output = BertModel.forward(self, return_dict=True, **kwargs)
        else:
            factors = head_factors(head_mask, len(layers), self.config.num_attention_heads, self.dtype)
            with masked_heads(layers, factors):
                output = BertModel.forward(self, return_dict=True, **kwargs)
            for name in ("attentions", "cross_attentions"):
                if output.get(name):
                    output[name] = times(output[name], factors)
        if self.config.return_dict if return_dict is None else return_dict:
            return output
        # The second is the pooled output, or that there is none.
        return (output[0], output.pooler_output, *(output[name] for name in [*output][1:] if name != "pooler_output"))


class QDQBertLMHeadModel(QDQBertPreTrainedModel, BertLMHeadModel):  # type: ignore[misc]
    """With a language modeling head that predicts the next token."""

    forward = _takes(f"{_INPUTS} {_MEMORY} labels past_key_values use_cache {_OUTPUTS}")(BertLMHeadModel.forward)


class QDQBertForMaskedLM(QDQBertPreTrainedModel, BertForMaskedLM):  # type: ignore[misc]
    """With a language modeling head that predicts masked tokens."""

    forward = _takes(f"{_INPUTS} {_MEMORY} labels {_OUTPUTS}")(BertForMaskedLM.forward)


class QDQBertForSequenceClassification(QDQBertPreTrainedModel, BertForSequenceClassification):  # type: ignore[misc]
    """With a head that classifies whole sequences, or gives each a number."""

    forward = _takes(f"{_INPUTS} labels {_OUTPUTS}")(BertForSequenceClassification.forward)


class QDQBertForNextSentencePrediction(QDQBertPreTrainedModel, BertForNextSentencePrediction):  # type: ignore[misc]
    """With a head that says whether the second sentence follows the first."""

    @_takes(f"{_INPUTS} labels {_OUTPUTS}")
    def forward(self, **kwargs: Any) -> Any:
        if "next_sentence_label" in kwargs:
            warnings.warn("next_sentence_label is an old name; pass labels", FutureWarning, stacklevel=2)
            kwargs["labels"] = kwargs.pop("next_sentence_label")
        return BertForNextSentencePrediction.forward(self, **kwargs)


class QDQBertForMultipleChoice(QDQBertPreTrainedModel, BertForMultipleChoice):  # type: ignore[misc]
    """With a head that picks one of several sequences."""

    forward = _takes(f"{_INPUTS} labels {_OUTPUTS}")(BertForMultipleChoice.forward)


class QDQBertForTokenClassification(QDQBertPreTrainedModel, BertForTokenClassification):  # type: ignore[misc]
    """With a head that classifies every token."""

    forward = _takes(f"{_INPUTS} labels {_OUTPUTS}")(BertForTokenClassification.forward)


class QDQBertForQuestionAnswering(QDQBertPreTrainedModel, BertForQuestionAnswering):  # type: ignore[misc]
    """With a head that marks where in a text the answer starts and ends."""

    forward = _takes(f"{_INPUTS} start_positions end_positions {_OUTPUTS}")(BertForQuestionAnswering.forward)


def _register() -> None:
    AutoConfig.register(QDQBertConfig.model_type, QDQBertConfig, exist_ok=True)
    AutoTokenizer.register(QDQBertConfig, fast_tokenizer_class=BertTokenizerFast, exist_ok=True)
    for auto, model in (
        (AutoModel, QDQBertModel),
        (AutoModelForCausalLM, QDQBertLMHeadModel),
        (AutoModelForMaskedLM, QDQBertForMaskedLM),
        (AutoModelForSequenceClassification, QDQBertForSequenceClassification),
        (AutoModelForNextSentencePrediction, QDQBertForNextSentencePrediction),
        (AutoModelForMultipleChoice, QDQBertForMultipleChoice),
        (AutoModelForTokenClassification, QDQBertForTokenClassification),
        (AutoModelForQuestionAnswering, QDQBertForQuestionAnswering),
    ):
        auto.register(QDQBertConfig, model, exist_ok=True)


_register()
