"""Models whose activations have axes of every kind, and padded batches for them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.spec import RuleSet

Batch = dict[str, Tensor]

#: No token of a batch, which start at 5.
GARBAGE = 2

TINY: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
}

#: Rows, and lengths of texts: no other axis of these models has them, so that a length alone tells the axis.
ROWS, TOKENS, OTHER = 4, 12, 17
LENGTHS = {"attention_mask": (12, 5, 9, 2), "other": (3, 17, 6, 11)}


def coarse(name: str) -> RuleSet:
    """256 bins."""
    rules = qs.load_rules(name)
    spec = QuantSpec(calibrator=CalibratorSpec("histogram", num_bins=128))
    return dataclasses.replace(rules, specs={**rules.specs, "activation": spec})


def spread(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embedding" not in name:
                parameter.mul_(4.0)
    return model.eval()


def ids(lengths: tuple[int, ...], seed: int, high: int = 55) -> tuple[Tensor, Tensor]:
    size = (len(lengths), max(lengths))
    mask = (torch.arange(size[1]) < torch.tensor(lengths)[:, None]).long()
    made = torch.randint(5, high, size, generator=torch.Generator().manual_seed(seed))
    return made * mask, mask


@dataclass
class Case:
    """A model, and what goes with each mask.

    Attributes:
        beside: Places in the same axis after the tokens of the first text, that are no text's or the second one's.
    """

    make: Callable[[], PreTrainedModel]
    batch: Callable[[int], Batch]
    texts: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"attention_mask": ("input_ids",)})
    beside: int = 0
    rules: str = "qdqbert"

    def alone(self, batch: Batch, row: int) -> Batch:
        """One row without its padding and without masks."""
        made = {name: value[row : row + 1] for name, value in batch.items()}
        for mask, names in self.texts.items():
            length = int(batch[mask][row].sum())
            made.update({name: made[name][:, :length] for name in names})
        return {name: value for name, value in made.items() if name not in self.texts}


def one_text(seed: int) -> Batch:
    return dict(zip(("input_ids", "attention_mask"), ids(LENGTHS["attention_mask"], seed), strict=True))


def two_texts(seed: int, second: str, mask: str, lengths: tuple[int, ...] = LENGTHS["other"]) -> Batch:
    other, masked = ids(lengths, seed + 50)
    return {**one_text(seed), second: other, mask: masked}


# Models --------------------------------------------------------------------------------------------------------------


class Shared(BertPreTrainedModel):  # type: ignore[misc]
    """A bi-encoder: one tower, called twice."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.query = BertModel(config, add_pooling_layer=False)
        self.passage = self.other()
        self.post_init()

    def other(self) -> nn.Module:
        return self.query

    def forward(
        self, input_ids: Tensor, passage_ids: Tensor, attention_mask: Any = None, passage_mask: Any = None
    ) -> Tensor:
        left = self.query(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        right = self.passage(input_ids=passage_ids, attention_mask=passage_mask).last_hidden_state[:, 0]
        return (left * right).sum(-1)


class Towers(Shared):
    """A bi-encoder: two towers."""

    def other(self) -> nn.Module:
        return BertModel(self.config, add_pooling_layer=False)


class Averaging(BertPreTrainedModel):  # type: ignore[misc]
    """A mean over all places goes into every token, padding included."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = BertModel(config, add_pooling_layer=False)
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Any:
        embeds = self.bert.embeddings.word_embeddings(input_ids)
        return self.bert(inputs_embeds=embeds + embeds.mean(1, keepdim=True), attention_mask=attention_mask)


def bert(**options: Any) -> PreTrainedModel:
    return BertModel(BertConfig(**TINY, **options))


def deberta_v3() -> PreTrainedModel:
    """What the released files have: one projection for tokens and for the table of positions."""
    options = {
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8,
        "type_vocab_size": 0,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_biased_input": False,
    }
    return transformers.DebertaV2Model(transformers.DebertaV2Config(**TINY, **options))


def deberta() -> PreTrainedModel:
    options = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False}
    return transformers.DebertaModel(transformers.DebertaConfig(**TINY, **options))


def bert2bert() -> PreTrainedModel:
    tiny = {name: value for name, value in TINY.items() if name != "attn_implementation"}
    decoder = BertConfig(**tiny, is_decoder=True, add_cross_attention=True)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(BertConfig(**tiny), decoder)
    config.decoder_start_token_id, config.pad_token_id = 1, 0
    return transformers.EncoderDecoderModel(config)


def bart() -> PreTrainedModel:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in _BART.items()}
    return transformers.BartModel(
        transformers.BartConfig(
            vocab_size=60,
            d_model=32,
            max_position_embeddings=64,
            pad_token_id=0,
            attn_implementation="eager",
            **sizes,
        )
    )


_BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}


def layoutlmv3() -> PreTrainedModel:
    sizes = {
        "input_size": 32,
        "patch_size": 16,
        "coordinate_size": 4,
        "shape_size": 8,
        "max_2d_position_embeddings": 64,
    }
    bins = {"rel_pos_bins": 4, "max_rel_pos": 16, "rel_2d_pos_bins": 4, "max_rel_2d_pos": 16}
    return transformers.LayoutLMv3Model(transformers.LayoutLMv3Config(**TINY, **sizes, **bins))


def page(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.randint(0, 20, (ROWS, TOKENS, 4), generator=generator)
    boxes[..., 2:] += boxes[..., :2]
    return {**one_text(seed), "bbox": boxes, "pixel_values": torch.randn(ROWS, 3, 32, 32, generator=generator)}


def luke(aware: bool) -> PreTrainedModel:
    options = {"entity_vocab_size": 40, "entity_emb_size": 16, "use_entity_aware_attention": aware}
    return transformers.LukeModel(transformers.LukeConfig(**TINY, **options))


def words_and_entities(seed: int) -> Batch:
    entities, mask = ids((1, 5, 3, 4), seed + 7, high=39)
    spans = torch.full((ROWS, 5, 3), -1)
    spans[..., :2] = torch.arange(5)[:, None] + torch.arange(2)
    spans = torch.where(mask[..., None] == 1, spans, -1)
    names = ("entity_ids", "entity_attention_mask", "entity_position_ids", "entity_token_type_ids")
    values = (entities, mask, spans, torch.zeros_like(entities))
    return {**one_text(seed), **dict(zip(names, values, strict=True))}


def visual_bert() -> PreTrainedModel:
    return transformers.VisualBertModel(transformers.VisualBertConfig(**TINY, visual_embedding_dim=16))


def words_and_regions(seed: int) -> Batch:
    _, mask = ids((1, 5, 3, 4), seed)
    regions = torch.randn(ROWS, 5, 16, generator=torch.Generator().manual_seed(seed))
    return {
        **one_text(seed),
        "visual_embeds": regions,
        "visual_attention_mask": mask,
        "visual_token_type_ids": torch.ones_like(mask),
    }


PASSAGES = {"attention_mask": ("input_ids",), "passage_mask": ("passage_ids",)}
DECODED = {"attention_mask": ("input_ids",), "decoder_attention_mask": ("decoder_input_ids",)}
ENTITIES = {
    "attention_mask": ("input_ids",),
    "entity_attention_mask": ("entity_ids", "entity_position_ids", "entity_token_type_ids"),
}
REGIONS = {
    "attention_mask": ("input_ids",),
    "visual_attention_mask": ("visual_embeds", "visual_token_type_ids"),
}

pairs = functools.partial(two_texts, second="passage_ids", mask="passage_mask")
decoded = functools.partial(two_texts, second="decoder_input_ids", mask="decoder_attention_mask")

CASES = {
    "bert": Case(bert, one_text),
    "deberta-v3": Case(deberta_v3, one_text),
    "two-towers": Case(lambda: Towers(BertConfig(**TINY)), pairs, PASSAGES),
    "one-tower-twice": Case(lambda: Shared(BertConfig(**TINY)), pairs, PASSAGES),
    "bert2bert": Case(bert2bert, decoded, DECODED),
    "bart": Case(bart, decoded, DECODED, rules="linear-only"),
    "layoutlmv3": Case(layoutlmv3, page, {"attention_mask": ("input_ids", "bbox")}, beside=5),
    "luke": Case(functools.partial(luke, True), words_and_entities, ENTITIES, beside=5),
    "luke-plain": Case(functools.partial(luke, False), words_and_entities, ENTITIES, beside=5),
    "visual-bert": Case(visual_bert, words_and_regions, REGIONS, beside=5),
}

#: Calls whose axes a length does not tell: pieces, two texts of one length, a table that grows.
MORE = {
    "bert-chunks": Case(functools.partial(bert, chunk_size_feed_forward=2), lambda seed: _cut(seed)),
    "albert-chunks": Case(
        lambda: transformers.AlbertModel(
            transformers.AlbertConfig(**{**TINY, "num_hidden_layers": 3}, embedding_size=16, chunk_size_feed_forward=4)
        ),
        lambda seed: _cut(seed, 4),
    ),
    "deberta": Case(deberta, one_text),
    "one-tower-twice": Case(
        lambda: Shared(BertConfig(**TINY)), functools.partial(pairs, lengths=(3, 12, 6, 11)), PASSAGES
    ),
    "bert2bert": Case(bert2bert, functools.partial(decoded, lengths=(3, 12, 6, 11)), DECODED),
}


def _cut(seed: int, by: int = 2) -> Batch:
    lengths = tuple(max(by, each // by * by) for each in LENGTHS["attention_mask"])
    return dict(zip(("input_ids", "attention_mask"), ids(lengths, seed), strict=True))
