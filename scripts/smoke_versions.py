"""One row of the matrix of versions: what works in the environment that runs this. scripts/test_versions.sh calls it.

python scripts/smoke_versions.py RESULT.json SAVED_HERE [--read SAVED_BY_ANOTHER]
python scripts/smoke_versions.py RESULT.json --read SAVED_BY_ANOTHER --only-read

Tiny random models, made from configs: nothing is fetched. The result holds, by step and model, ``"ok"``,
``"-"`` where an earlier step failed, or the error.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from deberta_v3 import OPTIONS as DEBERTA_V3

_BERT = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
_DISTILBERT = {
    "vocab_size": 60,
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "hidden_dim": 48,
    "max_position_embeddings": 40,
}
_DEBERTA = {**_BERT, **DEBERTA_V3}
_MODERNBERT = {
    **_BERT,
    "num_hidden_layers": 3,
    "local_attention": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "deberta-v2": _DEBERTA,
    "distilbert": _DISTILBERT,
    "albert": {**_BERT, "embedding_size": 16},
    "electra": {**_BERT, "embedding_size": 16},
    "modernbert": _MODERNBERT,
}

#: Another version may order the operations of a float kernel otherwise; the logits are of the order of 1. (Integers
#: differ only where a value lies at a tie of two; in these models none does.)
ACROSS = 1e-5
#: A runtime sums in another order, and a value at a tie then falls into the next of 255 steps. That each site alone is
#: right is what the certificate of export_onnx has shown.
SERVED = 0.2

_MOST = 300


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps and write what they came to; 0 if all are right."""
    arguments = _parser().parse_args(argv)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    result = _Result()
    try:
        import qdq_surgery  # noqa: F401
    except Exception as error:
        result.note("import", "", error)
    else:
        result.note("import", "", None)
        for name, options in MODELS.items():
            if not arguments.only_read:
                _Smoke(name, options, arguments.saved, result).run()
            if arguments.read is not None:
                result.attempt("across", name, partial(_read, arguments.read, name))
    arguments.result.write_text(json.dumps({"versions": _versions(), "steps": result.steps}, indent=1))
    return 0 if result.is_right else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("result", type=Path, help="the JSON file to write")
    parser.add_argument("saved", type=Path, nargs="?", help="the folder to save models in")
    parser.add_argument("--read", type=Path, help="a folder that another environment saved models in")
    parser.add_argument("--only-read", action="store_true", help="load what is there; save nothing")
    return parser


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


class _Result:
    """What came of each step, by model."""

    def __init__(self) -> None:
        self.steps: dict[str, dict[str, str]] = {}

    @property
    def is_right(self) -> bool:
        return all(cell == "ok" for step in self.steps.values() for cell in step.values())

    def note(self, step: str, model: str, error: Exception | None) -> None:
        told = "ok" if error is None else " ".join(f"{type(error).__name__}: {error}".split())[:_MOST]
        self.steps.setdefault(step, {})[model] = told

    def attempt(self, step: str, model: str, do: Callable[[], None]) -> bool:
        """Whether the step went well."""
        try:
            do()
        except Exception as error:
            self.note(step, model, error)
            return False
        self.note(step, model, None)
        return True


class _Smoke:
    """The steps of one model, each on what the one before left."""

    def __init__(self, name: str, options: dict[str, Any], saved: Path, result: _Result) -> None:
        self.name, self.options, self.saved, self.result = name, options, saved, result
        self.float_model: Any = None
        self.model: Any = None
        self.loaded: Any = None
        self.frozen: Any = None

    def run(self) -> None:
        steps: list[tuple[str, Callable[[], None]]] = [
            ("convert", self.convert),
            ("exact", self.exact),
            ("calibrate", self.calibrate),
            ("reload", self.reload),
            ("export", self.export),
            ("serve", self.serve),
            ("freeze", self.freeze),
            ("compile", self.compile),
        ]
        goes_on = True
        for step, do in steps:
            if goes_on:
                goes_on = self.result.attempt(step, self.name, do)
            else:
                self.result.steps.setdefault(step, {})[self.name] = "-"

    def convert(self) -> None:
        import qdq_surgery as qs

        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(self.name, **self.options)
        self.float_model = transformers.AutoModelForTokenClassification.from_config(config, attn_implementation="eager")
        self.float_model.eval()
        with torch.no_grad():
            for name, parameter in self.float_model.named_parameters():
                if parameter.ndim > 1 and "embedding" not in name:
                    parameter.mul_(4.0)
        self.model = qs.convert(self.float_model)

    def exact(self) -> None:
        import qdq_surgery as qs

        with qs.quantization_disabled(self.model):
            for batch in _batches():
                _check_equal(_logits(self.model, batch), _logits(self.float_model, batch), "logits, in float")

    def calibrate(self) -> None:
        import qdq_surgery as qs

        qs.calibrate(self.model, _batches())
        missing = [name for name, quantizer in qs.quantizers(self.model).items() if quantizer.amax is None]
        if missing:
            raise AssertionError(f"no range in {', '.join(missing[:3])}")
        if torch.equal(_logits(self.model, _batches()[0]), _logits(self.float_model, _batches()[0])):
            raise AssertionError("the quantizers change nothing")

    def reload(self) -> None:
        folder = self.saved / self.name
        self.model.save_pretrained(folder)
        expected = {f"logits.{index}": _logits(self.model, batch) for index, batch in enumerate(_batches())}
        save_file({**expected, **_ranges(self.model)}, self.saved / f"{self.name}.safetensors")
        self.loaded = _load(folder)
        _check_same(self.loaded, self.saved, self.name, tolerance=0.0)

    def export(self) -> None:
        import qdq_surgery as qs

        path = self.saved / f"{self.name}.onnx"
        qs.export_onnx(self.loaded, path, _batches()[0], target="onnxruntime", overwrite=True)

    def serve(self) -> None:
        import qdq_surgery as qs

        served = qs.load_onnx(self.saved / f"{self.name}.onnx")
        for batch in _batches():
            found, wanted = served(**batch).logits, _logits(self.loaded, batch)
            _check_equal(found, wanted, "logits, on ONNX Runtime", tolerance=SERVED)

    def freeze(self) -> None:
        import qdq_surgery as qs

        frozen = qs.freeze(self.loaded)
        folder = self.saved / f"{self.name}-frozen"
        frozen.save_pretrained(folder)
        self.frozen = _load(folder)
        for batch in _batches():
            found, wanted = _logits(frozen, batch), _logits(self.loaded, batch)
            _check_equal(found, wanted, "logits, frozen", tolerance=ACROSS)
            _check_equal(_logits(self.frozen, batch), found, "logits, frozen and loaded again")

    def compile(self) -> None:
        for what, model in (("converted", self.loaded), ("frozen", self.frozen)):
            torch._dynamo.reset()
            batch = _batches()[0]
            compiled = torch.compile(model, backend="eager")  # what may differ is what dynamo makes of the model
            _check_equal(_logits(compiled, batch), _logits(model, batch), f"{what} and compiled", tolerance=ACROSS)


def _batches() -> list[dict[str, Tensor]]:
    made = []
    for shape in ((2, 7), (3, 12)):
        generator = torch.Generator().manual_seed(shape[1])
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, shape[1] - 2 :] = 0
        made.append({"input_ids": torch.randint(3, 60, shape, generator=generator), "attention_mask": mask})
    return made


def _logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(**batch).logits)


def _ranges(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if name.endswith("_amax")}


def _load(folder: Path) -> Any:
    # (By name, as a user's own program does it: the package is imported, and transformers finds the rest.)
    return transformers.AutoModelForTokenClassification.from_pretrained(folder, attn_implementation="eager").eval()


def _read(saved: Path, name: str) -> None:
    if not (saved / f"{name}.safetensors").exists():
        raise AssertionError("the other environment saved nothing to load")
    _check_same(_load(saved / name), saved, name, tolerance=ACROSS)


def _check_same(model: Any, saved: Path, name: str, tolerance: float) -> None:
    """Ranges are those that were saved, to the bit, and so are the logits, within ``tolerance``."""
    wanted = load_file(saved / f"{name}.safetensors")
    logits = {key: wanted.pop(key) for key in list(wanted) if key.startswith("logits.")}
    ranges = _ranges(model)
    if ranges.keys() != wanted.keys():
        raise AssertionError(f"other ranges: {', '.join(sorted(ranges.keys() ^ wanted.keys())[:3])}")
    for key, value in wanted.items():
        _check_equal(ranges[key], value, key)
    for index, batch in enumerate(_batches()):
        _check_equal(_logits(model, batch), logits[f"logits.{index}"], f"logits.{index}", tolerance)


def _check_equal(found: Tensor, wanted: Tensor, what: str, tolerance: float = 0.0) -> None:
    if found.shape != wanted.shape:
        raise AssertionError(f"{what}: shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}")
    difference = float((found - wanted).abs().max())
    if not difference <= tolerance:
        raise AssertionError(f"{what}: differ by {difference:.3g}, at most {tolerance:g} is right")


if __name__ == "__main__":
    raise SystemExit(main())
