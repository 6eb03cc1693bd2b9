"""Models that are in no registry: a folder with code of its own, and modules that hold encoders."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.dynamic_module_utils as dynamic_modules
from architectures import build
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

import qdq_surgery as qs

CODE = {
    "configuration_own.py": """
        from transformers import BertConfig

        class OwnConfig(BertConfig):
            model_type = "own-bert"
        """,
    "modeling_own.py": """
        import torch
        from torch import nn
        from transformers import PreTrainedModel
        from transformers.modeling_outputs import BaseModelOutput

        from .configuration_own import OwnConfig

        class OwnLayer(nn.Module):
            def __init__(self, config):
                super().__init__()
                width = config.hidden_size
                self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
                self.up, self.down, self.norm = nn.Linear(width, 48), nn.Linear(48, width), nn.LayerNorm(width)

            def forward(self, states):
                scores = self.query(states) @ self.key(states).transpose(-1, -2) / 4.0
                states = states + torch.matmul(scores.softmax(-1), self.value(states))
                return self.norm(states + self.down(nn.functional.gelu(self.up(states))))

        class OwnModel(PreTrainedModel):
            config_class = OwnConfig

            def __init__(self, config):
                super().__init__(config)
                self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
                self.blocks = nn.ModuleList(nn.ModuleList([OwnLayer(config)]) for _ in range(config.num_hidden_layers))
                self.post_init()

            def forward(self, input_ids, attention_mask=None):
                states = self.embed(input_ids)
                for block in self.blocks:
                    for layer in block:
                        states = layer.forward(states)
                return BaseModelOutput(last_hidden_state=states)
        """,
}

SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
AUTO_MAP = {"AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with modelling code and no weights."""
    monkeypatch.setattr(dynamic_modules, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    made = tmp_path / "own"
    made.mkdir()
    for name, text in CODE.items():
        (made / name).write_text(textwrap.dedent(text))
    config = {**SIZES, "model_type": "own-bert", "architectures": ["OwnModel"], "auto_map": AUTO_MAP}
    (made / "config.json").write_text(json.dumps(config))
    return made


def test_a_folder_with_code_of_its_own(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_config(config, trust_remote_code=True).eval()
    qmodel = qs.convert(model)
    made = qs.plan(model)
    assert {kind: (c.found, c.quantized) for kind, c in made.coverage.items()} == {
        "linear": (10, 10),
        "matmul": (4, 4),
        "residual add": (4, 4),
    }
    ids = torch.randint(3, 60, (3, 9))
    with torch.no_grad(), qs.quantization_disabled(qmodel):
        assert torch.equal(qmodel(ids).last_hidden_state, model(ids).last_hidden_state)
    qs.calibrate(qmodel, [{"input_ids": ids}])
    qmodel.save_pretrained(tmp_path / "saved")
    again = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True).eval()
    with torch.no_grad():
        assert torch.equal(again(ids).last_hidden_state, qmodel(ids).last_hidden_state)
        assert not torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)


class Pair(nn.Module):
    """Two encoders that are compared, and no Hugging Face model."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.passage = build("bert", "BertModel"), build("distilbert", "DistilBertModel")

    def forward(self, ids: Tensor) -> Tensor:
        """Scores."""
        first, second = (each(input_ids=ids).last_hidden_state[:, 0] for each in (self.query, self.passage))
        return (first * second).sum(-1)


def test_a_module_that_holds_two_encoders() -> None:
    pair, whole = Pair().eval(), Pair().eval()
    with pytest.raises(
        qs.ModelError, match=r"a BertModel at model\.query, a DistilBertModel at model\.passage: convert"
    ):
        qs.convert(pair)  # type: ignore[arg-type]
    for each in (pair.query, pair.passage):
        qs.convert(each, inplace=True)
    quantized: dict[str, Any] = {**qs.quantizers(pair.query), **qs.quantizers(pair.passage)}
    assert {name.split(".")[2] for name in quantized} == {"0", "1"}
    ids = torch.randint(3, 60, (3, 9))
    with torch.no_grad(), qs.quantization_disabled(pair.query), qs.quantization_disabled(pair.passage):
        assert torch.equal(pair(ids), whole(ids))
