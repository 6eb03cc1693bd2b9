"""Take every text encoder of transformers through every stage: tiny models with random weights, all heads.

    python scripts/sweep_models.py [TYPE ...] [--results FILE] [--write docs/models.md]

The stages of a type: *exact* (each head converts by qdqbert and computes the same bits with its quantizers off, at two
lengths, with a mask and without, in eval and in training mode, loss and gradients included), *padding* (ranges of a
padded batch are those of each text alone), *reload* (saved, loaded, the same outputs), *onnxruntime* and *openvino*
(exported, with a certificate and the share of the encoder's linears that run in INT8). Results are kept in FILE, a JSON
line for each type, and a type that is there already is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs
from lineage import KIN, Kin, build, examples, heads, labels

SHAPES = ((2, 8), (3, 12))

#: Products of another number of rows are rounded otherwise, and a value may then come to stand in another bin.
RTOL = 1e-4

TARGETS = ("onnxruntime", "openvino")


class StageError(Exception):
    """A stage found something wrong."""


def tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """All tensors of an output, named."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from tensors(item, f"{name}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors(item, f"{name}.{index}")


def run(model: PreTrainedModel, batch: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs, with what is random drawn from one seed."""
    torch.manual_seed(7)
    return dict(tensors(model(**batch)))


def exact(kin: Kin, head: str) -> str:
    """One head: the same bits with the quantizers off; what is quantized, in words."""
    model = build(kin, head)
    qmodel = qs.convert(model)
    plan = qs.plan(model)
    for training in (False, True):
        model.train(training)
        qmodel.train(training)
        for shape in SHAPES:
            for mask in (True, False):
                batch = examples(model, shape, mask=mask)
                batch.update(labels(model, batch))
                _same_forward(model, qmodel, batch)
        _same_gradients(model, qmodel, batch)
    unlisted = [kind for kind, c in plan.coverage.items() if c.found != c.quantized + c.refused]
    if unlisted:
        raise StageError(f"{unlisted[0]}: neither quantized nor refused")
    return "; ".join(f"{kind} {c.quantized}/{c.found}" for kind, c in plan.coverage.items())


def _same_forward(model: PreTrainedModel, qmodel: PreTrainedModel, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        wanted = run(model, batch)
        with qs.quantization_disabled(qmodel):
            found = run(qmodel, batch)
    if wanted.keys() != found.keys():
        raise StageError(f"outputs {sorted(found)} in place of {sorted(wanted)}")
    for name, value in wanted.items():
        if not torch.equal(value, found[name]) and not (
            value.isnan().any() and torch.allclose(value, found[name], equal_nan=True, rtol=0, atol=0)
        ):
            raise StageError(f"output {name} differs with the quantizers off, shape {tuple(value.shape)}")


def _same_gradients(model: PreTrainedModel, qmodel: PreTrainedModel, batch: dict[str, Any]) -> None:
    found = []
    for each in (model, qmodel):
        each.zero_grad()
        with qs.quantization_disabled(qmodel):
            outputs = run(each, batch)
            loss = next((v for name, v in outputs.items() if name.endswith("loss")), None)
            if loss is None:
                loss = torch.stack([v.float().mean() for v in outputs.values() if v.requires_grad]).sum()
            loss.backward()
        found.append({name: p.grad for name, p in each.named_parameters()})
    if not any(gradient is not None for gradient in found[0].values()):
        raise StageError("no gradients at all")
    for name, gradient in found[0].items():
        other = found[1][name]
        if (gradient is None) != (other is None) or (gradient is not None and not torch.equal(gradient, other)):
            raise StageError(f"the gradient of {name} differs with the quantizers off")


def padding(kin: Kin, head: str) -> str:
    """Ranges of a padded batch, against those of each text alone without a mask."""
    model = qs.convert(build(kin, head), inplace=True)
    batch = examples(model, (3, 12))
    if not any(name.endswith("attention_mask") for name in batch):
        return "takes no mask"
    found = qs.collect(model, [batch], histograms=False)
    wanted = qs.collect(model, [_alone(batch, row) for row in range(3)], histograms=False)
    if _mixes(model, batch):
        return "the model mixes padding into texts"
    for name, seen in found.seen.items():
        if not torch.allclose(seen.amax, wanted.seen[name].amax, rtol=RTOL, atol=1e-6):
            raise StageError(
                f"{name}: padded {seen.amax.max():.6g}, each text alone {wanted.seen[name].amax.max():.6g}"
            )
    return "as each text alone"


def _mixes(model: PreTrainedModel, batch: dict[str, Any]) -> bool:
    """Whether the float model computes something else for a text when padding stands behind it."""
    with torch.no_grad(), qs.quantization_disabled(model):
        name, whole = next((n, v) for n, v in run(model, batch).items() if v.ndim == 3)
        for row in range(len(whole)):
            alone = run(model, _alone(batch, row))[name]
            length = alone.shape[1]
            if not torch.allclose(alone[0], whole[row, :length], rtol=0, atol=1e-3 * float(whole.abs().max())):
                return True
    return False


def _alone(batch: dict[str, Any], row: int) -> dict[str, Any]:
    """One text without its padding."""
    made = {name: value[row : row + 1] if isinstance(value, Tensor) else value for name, value in batch.items()}
    for prefix in ("", "decoder_"):
        mask = made.pop(f"{prefix}attention_mask", None)
        if mask is None:
            continue
        length, tokens = int(mask.sum()), mask.shape[-1]
        for name in (f"{prefix}input_ids", *(("bbox",) if not prefix else ())):
            if name in made and made[name].shape[1] == tokens:
                made[name] = made[name][:, :length]
    return made


def calibrated(kin: Kin, head: str, rules: str) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A quantized model, and the batch that it was calibrated with."""
    model = qs.convert(build(kin, head), rules, inplace=True)
    batch = examples(model, (3, 12), mask=True)
    qs.calibrate(model, [batch])
    return model, batch


def reload(kin: Kin, head: str) -> str:
    """Saved and loaded: the same outputs."""
    model, batch = calibrated(kin, head, "qdqbert")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        model.save_pretrained(folder)
        again = type(model).from_pretrained(folder)
        wanted, found = run(model, batch), run(again.eval(), batch)
    for name, value in wanted.items():
        if not torch.equal(value, found[name]):
            raise StageError(f"output {name} differs after loading")
    return "equal"


def exported(kin: Kin, head: str, target: str) -> str:
    """A file with a certificate, and how many of its linears the runtime runs in INT8."""
    model, batch = calibrated(kin, head, target)
    with tempfile.TemporaryDirectory() as folder:
        # (Another length than the one that it is certified with: both stay open.)
        given = examples(model, (2, 16))
        file = qs.export_onnx(model, Path(folder) / "model.onnx", target=target, example_inputs=given)
        certificate = qs.certify(model, file.path, batch, (target,))
        if not certificate.agrees:
            raise StageError(certificate.to_text().splitlines()[0])
        share = qs.receipt(file.path, target).linear
    return "no linears" if share is None else f"{share:.0%} of the linears in INT8"


def stages(kin: Kin) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every stage of a type: its name, and what runs it."""
    every = heads(kin.model_type)
    for head in every:
        yield f"exact {head}", lambda head=head: exact(kin, head)  # type: ignore[misc]
    yield "padding", lambda: padding(kin, every[0])
    yield "reload", lambda: reload(kin, every[0])
    for target in TARGETS:
        yield target, lambda target=target: exported(kin, every[0], target)  # type: ignore[misc]


def sweep(kin: Kin, only: str = "") -> dict[str, Any]:
    """All stages of one type; a stage that fails does not end the others."""
    row: dict[str, Any] = {"type": kin.model_type, "passed": {}, "failed": {}}
    for name, stage in stages(kin):
        if not name.startswith(only):
            continue
        begin = time.perf_counter()
        try:
            row["passed"][name] = stage()
        except Exception as error:
            row["failed"][name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            row.setdefault("trace", {})[name] = "".join(traceback.format_exception(error)[-6:])[-1500:]
        row.setdefault("seconds", {})[name] = round(time.perf_counter() - begin, 1)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("types", nargs="*", help="model types; all that are listed if left out")
    parser.add_argument("--results", type=Path, default=Path("sweep.jsonl"))
    parser.add_argument("--only", default="", help="only the stages whose name begins so")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("qdq_surgery").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    lines = arguments.results.read_text().splitlines() if arguments.results.exists() else []
    done = {json.loads(each)["type"] for each in lines}
    for kin in KIN:
        if kin.model_type in done or (arguments.types and kin.model_type not in arguments.types):
            continue
        row = sweep(kin, arguments.only)
        with arguments.results.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{kin.model_type:24s} {len(row['passed'])} passed, {sum(row['seconds'].values()):.0f} s", flush=True)
        for name, why in row["failed"].items():
            print(f"    {name}: {why}", flush=True)


if __name__ == "__main__":
    main()
