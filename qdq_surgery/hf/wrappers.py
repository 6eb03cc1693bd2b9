"""What a user's model is where it cannot be converted as it is: a wrapper around the one that can, or a decoder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

__all__ = ["is_decoder_only", "models_inside", "remedy_for"]

#: They have a language model's head, and are encoders, or can be.
_NO_DECODERS = ("bert-generation", "xlnet")
_SHOWN = 3


def remedy_for(thing: Any) -> str:
    """What to convert in place of something that is no PreTrainedModel."""
    if hasattr(thing, "_orig_mod"):
        return "convert it before torch.compile"
    # One model may be held under several names, and is converted once.
    places: dict[PreTrainedModel, str] = {}
    for place, each in models_inside(thing):
        places.setdefault(each, place)
    found = [(place, each) for each, place in places.items()]
    if not found:
        return "load it with transformers"
    named = ", ".join(f"a {type(each).__name__} at model{place}" for place, each in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    parts = "that one" if len(found) == 1 else "each of them"
    return (
        f"it holds {named}{more}: convert {parts} where it is, "
        f"convert(model{found[0][0]}, ..., inplace=True), and go on with the whole"
    )


def models_inside(thing: Any) -> Iterator[tuple[str, PreTrainedModel]]:
    """The outermost Hugging Face models in a module, or in an object's attributes, with the way to each in Python."""
    if isinstance(thing, nn.Module):
        children = list(thing.named_children())
    elif isinstance(thing, (list, tuple)):
        children = [(str(index), each) for index, each in enumerate(thing) if isinstance(each, nn.Module)]
    else:
        children = [
            (name, each) for name, each in getattr(thing, "__dict__", {}).items() if isinstance(each, nn.Module)
        ]
    for name, child in children:
        step = f".{name}" if name.isidentifier() else f"[{name}]" if name.isdigit() else f"[{name!r}]"
        if isinstance(child, PreTrainedModel):
            yield step, child
        else:
            for rest, model in models_inside(child):
                yield step + rest, model


def is_decoder_only(model: PreTrainedModel) -> bool:
    """Whether models of this type only ever write text: there is a causal language model of it, and no masked one."""
    kind = getattr(model.config, "model_type", None)
    writes = kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if getattr(model.config, "use_bidirectional_attention", False):  # EmbeddingGemma
        return False
    # Half of an encoder-decoder (PegasusForCausalLM) has a config that says no, of a class that says yes.
    both = getattr(type(model.config), "is_encoder_decoder", False)
    return writes and kind not in _NO_DECODERS and not both
