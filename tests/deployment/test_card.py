"""The card: front matter that hubs read, whatever the model is called."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qdq_surgery.deployment.card import Deployed, base_name, card
from qdq_surgery.sensitivity.evaluate import Evaluation


@pytest.mark.parametrize("name", ["all-MiniLM-L6-v2", 'a "quoted" name: [x]', "é, # and more"])
@pytest.mark.parametrize("share", [None, 0.875])
def test_the_card_can_be_read(name: str, share: float | None) -> None:
    loss = Evaluation("BertModel", "mse", {"mse": 0.00123, "cosine": 0.5}, 1, 7, 90)
    made = card(
        Deployed(name, "openvino", "mine", [("onnx/m.onnx", 12_300_000)], 90_000_000, loss, "OpenVINO", share, 33)
    )
    _, front, body = made.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == name
    assert yaml.safe_load(front)["tags"] == ["onnx", "int8", "quantized", "qdq-surgery", "openvino"]
    assert "| `onnx/m.onnx` | 12.3 MB |" in body
    assert "| mse | 0.00123 |" in body
    assert "ranges from 33 texts" in body
    assert 'qs.load_onnx("onnx/m.onnx", "openvino")' in body
    assert ("87.5 % of the linears" in body) == (share is not None)


def test_a_model_is_called_like_its_folder(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--mini-lm" / "snapshots" / "0a1b"
    snapshot.mkdir(parents=True)
    assert base_name(snapshot) == "org/mini-lm"
    (tmp_path / "minilm").mkdir()
    assert base_name(tmp_path / "minilm") == base_name(f"{tmp_path}/minilm/") == "minilm"
