"""The real QDQBERT, run: for make_reference.py, which sees to it that transformers is 4.40.2."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
import transformers
from absl import logging
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.tensor_quant import QuantDescriptor
from safetensors.torch import save_file
from transformers import QDQBertConfig
from transformers.models.qdqbert import modeling_qdqbert

from reference_cases import AMAX, HEADS, OF_CHECKPOINTS, TINY, Case, Checkpoint

logging.set_verbosity(logging.ERROR)
transformers.logging.set_verbosity_error()


def make_batch(case: Case, config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    batch, tokens = 3, 9
    size = (batch, 2, tokens) if case.labels == "choice" else (batch, tokens)
    ids = torch.randint(1, config.vocab_size, size, generator=generator)
    made = {"input_ids": ids, "token_type_ids": torch.randint(0, 2, size, generator=generator)}
    if case.padded:
        mask = torch.ones(size, dtype=torch.long)
        mask[0, ..., -3:] = 0
        mask[1, ..., -1:] = 0
        made["attention_mask"] = mask
        made["input_ids"] = ids * mask
    return made


def make_labels(case: Case, config, generator: torch.Generator) -> dict[str, torch.Tensor]:
    batch, tokens = 3, 9

    def whole(high: int, *size: int) -> torch.Tensor:
        return torch.randint(0, high, size, generator=generator)

    kinds = {
        "": lambda: {},
        "tokens": lambda: {"labels": whole(config.vocab_size, batch, tokens)},
        "class": lambda: {"labels": whole(config.num_labels, batch)},
        "multi": lambda: {"labels": whole(2, batch, config.num_labels).float()},
        "real": lambda: {"labels": torch.randn(batch, generator=generator)},
        "pair": lambda: {"labels": whole(2, batch)},
        "choice": lambda: {"labels": whole(2, batch)},
        "tags": lambda: {"labels": whole(config.num_labels, batch, tokens)},
        "span": lambda: {"start_positions": whole(tokens, batch), "end_positions": whole(tokens, batch)},
    }
    return kinds[case.labels]()


def quantizers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, quant_nn.TensorQuantizer)}


def calibrate(model, case: Case, batches, memory) -> None:
    for quantizer in quantizers(model).values():
        quantizer.disable_quant()
        quantizer.enable_calib()
    with torch.no_grad():
        for batch in batches:
            model(**batch, **memory)
    for name, quantizer in quantizers(model).items():
        quantizer.load_calib_amax(**AMAX["max" if name.endswith("_weight_quantizer") else case.calibrator])
        quantizer.enable_quant()
        quantizer.disable_calib()


def tensors(output) -> dict[str, torch.Tensor]:
    kept = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            kept[name] = value.detach().contiguous().clone()
        elif isinstance(value, tuple) and name in ("hidden_states", "attentions", "cross_attentions"):
            for index, item in enumerate(value):
                kept[f"{name}.{index}"] = item.detach().contiguous().clone()
    return kept


def run(case: Case, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    quant_nn.TensorQuantizer.use_fb_fake_quant = False
    method = "max" if case.calibrator == "max" else "histogram"
    quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(num_bits=8, calib_method=method))
    quant_nn.QuantLinear.set_default_quant_desc_weight(QuantDescriptor(num_bits=8, axis=((0,))))
    config = QDQBertConfig(**{**TINY, **case.config})
    model = getattr(modeling_qdqbert, case.head)(config).eval()
    # Fresh BERT weights are so small that layers hardly differ: spread them, and give the biases values.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            else:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    out: dict[str, torch.Tensor] = {f"weights/{k}": v.clone() for k, v in model.state_dict().items()}
    memory = {}
    if case.config.get("add_cross_attention"):
        memory["encoder_hidden_states"] = torch.randn(3, 5, config.hidden_size, generator=generator)
        mask = torch.ones(3, 5)
        mask[2, -2:] = 0
        memory["encoder_attention_mask"] = mask
    batches = [make_batch(case, config, generator) for _ in range(2)]
    calibrate(model, case, batches, memory)
    batch = {**make_batch(case, config, generator), **make_labels(case, config, generator)}
    for index, data in enumerate(batches):
        out.update({f"calibration/{index}/{k}": v for k, v in data.items()})
    out.update({f"batch/{k}": v for k, v in batch.items()})
    out.update({f"memory/{k}": v for k, v in memory.items()})
    out.update({f"amax/{name}": q._amax.clone().contiguous() for name, q in quantizers(model).items()})

    if case.head_mask:
        size = (config.num_attention_heads,)
        if case.head_mask == "layers":
            size = (config.num_hidden_layers, *size)
        # Heads that go and heads that stay, and factors in between, as whoever asks for the gradient may have.
        factors = torch.tensor([0.0, 0.7, 1.0, 0.3])
        memory["head_mask"] = factors[: math.prod(size)].reshape(size).clone().requires_grad_()
        out["head_mask/head_mask"] = memory["head_mask"].detach().clone()

    output = model(**batch, **memory, output_hidden_states=True, output_attentions=True)
    out.update({f"legacy/{k}": v for k, v in tensors(output).items()})
    target = output.loss if "loss" in output else output.last_hidden_state.pow(2).sum()
    target.backward()
    out.update({f"gradients/{n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    if case.head_mask:
        out["head_mask/gradient"] = memory["head_mask"].grad.clone()
    with torch.no_grad():
        quant_nn.TensorQuantizer.use_fb_fake_quant = True
        out.update({f"native/{k}": v for k, v in tensors(model(**batch, **memory)).items()})
        quant_nn.TensorQuantizer.use_fb_fake_quant = False
        if case.config.get("is_decoder"):
            plain = {k: v for k, v in batch.items() if k in ("input_ids", "token_type_ids")}
            start = {k: v[:, :-1] for k, v in plain.items()}
            cache = model(**start, **memory, use_cache=True).past_key_values
            last = {k: v[:, -1:] for k, v in plain.items()}
            step = model(**last, **memory, past_key_values=cache, use_cache=True)
            out["cached/logits"] = step.logits.clone()
        for quantizer in quantizers(model).values():
            quantizer.disable()
        out.update({f"float/{k}": v for k, v in tensors(model(**batch, **memory)).items()})
    meta = {
        "head": case.head.removeprefix("QDQ"),
        "config": json.dumps({**TINY, **case.config}, sort_keys=True),
        "calibrator": case.calibrator,
        "transformers": transformers.__version__,
        "torch": torch.__version__.split("+")[0],
    }
    return {k: v.contiguous() for k, v in out.items()}, meta


def write_checkpoint(checkpoint: Checkpoint, seed: int, folder: Path) -> None:
    torch.manual_seed(seed)
    quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(num_bits=8, calib_method="max"))
    quant_nn.QuantLinear.set_default_quant_desc_weight(QuantDescriptor(num_bits=8, axis=((0,))))
    config = QDQBertConfig(**{**OF_CHECKPOINTS, **checkpoint.config})
    model = getattr(modeling_qdqbert, checkpoint.head)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    if checkpoint.positions:
        embeddings = model.bert.embeddings
        positions = embeddings.position_ids.clone()
        del embeddings.position_ids
        embeddings.register_buffer("position_ids", positions)
    batch = {"input_ids": torch.randint(3, 99, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    batch["attention_mask"][1, -2:] = 0
    if checkpoint.calibrated:
        calibrate(model, Case("", checkpoint.head), [batch], {})
    with torch.no_grad():
        found = tensors(model(**batch, use_cache=False) if config.is_decoder else model(**batch))
    size = {"max_shard_size": "60KB"} if checkpoint.shards else {}
    model.save_pretrained(folder / checkpoint.name, safe_serialization=checkpoint.safe, **size)
    recorded = {**{f"batch/{k}": v for k, v in batch.items()}, **{f"output/{k}": v for k, v in found.items()}}
    save_file(recorded, folder / f"{checkpoint.name}.safetensors", metadata={"head": checkpoint.head})


def state_dict_names() -> dict[str, list[str]]:
    """Of every class, calibrated, with one layer."""
    found = {}
    for head in HEADS:
        cross = {"is_decoder": True, "add_cross_attention": True} if head == "QDQBertLMHeadModel" else {}
        model = getattr(modeling_qdqbert, head)(QDQBertConfig(**{**TINY, "num_hidden_layers": 1, **cross}))
        for quantizer in quantizers(model).values():
            quantizer.amax = 1.0
        found[head] = sorted(model.state_dict())
    return found


def write_case(case: Case, seed: int, folder: Path) -> None:
    out, meta = run(case, seed)
    save_file(out, folder / f"{case.name}.safetensors", metadata=meta)


def write_json(path: Path, data: dict) -> None:
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def what_ran() -> dict[str, str]:
    return {
        "transformers": transformers.__version__,
        "classes": modeling_qdqbert.__file__,
        "torch": torch.__config__.show(),
        "threads": torch.__config__.parallel_info(),
    }
