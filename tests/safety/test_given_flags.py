"""Flags: what is neither true nor false is said, before anything is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from architectures import build
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.safety.given_flags import check_flags

BATCH = {"input_ids": torch.arange(3, 9)[None]}

CALLS: dict[str, Callable[[PreTrainedModel, Any, Path], object]] = {
    "inplace": lambda model, flag, _: qs.convert(model, inplace=flag),
    "moments": lambda model, flag, _: qs.collect(qs.convert(model), [BATCH], moments=flag),
    "histograms": lambda model, flag, _: qs.collect(qs.convert(model), [BATCH], histograms=flag),
    "weights": lambda model, flag, _: qs.learn_ranges(qs.convert(model), weights=flag),
    "layers": lambda model, flag, _: qs.sensitivity(qs.convert(model), [BATCH], layers=flag),
    "overwrite": lambda model, flag, path: qs.report(qs.convert(model), path / "report.html", overwrite=flag),
    "parity": lambda model, flag, path: qs.export_onnx(qs.convert(model), path / "model.onnx", parity=flag),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_word_is_no_flag(name: str, tmp_path: Path) -> None:
    model = build("bert", "BertModel", num_hidden_layers=1)
    with pytest.raises(qs.OptionError, match=rf"^{name}='no' is neither true nor false; give True or False$"):
        CALLS[name](model, "no", tmp_path)
    assert not qs.quantizers(model)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("value", [True, False, np.bool_(True)])
def test_flags(value: object) -> None:
    check_flags(any=value)


def test_freeze() -> None:
    qmodel = qs.convert(build("bert", "BertModel", num_hidden_layers=1))
    with pytest.raises(qs.OptionError, match="inplace=None is neither"):
        qs.freeze(qmodel, inplace=None)  # type: ignore[arg-type]
