"""Layers that are alike share their graphs, but not where rules quantize less in one of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import batch_for, build

import qdq_surgery as qs


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("choice", ["rules: attention-scores", "sites: add_residual_*"])
def test_a_layer_with_fewer_sites_leaves_those_of_the_others(choice: str, layer: int, tmp_path: Path) -> None:
    """Every quantizer sees values, and a saved model, whose graphs are recorded anew, computes the same."""
    file = tmp_path / "fewer.yaml"
    file.write_text(
        f"schema: 1\nname: fewer\nextends: qdqbert\nexclude:\n  - {{why: a test, layers: {layer}, {choice}}}\n"
    )
    model = build("bert", "BertModel", num_hidden_layers=3)
    qmodel = qs.convert(model, file)
    inputs = batch_for(model, (2, 7))
    with torch.no_grad():
        with qs.quantization_disabled(qmodel):
            assert torch.equal(qmodel(**inputs)[0], model(**inputs)[0])
        qs.calibrate(qmodel, [inputs])  # which refuses quantizers that see nothing
        qmodel.save_pretrained(tmp_path / "saved")
        again = type(model).from_pretrained(tmp_path / "saved")
        assert torch.equal(again(**inputs)[0], qmodel(**inputs)[0])
