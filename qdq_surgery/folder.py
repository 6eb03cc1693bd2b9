"""Model folders: what ``save_pretrained`` writes, in; the converted model with its rules and a report, out and in."""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import transformers
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from qdq_surgery.calibrate import CALIBRATION_ATTRIBUTE, Calibration
from qdq_surgery.convert import convert
from qdq_surgery.converted import plan_of, quantizers
from qdq_surgery.errors import AlreadyConvertedError, ModelError
from qdq_surgery.rule_file import shipped_rules
from qdq_surgery.version import __version__

__all__ = ["REPORT_NAME", "RULES_NAME", "check_new", "load_model", "save_model"]

RULES_NAME = "qdq_rules.yaml"
_RANGE = "_quantizer._amax"
REPORT_NAME = "qdq_report.json"

#: Files of a tokenizer, which a converted model needs as the float one does.
_TOKENIZER = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "*.model",
    "spiece*",
)


def load_model(folder: str | Path) -> PreTrainedModel:
    """Load a model with the head that it was saved with, in eval mode, from the folder alone.

    A folder that :func:`save_model` wrote gives the converted model, with its ranges.

    Raises:
        ModelError: The folder is none that ``save_pretrained`` wrote; says what is missing.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ModelError(f"{folder} is no folder; give one that model.save_pretrained(...) wrote")
    if not (path / "config.json").is_file():
        raise ModelError(f"{folder} has no config.json; give a folder that model.save_pretrained(...) wrote")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise ModelError(f"{folder} has no weights (*.safetensors); save the model there with save_pretrained")
    rules = path / RULES_NAME
    before = transformers_logging.get_verbosity()
    try:
        kind = _model_class(path)
        if rules.is_file():  # it would report every range as a weight that it does not expect
            transformers_logging.set_verbosity_error()
        loaded = kind.from_pretrained(path, local_files_only=True, output_loading_info=True)
    except ModelError:
        raise
    except Exception as error:  # whatever a damaged folder makes of transformers, torch and safetensors
        reason = str(error).strip().splitlines()
        raise ModelError(f"{folder} cannot be loaded: {reason[0] if reason else type(error).__name__}") from error
    finally:
        transformers_logging.set_verbosity(before)
    model, info = cast("tuple[PreTrainedModel, dict[str, Any]]", loaded)
    _check_weights(folder, type(model).__name__, info, converted=rules.is_file())
    model.eval()
    return _with_quantizers(model, path, rules) if rules.is_file() else model


def _with_quantizers(model: PreTrainedModel, path: Path, rules: Path) -> PreTrainedModel:
    """The model converted by the folder's rules, with the folder's ranges."""
    convert(model, rules, inplace=True)
    ranges: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            names = [name for name in opened.keys() if name.endswith(_RANGE)]  # noqa: SIM118 (it is no dict)
            ranges.update({name: opened.get_tensor(name) for name in names})
    unknown = model.load_state_dict(ranges, strict=False).unexpected_keys
    if unknown:
        raise ModelError(
            f"{path} has ranges of {len(unknown)} quantizers that its rules do not make (first: {unknown[0]}); it was "
            "written under other rules, default descriptors or another transformers"
        )
    _as_reported(model, path)
    without = [name for name, each in quantizers(model).items() if each.enabled and each.amax is None]
    if ranges and without:
        raise ModelError(
            f"{path} has no range for {len(without)} of its quantizers (first: {without[0]}), and has for others; it "
            "was written under other rules, default descriptors or another transformers"
        )
    return model


def _as_reported(model: PreTrainedModel, path: Path) -> None:
    """What the report knows beside the weights: which quantizers are disabled, and how the others were calibrated."""
    if not (path / REPORT_NAME).is_file():
        return
    report = json.loads((path / REPORT_NAME).read_text(encoding="utf-8"))
    for name, each in quantizers(model).items():
        if name in report.get("disabled", ()):
            each.disable()
    if "calibration" in report:
        vars(model)[CALIBRATION_ATTRIBUTE] = Calibration.from_json(report["calibration"])


def _model_class(path: Path) -> type[PreTrainedModel]:
    """The class that the folder's config names: none other, so that no head is lost."""
    names = json.loads((path / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    name = names[0] if isinstance(names, list) and names and isinstance(names[0], str) else None
    if name is None:
        raise ModelError(
            f"{path}/config.json names no class under 'architectures'; save the model with save_pretrained"
        )
    kind = getattr(transformers, name, None)
    if not (isinstance(kind, type) and issubclass(kind, PreTrainedModel)):
        raise ModelError(
            f"{path}/config.json names the class '{name}', which transformers {transformers.__version__} lacks; "
            "load it yourself and call qdq_surgery.convert(model)"
        )
    return kind


def _check_weights(folder: str | Path, name: str, info: dict[str, Any], converted: bool) -> None:
    ranges = [str(key) for key in info.get("unexpected_keys", ()) if str(key).endswith(_RANGE)]
    if ranges and not converted:
        raise AlreadyConvertedError(
            f"{folder} holds ranges of {len(ranges)} quantizers (first: {ranges[0]}); give the float model"
        )
    for what in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in info.get(what, ()))
        if keys:
            raise ModelError(
                f"{folder} has no fitting weights for {len(keys)} parameters of {name} (first: {keys[0]}); save the "
                "model with the head that its config names"
            )


def check_new(folder: str | Path) -> None:
    """Whether a model can be written there.

    Raises:
        ModelError: The folder exists and is not empty.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ModelError(f"{folder} exists and is not empty; give a new folder")


def save_model(qmodel: PreTrainedModel, folder: str | Path, source: str | Path | None = None) -> None:
    """Write a converted model: weights (safetensors), config, rules, report, and the tokenizer of ``source``.

    The folder appears whole or not at all.

    Raises:
        ModelError: The model is not converted, or the folder exists and is not empty.
    """
    check_new(folder)
    path, made = Path(folder), plan_of(qmodel)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".qdq-surgery-") as temporary:
            draft = Path(temporary) / "model"
            qmodel.save_pretrained(draft)
            for pattern in _TOKENIZER if source is not None else ():
                for file in Path(str(source)).glob(pattern):
                    if not (draft / file.name).exists():
                        shutil.copy(file, draft / file.name)
            _write_rules(made.rules.files, made.rules.text, draft)
            report: dict[str, Any] = {"versions": _versions(), **made.to_json()}
            calibration = vars(qmodel).get(CALIBRATION_ATTRIBUTE)
            if calibration is not None:
                report["calibration"] = calibration.now(qmodel).to_json()
            report["disabled"] = [name for name, each in quantizers(qmodel).items() if not each.enabled]
            (draft / REPORT_NAME).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
            if path.exists():
                path.rmdir()
            draft.rename(path)
    except OSError as error:
        raise ModelError(f"{folder} cannot be written: {error.strerror or error}") from error


def _write_rules(files: tuple[Path, ...], text: str, folder: Path) -> None:
    (folder / RULES_NAME).write_text(text, encoding="utf-8")
    shipped = {path.resolve() for path in shipped_rules().values()}
    for file in files[1:]:
        # A shipped rule set is found by name wherever the package is installed; others travel along.
        if file not in shipped:
            shutil.copy(file, folder / file.name)


def _versions() -> dict[str, str]:
    others = {name: version(name) for name in ("transformers", "torch", "pytorch-quantization")}
    return {"qdq-surgery": __version__, **others}
