"""Checkpoints, mutated: each loads as what its files say, or is refused by an error of the package."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification, PreTrainedModel

import qdq_surgery as qs
from fuzzing.data import mutated
from fuzzing.outcome import Outcome
from qdq_surgery.checkpoint.plan_cache import DIGEST, METADATA
from qdq_surgery.cli.folder import load_model
from qdq_surgery.errors import QdqSurgeryError
from qdq_surgery.freeze.frozen_state import NOTES
from qdq_surgery.integers.choice import unsupported
from qdq_surgery.surgery.model_state import FROZEN_ATTRIBUTE, plan_of

__all__ = ["KINDS", "run"]

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_REPORT = "qdq_report.json"
_RANGE = "._amax"
_ROUNDING = "._rounding"
_INTEGERS = "._integers"

#: For frozen models: tables in INT8, too.
_TABLES = """schema: 1
name: tables
extends: pytorch
rules:
  - name: embeddings
    why: the fuzzing's tables are small
    match: {pattern: "embedding(_, w)", rows: {min: 2}}
    quantize: {w: table}
"""

#: What must be the same for a model to compute the same: of the config's own record only this.
_MATTERS = ("rules", "descriptors", "disabled", "quant_disabled", "learned", "without_range", "rounded", "integers")


def run(count: int, seed: int) -> Outcome:
    """Try ``count`` cases; the same seed gives the same cases."""
    random_ = random.Random(seed)
    outcome = Outcome()
    with TemporaryDirectory() as temporary:
        bases = [_Base.make(Path(temporary) / "quantized", frozen=False)]
        if unsupported(torch.device("cpu"), torch.float32) is None:
            bases.append(_Base.make(Path(temporary) / "frozen", frozen=True))
        for index in range(count):
            kind, base = random_.choice([*KINDS]), random_.choice(bases)
            folder = Path(temporary) / "case"
            shutil.copytree(base.sharded if kind == "index" else base.whole, folder)
            KINDS[kind](random_, folder)
            outcome.run(kind, f"{kind} {index} of seed {seed}", functools.partial(base.check, folder), QdqSurgeryError)
            shutil.rmtree(folder)
    return outcome


@dataclass(frozen=True)
class _Base:
    """A saved model, and what it computes."""

    whole: Path
    sharded: Path
    config: dict[str, Any]
    sites: tuple[Any, ...]
    output: Tensor

    @classmethod
    def make(cls, folder: Path, frozen: bool = False) -> _Base:
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
        model = BertForSequenceClassification(BertConfig(vocab_size=64, max_position_embeddings=16, **sizes)).eval()
        folder.mkdir(exist_ok=True)
        (folder / "tables.yaml").write_text(_TABLES)
        qmodel = qs.convert(model, folder / "tables.yaml" if frozen else "qdqbert-scaled", inplace=True)
        statistics = qs.collect(qmodel, [_batch(), _batch(1)], moments=True)
        qs.calibrate(qmodel, statistics)
        qs.round_weights(qmodel, statistics)
        qmodel = qs.freeze(qmodel) if frozen else qmodel
        qmodel.save_pretrained(folder / "whole")
        qmodel.save_pretrained(folder / "sharded", max_shard_size=8_000)
        config = json.loads((folder / "whole" / "config.json").read_text())
        return cls(folder / "whole", folder / "sharded", config, _essence(_plan(qmodel)), _output(qmodel))

    def check(self, folder: Path) -> str:
        """What is wrong with the model that a folder gives; ``""`` if nothing."""
        model = load_model(folder)
        files = sorted(folder.glob("*.safetensors"))
        stored = {name: value for file in files for name, value in load_file(file).items()}
        for name, quantizer in qs.quantizers(model).items():
            named = (name, f"{model.base_model_prefix}.{name}")  # transformers loads a bare encoder without its prefix
            for found, end, what in (
                (quantizer.amax, _RANGE, "range"),
                (quantizer.rounding, _ROUNDING, "rounding"),
            ):
                wanted = next((stored[each + end] for each in named if each + end in stored), None)
                same = (
                    found is wanted if found is None or wanted is None else torch.equal(found.float(), wanted.float())
                )
                if not same:
                    return f"the {what} of {name} is not the one in the file"
        whole = {
            name: value for file in sorted(self.whole.glob("*.safetensors")) for name, value in load_file(file).items()
        }
        if stored.keys() != whole.keys() or any(
            not torch.equal(stored[name].float(), whole[name].float()) for name in whole
        ):
            return ""  # other weights or ranges: what they make is theirs
        config = json.loads((folder / "config.json").read_text())
        own, before = (each.pop("quantization_config") for each in (config, dict(self.config)))
        if config != {name: value for name, value in self.config.items() if name != "quantization_config"}:
            return ""  # another model by its own config
        if any(own.get(name) != before.get(name) for name in _MATTERS):
            return ""  # other rules
        if not torch.equal(_output(model), self.output):
            return "the outputs are others"
        return "" if _essence(_plan(model)) == self.sites else "the sites are others"


def _plan(model: PreTrainedModel) -> qs.Plan:
    state = getattr(model, FROZEN_ATTRIBUTE, None)
    return plan_of(model) if state is None else state.plan


def _essence(plan: qs.Plan) -> tuple[Any, ...]:
    """Of the sites what decides something: a linear's place in the source, and what is only shown, do not."""
    return tuple(
        (site.quantizer, None if site.routine == "module" else (site.origin, site.position), site.rule, site.spec)
        for site in plan.sites
    )


def _batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(3, 60, (2, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _output(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**_batch()).logits
    return logits


# -- mutations ---------------------------------------------------------------------------------------------------------


def _config(random_: random.Random, folder: Path) -> None:
    """The record and the rules in config.json."""
    data = json.loads((folder / "config.json").read_text())
    data["quantization_config"] = mutated(random_, data["quantization_config"])
    (folder / "config.json").write_text(json.dumps(data))


def _model_config(random_: random.Random, folder: Path) -> None:
    """What else is in it."""
    data = json.loads((folder / "config.json").read_text())
    own = data.pop("quantization_config")
    data = mutated(random_, data)
    (folder / "config.json").write_text(json.dumps({**data, "quantization_config": own}))


def _metadata_of(folder: Path) -> dict[str, str]:
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        return dict(file.metadata())


def _lock(random_: random.Random, folder: Path) -> None:
    """The stored plan; as often as not with the digest that belongs to it, as a forger would write it."""
    metadata = _metadata_of(folder)
    text = json.dumps(mutated(random_, json.loads(metadata[METADATA])))
    if random_.random() < 0.2:
        text = random_.choice(("[" * 200_000, text[: random_.randrange(len(text))], "", "null", text + " "))
    metadata[METADATA] = text.encode(errors="replace").decode()
    if random_.random() < 0.6:
        metadata[DIGEST] = hashlib.sha256(metadata[METADATA].encode()).hexdigest()
    save_file(load_file(folder / _WEIGHTS), folder / _WEIGHTS, metadata=metadata)


def _notes(random_: random.Random, folder: Path) -> None:
    """What was found when a model was frozen."""
    metadata = _metadata_of(folder)
    if NOTES not in metadata:
        return _lock(random_, folder)
    text = json.dumps(mutated(random_, json.loads(metadata[NOTES])))
    if random_.random() < 0.2:
        text = random_.choice(("[" * 200_000, text[: random_.randrange(len(text))], "", "null", text + " "))
    metadata[NOTES] = text.encode(errors="replace").decode()
    save_file(load_file(folder / _WEIGHTS), folder / _WEIGHTS, metadata=metadata)


def _forged_name(random_: random.Random, folder: Path) -> None:
    """A name or an operand of the stored plan, with the digest that belongs to it."""
    metadata = _metadata_of(folder)
    data = json.loads(metadata[METADATA])
    site = random_.choice(data["plan"]["sites"])
    owner, _, name = site[1].rpartition(".")
    names = (
        "LayerNorm",
        "dense",
        "__class__",
        "forward",
        "x\"),print('x'),getattr(self,\"x",
        "a b_quantizer",
        name + "_2",
        name,
    )
    change = random_.randrange(4)
    if change == 0:
        site[1] = f"{owner}.{random_.choice(names)}"
    elif change == 1:
        site[1] = f"{random_.choice(('bert', 'bert.encoder', 'bert.encoder.layer.*', 'x.y', ''))}.{name}"
    elif change == 2:
        site[4] = random_.choice((0, 1, 2, "weight", "input", "other", 'x"', -1, 10**9))
    else:
        site[random_.randrange(len(site))] = random_.choice(random_.choice(data["plan"]["sites"]))
    text = json.dumps(data)
    metadata.update({METADATA: text, DIGEST: hashlib.sha256(text.encode()).hexdigest()})
    save_file(load_file(folder / _WEIGHTS), folder / _WEIGHTS, metadata=metadata)


def _ranges(random_: random.Random, folder: Path) -> None:
    tensors = load_file(folder / _WEIGHTS)
    names = sorted(name for name in tensors if name.endswith((_RANGE, _ROUNDING, _INTEGERS)))
    for _ in range(random_.choice((1, 1, 3))):
        name = random_.choice(names)
        made = _range(random_, tensors.get(name, torch.ones(())))
        if made is None:
            tensors.pop(name, None)
        else:
            tensors[name] = made.clone().contiguous()
    if random_.random() < 0.1:
        owner, end = random_.choice(("bert", "x", "bert.pooler.dense")), random_.choice((_RANGE, _ROUNDING, _INTEGERS))
        tensors[f"{owner}._input_quantizer{end}"] = torch.ones(())
    save_file(tensors, folder / _WEIGHTS, metadata=_metadata_of(folder))


_SHAPES: tuple[tuple[int, ...], ...] = ((2,), (0,), (16,), (16, 1), (1, 16), (24, 1), (31, 1), (1, 1, 1))


def _range(random_: random.Random, value: Tensor) -> Tensor | None:
    """Another range in the place of one; ``None``: none."""
    change = random_.randrange(7)
    if change == 0:
        return value.reshape(-1)
    if change == 1:
        return value.reshape(1, -1)
    if change == 2:
        return value.reshape(-1)[:1].reshape(())
    if change == 3:
        return torch.ones(random_.choice(_SHAPES))
    if change == 4:
        return value.to(random_.choice((torch.int64, torch.bool, torch.float8_e4m3fn, torch.bfloat16)))
    if change == 5:
        return value * random_.choice((0.0, -1.0, float("nan"), float("inf"), 2.0))
    return None


def _bytes(random_: random.Random, folder: Path) -> None:
    """Anywhere in one of the files; of the weights in the header."""
    file = random_.choice([file for name in ("config.json", _WEIGHTS, _REPORT) if (file := folder / name).exists()])
    content = bytearray(file.read_bytes())
    end = min(len(content), 8 + int.from_bytes(content[:8], "little")) if file.name == _WEIGHTS else len(content)
    change = random_.randrange(4)
    if change == 0:
        del content[random_.randrange(end) :]
    elif change == 1:
        content[random_.randrange(min(end, 40))] = random_.randrange(256)
    else:
        for _ in range(random_.choice((1, 2, 8))):
            content[random_.randrange(end)] = random_.randrange(256)
    file.write_bytes(bytes(content))


def _index(random_: random.Random, folder: Path) -> None:
    data = mutated(random_, json.loads((folder / _INDEX).read_text()))
    if random_.random() < 0.3:
        data = json.loads((folder / _INDEX).read_text())
        name = random_.choice([*data["weight_map"]])
        data["weight_map"][name] = random_.choice(
            ("../case/config.json", "/dev/zero", "none.safetensors", "config.json", "")
        )
    (folder / _INDEX).write_text(json.dumps(data))


def _report(random_: random.Random, folder: Path) -> None:
    path = folder / _REPORT
    if random_.random() < 0.3 or not path.exists():
        path.write_bytes(random_.choice((b"\xff\xfe", b"[" * 200_000, b"", b"null", bytes(1000))))
    else:
        path.write_text(json.dumps(mutated(random_, json.loads(path.read_text()))))


def _special(random_: random.Random, folder: Path) -> None:
    """Something that is no file, in the place of one."""
    path = folder / random_.choice(("config.json", _WEIGHTS, _REPORT, "generation_config.json"))
    path.unlink(missing_ok=True)
    change = random_.randrange(4)
    if change == 0:
        os.mkfifo(path)
    elif change == 1:
        path.mkdir()
    else:
        path.symlink_to(random_.choice(("/dev/zero", "/dev/null", "/proc/self/mem", path.name, "nowhere")))


KINDS: dict[str, Callable[[random.Random, Path], None]] = {
    "quantization_config": _config,
    "config.json": _model_config,
    "plan": _lock,
    "forged plan": _forged_name,
    "notes": _notes,
    "ranges": _ranges,
    "bytes": _bytes,
    "index": _index,
    "report": _report,
    "special files": _special,
}
