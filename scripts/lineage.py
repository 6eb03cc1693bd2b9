"""Every model type of transformers' registries that encodes text: a tiny model of each, or why there is none.

What counts as one is asked of the registries themselves (:func:`candidates`), so that a type which a new release of
transformers brings is not in these lists yet; ``tests/ecosystem/test_lineage.py`` then fails and says what to do.
``scripts/sweep_models.py`` takes each of them through every stage and writes ``docs/models.md``.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from qdq_surgery.hf.example_inputs import make_examples

__all__ = ["KIN", "OTHERS", "OUTSIDE", "Kin", "build", "candidates", "examples", "heads", "labels"]

#: The mappings whose types read text and are no mere decoders.
_TASKS = (
    "MASKED_LM",
    "MULTIPLE_CHOICE",
    "NEXT_SENTENCE_PREDICTION",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "TEXT_ENCODING",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "DOCUMENT_QUESTION_ANSWERING",
    "TABLE_QUESTION_ANSWERING",
)
#: Of these mappings, the types that are in none of causal language models.
_TASKS_OF_ANY = ("QUESTION_ANSWERING", "TOKEN_CLASSIFICATION", "SEQUENCE_CLASSIFICATION")


@dataclass(frozen=True)
class Kin:
    """A model type.

    Attributes:
        options: What makes it tiny beyond :data:`_TINY`.
        of_heads: More options, by the name of the head that needs them.
    """

    model_type: str
    options: Mapping[str, Any] = field(default_factory=dict)
    of_heads: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


#: Names that configs have for the same few sizes.
_TINY: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "dim", "n_embd", "embed_dim", "emb_dim", "dim_model"), 32),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "num_heads", "n_heads", "n_head", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim", "d_inner", "ffn_dim"), 48),
    **dict.fromkeys(("d_kv", "head_dim", "d_head", "kv_channels"), 8),
    "num_key_value_heads": 4,
    "hidden_dim": 48,
    "vocab_size": 60,
    "max_position_embeddings": 40,
    "embedding_size": 16,
    "pooler_hidden_size": 32,
    "image_size": 32,
    "patch_size": 16,
    "projection_dim": 16,
    "num_local_experts": 4,
    "num_experts": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
    "decoder_start_token_id": 1,
}


#: Of the parts that a text does not come to: what makes speech of it, and reads speech.
_SPEECH = {
    **dict.fromkeys(("speech_encoder_layers", "t2u_encoder_layers", "t2u_decoder_layers"), 1),
    **dict.fromkeys(("speech_encoder_intermediate_size", "t2u_encoder_ffn_dim", "t2u_decoder_ffn_dim"), 48),
    **dict.fromkeys(("t2u_vocab_size", "char_vocab_size", "unit_hifi_gan_vocab_size", "unit_embed_dim"), 60),
    "upsample_initial_channel": 64,
}

#: Model types that are taken through the stages.
KIN: tuple[Kin, ...] = (
    *(
        Kin(name)
        for name in """
        albert altclip bart bert blenderbot blenderbot-small camembert chinese_clip clip clip_text_model
        clipseg convbert data2vec-text deberta deberta-v2 distilbert electra ernie esmc
        eurobert flava fnet fsmt gte jina_embeddings_v3 layoutlm m2m_100 markuplm mbart
        megatron-bert metaclip_2 mobilebert modernbert modernvbert mpnet mra mt5 mvp nllb-moe nomic_bert
        nystromformer openai_privacy_filter pegasus plbart prophetnet rembert roberta roberta-prelayernorm
        roc_bert roformer switch_transformers t5gemma2 tapas tipsv2_text_model udop ultrabert
        ultravbert umt5 xlm-roberta xlm-roberta-xl xlnet yoso
        """.split()
    ),
    Kin("align", {"projection_dim": 640}),
    Kin("blip", {"text_config": {"encoder_hidden_size": 32}}),
    # (Block-sparse attention turns itself into the full one in front of a short text.)
    Kin("big_bird", {"attention_type": "original_full"}),
    Kin("bigbird_pegasus", {"attention_type": "original_full"}),
    Kin(
        "bros", {"dim_bbox": 8, "dim_bbox_sinusoid_emb_2d": 16, "dim_bbox_sinusoid_emb_1d": 2, "dim_bbox_projection": 8}
    ),
    Kin(
        "canine",
        {
            "num_hash_buckets": 64,
            "max_position_embeddings": 128,
            "local_transformer_stride": 16,
            "downsampling_rate": 4,
        },
    ),
    Kin("esm", {"vocab_size": 60, "mask_token_id": 3, "pad_token_id": 0, "position_embedding_type": "rotary"}),
    Kin(
        "layoutlmv3", {"coordinate_size": 6, "shape_size": 4, "max_2d_position_embeddings": 100, "visual_embed": False}
    ),
    Kin("funnel", {"block_sizes": [1, 2], "block_repeats": [1, 1], "num_decoder_layers": 1}),
    Kin("led", {"attention_window": [4, 4]}),
    Kin("longformer", {"attention_window": [4, 4]}),
    Kin("longt5", {"local_radius": 4, "global_block_size": 4}),
    Kin("pegasus_x", {"block_size": 4, "num_global_tokens": 2}),
    Kin("seamless_m4t", _SPEECH),
    Kin("seamless_m4t_v2", _SPEECH),
    Kin("siglip", {"text_config": {"projection_size": 32}}),
    Kin("lilt", {"channel_shrink_ratio": 4, "max_2d_position_embeddings": 100, "hidden_size": 48}),
    Kin("luke", {"entity_vocab_size": 20, "entity_emb_size": 16}),
    Kin("lxmert", {"l_layers": 1, "x_layers": 1, "r_layers": 1}),
    Kin("marian", {"decoder_vocab_size": 60}),
    Kin("neomme", {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]}),
    Kin("squeezebert", {"embedding_size": 32, "q_groups": 2, "k_groups": 2, "v_groups": 2, "intermediate_groups": 2}),
    Kin("splinter", {"question_token_id": 5}),
    Kin("t5", {"decoder_start_token_id": 0}),
    Kin(
        "t5gemma",
        {"decoder": {"cross_attention_hidden_size": 32}},
        of_heads={"T5GemmaEncoderModel": {"is_encoder_decoder": False}},
    ),
    Kin("tipsv2", {"vision_config": {"out_features": ["stage2"], "out_indices": [2]}}),
    Kin("xmod", {"default_language": "en_XX"}),
)

#: Encoders of images and of sound that the same rules fit.
_SOUND = {
    "conv_dim": [32] * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "apply_spec_augment": False,  # a tiny example is shorter than what it hides
}
_LAST = {"out_features": ["stage2"], "out_indices": [2]}
_WINDOWS = {**_LAST, "depths": [2, 2], "num_heads": [2, 4], "embed_dim": 16, "window_size": 2, "patch_size": 4}
OTHERS: tuple[Kin, ...] = (
    *(
        Kin(name)
        for name in """
        aimv2_vision_model clip_vision_model data2vec-vision deit ijepa siglip_vision_model vit vit_mae vit_msn
        """.split()
    ),
    *(Kin(name, _LAST) for name in ("beit", "dinov2", "dinov2_with_registers", "dinov3_vit")),
    Kin("data2vec-audio", {**_SOUND, "mask_time_prob": 0.0}),
    Kin("hubert", _SOUND),
    Kin("swin", _WINDOWS),
    Kin("swinv2", _WINDOWS),
    Kin("unispeech", _SOUND),
    Kin("unispeech-sat", _SOUND),
    Kin("wav2vec2", _SOUND),
    Kin("wav2vec2-conformer", _SOUND),
    Kin("wavlm", _SOUND),
    Kin("yolos", {"image_size": [32, 32]}),
)

#: Those that are not, and why.
OUTSIDE: Mapping[str, str] = {
    **dict.fromkeys(
        """
        audioflamingo3 glmasr granite_speech granite_speech_plus moss_transcribe_diarize musicflamingo nemo_speechlm
        qwen2_audio qwen3_asr vibevoice_asr voxtral voxtral_realtime
        """.split(),
        "a decoder behind an encoder of sound",
    ),
    **dict.fromkeys(("blip-2", "emu3", "llama4", "mllama"), "a decoder behind an encoder of images"),
    **dict.fromkeys(("mistral4", "molmo2_text"), "a decoder"),
    **dict.fromkeys(("xlm", "flaubert"), "its attention is handed a cache that it fills"),
    "encoder-decoder": "two models of other types; each is listed under its own",
    "ibert": "is a quantized BERT already: its modules decide by the values of their own ranges",
    "layoutlmv2": "needs detectron2",
    "perceiver": "takes no token ids but inputs of any kind",
    "siglip2": "its images are patches of their own shapes; convert its text tower",
    "videoprism": "its images are videos; convert its text tower",
    "reformer": "its layers are handed a cache, and run backwards through an autograd function of their own",
}


def candidates() -> list[str]:
    """Every model type of transformers that encodes text, by its registries."""

    def types(task: str) -> set[str]:
        return set(getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"))

    found = set().union(*map(types, _TASKS))
    found |= set().union(*map(types, _TASKS_OF_ANY)) - types("CAUSAL_LM")
    return sorted(found)


def tiny(config: PreTrainedConfig, options: Mapping[str, Any]) -> PreTrainedConfig:
    """The same config with everything small."""
    for name, value in {**_TINY, **options}.items():
        if isinstance(vars(config).get(name), PreTrainedConfig):
            continue
        if name in options or _has(config, name):
            with suppress(NotImplementedError):  # Funnel has as many layers as its blocks say
                setattr(config, name, value)
    kinds = vars(config).get("layer_types")
    if isinstance(kinds, list):  # one for each layer
        config.layer_types = kinds[: config.num_hidden_layers]
    for name, inner in list(vars(config).items()):
        if isinstance(inner, PreTrainedConfig):
            tiny(inner, options.get(name, {}))
    return config


def _has(config: PreTrainedConfig, name: str) -> bool:
    try:
        return getattr(config, name, None) is not None
    except Exception:  # transformers refuses to say what may differ from layer to layer
        return False


def config_of(kin: Kin, head: str) -> PreTrainedConfig:
    """A config of its type with the sizes above."""
    return tiny(AutoConfig.for_model(kin.model_type), {**kin.options, **kin.of_heads.get(head, {})})


def heads(model_type: str) -> list[str]:
    """The classes of all heads for texts that transformers' auto classes know for a type, the bare model first.

    Of a type that reads no text, the bare model alone.
    """
    names: dict[str, None] = {}
    for attribute, mapping in vars(modeling_auto).items():
        if attribute.startswith("MODEL_") and attribute.endswith("_MAPPING_NAMES"):
            found = mapping.get(model_type, ())
            names.update(dict.fromkeys((found,) if isinstance(found, str) else found))
    texts = [name for name in names if "input_ids" in inspect.signature(getattr(transformers, name).forward).parameters]
    return texts or list(names)[:1]


def build(kin: Kin, head: str, seed: int = 0) -> PreTrainedModel:
    """A model with random weights and eager attention, in eval mode; its weights are spread so that layers differ."""
    torch.manual_seed(seed)
    model: PreTrainedModel = getattr(transformers, head)._from_config(config_of(kin, head), attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(2.0)
            if not parameter.any() and not name.endswith("bias"):
                parameter.normal_(std=0.05)  # what begins as nothing would stay without a range
    return model.eval()


def examples(model: PreTrainedModel, shape: tuple[int, int], *, mask: bool = True) -> dict[str, Any]:
    """Arguments of a shape (batch, tokens), made from the config; with padding behind all texts but the first."""
    made = make_examples(model, shape)
    for name in [name for name in made if name.endswith("attention_mask")]:
        if not mask:
            del made[name]
            continue
        tokens = made[name].shape[-1]
        for row, each in enumerate(made[name]):
            each[..., max(1, tokens - 2 * row) :] = 0
    return made


#: Tasks whose heads take labels of these kinds.
_LABELS = {
    "tokens": ("MASKED_LM", "CAUSAL_LM", "SEQ_TO_SEQ_CAUSAL_LM", "PRETRAINING"),
    "span": ("QUESTION_ANSWERING", "DOCUMENT_QUESTION_ANSWERING"),
    "token": ("TOKEN_CLASSIFICATION",),
    "text": ("SEQUENCE_CLASSIFICATION",),
    "choice": ("MULTIPLE_CHOICE",),
    "two": ("NEXT_SENTENCE_PREDICTION",),
}


def _kind(head: str) -> str | None:
    for kind, tasks in _LABELS.items():
        for task in tasks:
            name = "PRETRAINING" if task == "PRETRAINING" else task
            mapping = getattr(modeling_auto, f"MODEL_FOR_{name}_MAPPING_NAMES")
            if head in mapping.values() and head not in modeling_auto.MODEL_MAPPING_NAMES.values():
                return kind
    return None


def labels(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Labels of the kind that the head takes; none for a bare model or a head without a loss."""
    kind = _kind(type(model).__name__)
    names = inspect.signature(model.forward).parameters
    if "input_ids" not in batch:
        return {}
    ids = batch.get("decoder_input_ids", batch["input_ids"])
    rows, tokens = ids.shape[0], ids.shape[-1]
    text = model.config.get_text_config()
    generator = torch.Generator().manual_seed(1)

    def whole(high: int, *size: int) -> Tensor:
        return torch.randint(0, high, size, generator=generator)

    if type(model).__name__ == "ElectraForPreTraining":
        return {"labels": whole(2, rows, tokens)}
    if kind == "span":
        tokens = batch["input_ids"].shape[-1]
        return {"start_positions": whole(tokens, rows), "end_positions": whole(tokens, rows)}
    made: dict[str, Tensor] = {}
    if kind == "tokens" and "labels" in names:
        made["labels"] = whole(text.vocab_size, rows, tokens)
        for name in ("next_sentence_label", "sentence_order_label"):
            if name in names:
                made[name] = whole(2, rows)
    elif kind == "token":
        made["labels"] = whole(model.config.num_labels, rows, batch["input_ids"].shape[-1])
    elif kind == "text":
        made["labels"] = whole(model.config.num_labels, rows)
    elif kind == "choice":
        made["labels"] = whole(batch["input_ids"].shape[1], rows)
    elif kind == "two":
        made["labels"] = whole(2, rows)
    return made
