"""Take every text encoder of transformers through every stage: tiny models with random weights, all heads.

    python scripts/sweep_models.py [TYPE ...] [--results FILE]
    python scripts/sweep_models.py --results FILE --write docs/models.md

The stages of a type: *exact* (each head converts by qdqbert and computes the same bits with its quantizers off, at two
lengths, with a mask and without, in eval and in training mode, loss and gradients included), *padding* (ranges of a
padded batch are those of each text alone), *reload* (saved, loaded, the same outputs), *onnxruntime* and *openvino*
(exported, with a certificate and the share of the encoder's linears that run in INT8). Results are kept in FILE, and a
stage that has passed is not run again.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs
from lineage import KIN, OTHERS, OUTSIDE, Kin, build, examples, heads, labels

SHAPES = ((2, 8), (3, 12))

#: Products of another number of rows are rounded otherwise, and a value may then come to stand in another bin.
RTOL = 1e-4

TARGETS = ("onnxruntime", "openvino")


#: What the counts are of, in the order of the document.
KINDS = ("linear", "matmul", "residual add")

_HEADING = """# Model types

Every text encoder in the registries of transformers, taken through every stage by `python scripts/sweep_models.py`,
with tiny models and random weights; that script writes this table. `tests/ecosystem/test_lineage.py` holds the
types, the numbers of heads, the counts (beside one of another make) and that the bare model is exact; the other
cells are what the script found. *heads*: how many of those that the auto classes know compute the same bits with
their quantizers off, at two lengths, with a mask and without, in eval and in training mode, loss and gradients
included. *linears*, *matmuls*, *adds*: quantized by `qdqbert`, of those in the layers of the tiny model; the rest
is listed as refused, with a reason. *padding*: ranges of a padded batch against those of each text alone. *reload*:
the same outputs after saving and loading. *ONNX Runtime*, *OpenVINO*: exported with a certificate that agrees, and
how many of the linears run in INT8 there.

| type | heads | linears | matmuls | adds | padding | reload | ONNX Runtime | OpenVINO |
|---|--:|--:|--:|--:|---|---|---|---|"""


_BEYOND = """## Images and sound

The same rules, on encoders of images and of sound: what of their layers is a linear, an attention in the open or a
residual add is quantized, and the rest (convolutions, attention inside one function of torch) is listed as refused.

| type | heads | linears | matmuls | adds | reload | ONNX Runtime | OpenVINO |
|---|--:|--:|--:|--:|---|---|---|"""


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
    return "; ".join(f"{kind} {c.quantized}/{c.found}" for kind, c in plan.coverage.items())


def _same_forward(model: PreTrainedModel, qmodel: PreTrainedModel, batch: dict[str, Any]) -> None:
    with torch.no_grad():
        wanted = run(model, batch)
        with qs.quantization_disabled(qmodel):
            found = run(qmodel, batch)
    if wanted.keys() != found.keys():
        raise StageError(f"outputs {sorted(found)} in place of {sorted(wanted)}")
    for name, value in wanted.items():
        if not _equal(value, found[name]):
            raise StageError(f"output {name} differs with the quantizers off, shape {tuple(value.shape)}")


def _equal(left: Tensor, right: Tensor) -> bool:
    """To the bit; a tiny random model may make a nan, and does so alike."""
    return left.shape == right.shape and torch.equal(left.nan_to_num(), right.nan_to_num())


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
    batch = examples(model, (3, 12))
    try:
        qs.calibrate(model, [batch])
    except qs.CalibrationError:  # padding that cannot be told from text is the other stage's
        batch = examples(model, (3, 12), mask=False)
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
        if not _equal(value, found[name]):
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
        first = next(iter(given.values()))
        share = qs.receipt(file.path, target, shape=(1, first.shape[-1]) if first.ndim < 4 else None).linear
    return "no linears" if share is None else f"{share:.0%} of the linears in INT8"


def stages(kin: Kin) -> Iterator[tuple[str, Callable[[], str]]]:
    """Every stage of a type: its name, and what runs it."""
    every = heads(kin.model_type)
    for head in every:
        yield f"exact {head}", lambda head=head: exact(kin, head)  # type: ignore[misc]
    if kin in KIN:
        yield "padding", lambda: padding(kin, every[0])
    yield "reload", lambda: reload(kin, every[0])
    for target in TARGETS:
        yield target, lambda target=target: exported(kin, every[0], target)  # type: ignore[misc]


def sweep(kin: Kin, only: str, known: dict[str, dict[str, str]]) -> None:
    """Run the stages of one type that have not passed yet; one that fails does not end the others."""
    for name, stage in stages(kin):
        if not name.startswith(only) or "passed" in known.get(name, {}):
            continue
        begin = time.perf_counter()
        try:
            known[name] = {"passed": stage()}
        except Exception as error:
            known[name] = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        (what, said), *_ = known[name].items()
        print(f"{kin.model_type:24s} {name}: {what}, {time.perf_counter() - begin:.0f} s: {said}", flush=True)


def row(kin: Kin, known: dict[str, dict[str, str]]) -> str:
    """The line of a type in the document."""
    exacts = [known.get(f"exact {head}", {"failed": "not run"}) for head in heads(kin.model_type)]
    passed = [said["passed"] for said in exacts if "passed" in said]
    counts = dict(part.rsplit(" ", 1) for part in passed[0].split("; ")) if passed else {}
    heads_ = f"{len(passed)} of {len(exacts)}"
    named = ("padding", "reload", *TARGETS) if kin in KIN else ("reload", *TARGETS)
    rest = [known.get(stage, {"failed": "not run"}) for stage in named]
    cells = [kin.model_type, heads_, *(counts.get(kind, "") for kind in KINDS)]
    cells += [_short(each) for each in rest]
    return "| " + " | ".join(cells) + " |"


def _short(said: dict[str, str]) -> str:
    """What a cell says of a stage."""
    if "passed" in said:
        return said["passed"].removesuffix(" of the linears in INT8")
    why = re.sub(r"/\S*/", "", said["failed"].split(": ", 1)[-1]).replace("|", "/")
    return "no: " + (why if len(why) <= 110 else why[:107] + "...")


def table(kin: Sequence[Kin], results: dict[str, dict[str, dict[str, str]]]) -> list[str]:
    """The lines of all types, by their names."""
    return [row(each, results.get(each.model_type, {})) for each in sorted(kin, key=lambda each: each.model_type)]


def document(results: dict[str, dict[str, dict[str, str]]]) -> str:
    """``docs/models.md``."""
    outside = [f"- `{name}`: {why}." for name, why in sorted(OUTSIDE.items())]
    texts = [_HEADING, *table(KIN, results), "", "## Not taken through the stages", "", *outside, ""]
    return "\n".join([*texts, _BEYOND, *table(OTHERS, results), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("types", nargs="*", help="model types; all that are listed if left out")
    parser.add_argument("--results", type=Path, default=Path("sweep.json"))
    parser.add_argument("--only", default="", help="only the stages whose name begins so")
    parser.add_argument("--write", type=Path, help="write the document of what is in the results")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("qdq_surgery").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    results = json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    if arguments.write is not None:
        arguments.write.write_text(document(results))
        return
    for kin in (*KIN, *OTHERS):
        if not arguments.types or kin.model_type in arguments.types:
            sweep(kin, arguments.only, results.setdefault(kin.model_type, {}))
            arguments.results.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
