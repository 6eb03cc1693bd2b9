"""Files that hold three projections as one: the states of their quantizers stand beside that, each for itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import batch_for
from safetensors.torch import load_file
from transformers import AutoModel, NomicBertConfig, NomicBertModel

import qdq_surgery as qs


@pytest.mark.parametrize("loaded", [False, True])
def test_joined_weights_are_saved_and_loaded_with_their_states(loaded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    model = NomicBertModel(NomicBertConfig(vocab_size=64, max_position_embeddings=32, **sizes)).eval()
    if loaded:  # transformers has its conversions from the file then
        model.save_pretrained(tmp_path / "float")
        model = AutoModel.from_pretrained(tmp_path / "float", attn_implementation="eager").eval()
    qmodel = qs.convert(model, "linear-only")
    batch = batch_for(qmodel, (4, 8))
    statistics = qs.collect(qmodel, [batch], moments=True)
    qs.calibrate(qmodel, statistics)
    qs.round_weights(qmodel, statistics)
    qmodel.save_pretrained(tmp_path / "int8")
    assert any("Wqkv" in name for name in load_file(tmp_path / "int8" / "model.safetensors"))
    again = AutoModel.from_pretrained(tmp_path / "int8")
    states = {name: value for name, value in qmodel.state_dict().items() if "_quantizer." in name}
    assert any(name.endswith("q_proj._weight_quantizer._rounding") for name in states)
    for name, value in states.items():
        assert torch.equal(again.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(again(**batch).last_hidden_state, qmodel(**batch).last_hidden_state)
    again.save_pretrained(tmp_path / "again")
    assert (
        load_file(tmp_path / "again" / "model.safetensors").keys()
        == load_file(tmp_path / "int8" / "model.safetensors").keys()
    )
