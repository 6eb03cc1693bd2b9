"""What a release writes, for the tests of later ones (tests/contract/test_compatibility.py).

tests/fixtures/0.1.0 was made once, by release 0.1.0 before its packages had their present names, on one x86 CPU with
torch 2.13 and transformers 5.23. It is not to be made again: a later release would only agree with itself. A release
whose forms differ gets a folder of its own: write the rule files by hand, then

    python scripts/make_fixtures.py tests/fixtures/RELEASE

    rules/*.yaml               rule files, written by hand; RULES.json beside each is what they are read as
    models/NAME/               what save_pretrained wrote; NAME.safetensors has inputs, outputs and ranges,
                               NAME.plan.json the plan
    models/pickled.pt.gz       a whole model by torch.save
    exports/TARGET.onnx        the first model for each target; TARGET.safetensors has what it computes,
                               TARGET.json the findings and the receipt
    interface.json             public names with their arguments and fields; commands with their options
    versions.json              what made all this

Only public names are used, so that any release can run it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import inspect
import io
import json
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.cli.commands import parser

_BERT: dict[str, Any] = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "intermediate_size": 16,
    "max_position_embeddings": 12,
}
_DISTILBERT: dict[str, Any] = {
    "vocab_size": 24,
    "dim": 16,
    "n_layers": 1,
    "n_heads": 1,
    "hidden_dim": 16,
    "max_position_embeddings": 12,
    "sinusoidal_pos_embds": False,
}

#: By name: class, options of the config, rules, method of the calibration, size of a shard.
MODELS: dict[str, tuple[str, dict[str, Any], str, str | None, str]] = {
    "bert": ("BertForSequenceClassification", _BERT, "qdqbert", "percentile", "1GB"),
    "distilbert": ("DistilBertForTokenClassification", _DISTILBERT, "tensorrt", "max", "1GB"),
    "shards": ("BertForMaskedLM", _BERT, "rules/every-key.yaml", None, "8KB"),
}

#: By target: options of the export. The integers of activations are named: a target may choose them by the CPU.
EXPORTS: dict[str, dict[str, Any]] = {
    "onnxruntime": {"activations": "uint8"},
    "openvino": {"activations": "int8"},
    "tensorrt": {"activations": "int8", "precision": "float16"},
}


def example(model: PreTrainedModel, seed: int) -> dict[str, Tensor]:
    """Two texts of 7 and 5 tokens."""
    ids = torch.randint(3, model.config.vocab_size, (2, 7), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def ranges(model: PreTrainedModel) -> dict[str, Tensor]:
    """Every range, by its quantizer's name; scales that training moves as they are."""
    found = {name: quantizer.amax for name, quantizer in qs.quantizers(model).items()}
    return {f"ranges/{name}": amax.detach().clone() for name, amax in found.items() if amax is not None}


def computed(model: PreTrainedModel, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Inputs and outputs, with the quantizers on and off."""
    with torch.no_grad():
        found = {**inputs, "logits": model(**inputs).logits}
        with qs.quantization_disabled(model):
            found["float/logits"] = model(**inputs).logits
    return found


def write_json(path: Path, data: Any) -> None:
    """One line for each entry of the top level."""
    entries = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items()]
    path.write_text("{\n" + ",\n".join(entries) + "\n}\n")


def write_model(name: str) -> PreTrainedModel:
    """A tiny model with random weights, converted, calibrated and saved."""
    head, options, source, method, shard = MODELS[name]
    rules = dataclasses.replace(qs.load_rules(source), path=None, files=())  # a pickle would name their place
    torch.manual_seed(len(name))
    cls = getattr(transformers, head)
    model = cls._from_config(cls.config_class(**options), attn_implementation="eager").eval()
    with torch.no_grad():  # spread, so that layers differ
        for path, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embedding" not in path:
                parameter.mul_(4.0)
    write_json(Path(f"models/{name}.plan.json"), qs.plan(model, rules).to_json())
    qmodel: PreTrainedModel = qs.convert(model, rules, inplace=True)
    qs.calibrate(qmodel, [example(qmodel, seed) for seed in range(3)], method)
    qmodel.save_pretrained(f"models/{name}", max_shard_size=shard)
    save_file({**computed(qmodel, example(qmodel, 9)), **ranges(qmodel)}, f"models/{name}.safetensors")
    return qmodel


def write_export(target: str, options: dict[str, Any]) -> None:
    """The first saved model for one target, and what its runtime makes of it."""
    qmodel = transformers.AutoModelForSequenceClassification.from_pretrained("models/bert").eval()
    inputs = {**example(qmodel, 9), "token_type_ids": torch.zeros(2, 7, dtype=torch.long)}
    path = Path(f"exports/{target}.onnx")
    qs.export_onnx(qmodel, path, inputs, target, **options)
    served = qs.load_onnx(path)
    save_file({**inputs, "logits": served(**inputs).logits}, f"exports/{target}.safetensors")
    shown = {"findings": qs.lint(path).to_json()}
    if target != "tensorrt":  # which needs an engine
        shown["receipt"] = qs.receipt(path, shape=(2, 7)).to_json()
    write_json(Path(f"exports/{target}.json"), shown)


def commands(parser: argparse.ArgumentParser, words: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every command with its options and places: names, values to choose from, defaults."""
    options: dict[str, Any] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                yield from commands(inner, f"{words} {name}".strip())
            continue
        choices = None if action.choices is None else [*action.choices]
        wanted = action.required or not action.option_strings
        facts = {"choices": choices, "default": repr(action.default), "kind": type(action).__name__, "wanted": wanted}
        options[" ".join(action.option_strings) or action.dest] = facts
    yield words, options


def public_names() -> dict[str, Any]:
    """What ``import qdq_surgery`` gives: arguments of functions and classes; methods, fields and bases of classes."""
    found: dict[str, Any] = {}
    for name in sorted(qs.__all__):
        each = getattr(qs, name)
        if isinstance(each, str):
            continue
        own = inspect.isclass(each) and each.__module__.startswith("qdq_surgery")
        fields = [field.name for field in dataclasses.fields(each)] if dataclasses.is_dataclass(each) else []
        found[name] = {
            "arguments": _arguments(each),
            "bases": [base.__name__ for base in each.__mro__ if base.__module__ == "builtins"] if own else [],
            "members": sorted({*fields, *(key for key in vars(each) if key[0] != "_")}) if own else [],
        }
    return found


def _arguments(each: Any) -> dict[str, list[str]]:
    parameters = inspect.signature(each).parameters.values()
    return {
        one.name: [one.kind.name, "" if one.default is one.empty else type(one.default).__name__] for one in parameters
    }


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "onnx", "onnxruntime", "openvino")
    found = {name: version(name) for name in packages}
    return {**found, "qdq_surgery": qs.__version__, "python": platform.python_version(), "cpu": platform.machine()}


def main(folder: Path) -> None:
    """Write the fixtures of this release around the rule files in ``folder``."""
    if (folder / "versions.json").exists():
        raise SystemExit(f"{folder} has fixtures already; a release makes its own once")
    torch.set_num_threads(1)
    os.chdir(folder)  # so that nothing names the folder's place
    for inner in ("models", "exports"):
        Path(inner).mkdir()
    for rules in sorted(Path("rules").glob("*.yaml")):
        write_json(rules.with_suffix(".json"), qs.QDQConfig(rules).to_dict()["rules"])
    made = {name: write_model(name) for name in MODELS}
    pickled = io.BytesIO()
    torch.save(made["distilbert"], pickled)
    Path("models/pickled.pt.gz").write_bytes(gzip.compress(pickled.getvalue(), mtime=0))
    for target, options in EXPORTS.items():
        write_export(target, options)
    write_json(Path("interface.json"), {**public_names(), "commands": dict(commands(parser()))})
    write_json(Path("versions.json"), _versions())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
