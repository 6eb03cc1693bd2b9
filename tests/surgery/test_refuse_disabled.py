"""What reads or changes quantizers is refused while a ``quantization_disabled`` holds, and not silently left undone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from frozen_models import calibrated
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.errors import ModelError

CALLS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "export_onnx": lambda model: qs.export_onnx(model, "never.onnx"),
    "certify": lambda model: qs.certify(model, "never.onnx", {}),
    "recalibrate_weights": qs.recalibrate_weights,
    "learn_ranges": qs.learn_ranges,
}


@pytest.mark.parametrize("name", CALLS)
def test_it_is_refused_with_the_way_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    qmodel = calibrated(num_hidden_layers=1)
    before = {name: each.amax.detach().clone() for name, each in qs.quantizers(qmodel).items() if each.amax is not None}
    words = f"the quantizers of this BertModel are off for a while; call {name} outside of quantization_disabled"
    with qs.quantization_disabled(qmodel), pytest.raises(ModelError, match=words):
        CALLS[name](qmodel)
    assert list(tmp_path.iterdir()) == []
    after = {name: each.amax for name, each in qs.quantizers(qmodel).items()}
    for quantizer, amax in before.items():
        found = after[quantizer]
        assert found is not None
        assert not found.requires_grad
        assert torch.equal(found, amax)


def test_ranges_are_found_again_afterwards() -> None:
    qmodel = calibrated(num_hidden_layers=1)
    with qs.quantization_disabled(qmodel):
        pass
    with torch.no_grad():
        qmodel.encoder.layer[0].output.dense.weight.mul_(2.0)
    quantizer = qs.quantizers(qmodel)["encoder.layer.0.output.dense._weight_quantizer"]
    assert quantizer.amax is not None
    before = quantizer.amax.clone()
    qs.recalibrate_weights(qmodel)
    assert torch.equal(quantizer.amax, 2.0 * before)
    assert qs.learn_ranges(qmodel)
