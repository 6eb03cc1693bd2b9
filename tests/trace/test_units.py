"""Which parts of a model are encoder layers, however it keeps and calls them; and which of their adds are residual."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import build
from torch import Tensor, nn
from transformers import BertConfig, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.hf.example_inputs import make_examples
from qdq_surgery.trace.units import RESIDUAL, find_units, survey


class Layer(nn.Module):
    """A linear, and an add that has the shape of the hidden states; one more add that has not."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        scores = (states @ states.transpose(1, 2))[:, None]
        scores = scores + torch.zeros_like(scores)
        return states + self.norm(self.dense(states)) + mask[..., None] * scores.sum()


class Nested(PreTrainedModel):
    """Layers in a list of lists, as Funnel has them; ``direct`` calls their forward, as SqueezeBERT does."""

    config_class = BertConfig

    def __init__(self, config: BertConfig, direct: bool = False) -> None:
        super().__init__(config)
        self.direct = direct
        self.embed = nn.Embedding(config.vocab_size, 8)
        self.blocks = nn.ModuleList([nn.ModuleList([Layer(), Layer()]), nn.ModuleList([Layer()])])
        self.norms = nn.ModuleList([nn.LayerNorm(8), nn.LayerNorm(8)])
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Tensor:
        states = self.embed(input_ids)
        mask = torch.ones(states.shape[:2]) if attention_mask is None else attention_mask.float()
        for block in self.blocks:
            for layer in block:
                states = layer.forward(states, mask) if self.direct else layer(states, mask)
        return self.norms[1](self.norms[0](states))


def nested(direct: bool = False) -> Nested:
    torch.manual_seed(0)
    return Nested(BertConfig(vocab_size=60), direct).eval()


def test_layers_of_a_list_of_lists_are_counted_through() -> None:
    assert list(find_units(nested())) == [
        ("embed", None),
        ("blocks.0.0", 0),
        ("blocks.0.1", 1),
        ("blocks.1.0", 2),
        ("norms.0", None),
        ("norms.1", None),
    ]


@pytest.mark.parametrize("direct", [False, True], ids=["called", "forward-called"])
def test_layers_are_found_whichever_way_they_are_called(direct: bool) -> None:
    model = nested(direct)
    qmodel = qs.convert(model, "linear-only")
    assert {name.rpartition(".")[0] for name in qs.quantizers(qmodel)} == {
        "blocks.0.0.dense",
        "blocks.0.1.dense",
        "blocks.1.0.dense",
    }
    whole = qs.convert(model, "qdqbert")
    batch = make_examples(model, (2, 6))
    with torch.no_grad():
        before = whole(**batch)
        with qs.quantization_disabled(whole):
            assert torch.equal(whole(**batch), model(**batch))
    for quantizer in qs.quantizers(whole).values():
        quantizer.amax = 0.5
    with torch.no_grad():
        assert not torch.equal(whole(**batch), before)


def test_a_survey_leaves_no_forward_behind() -> None:
    model = build("bert", "BertModel")
    survey(model, make_examples(model, (2, 6)))
    assert not any("forward" in vars(module) for module in model.modules())


def test_residual_adds_are_those_of_the_hidden_states_shape() -> None:
    model = nested()
    found = survey(model, make_examples(model, (2, 6)))
    for unit in found.units:
        if unit.layer is None or unit.tree is None:
            continue
        adds = [node for node in unit.tree.graph.nodes if node.meta.get("op") == "add"]
        assert [bool(node.meta[RESIDUAL]) for node in adds] == [False, True, False]


def test_residual_adds_of_a_decoder_have_the_shape_of_its_own_states() -> None:
    from transformers import BartConfig, BartModel

    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in _BART.items()}
    model = BartModel(BartConfig(d_model=32, vocab_size=60, max_position_embeddings=40, **sizes)).eval()
    made = qs.plan(model)
    assert vars(made.coverage["residual add"]) == {"found": 5, "quantized": 5, "refused": 0}


_BART = {"layers": 1, "attention_heads": 4, "ffn_dim": 48}


class Masked(nn.Module):
    """A layer whose mask comes before its states, and has as many axes."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(8, 8)

    def forward(self, mask: Tensor, states: Tensor) -> Tensor:
        return states + torch.tanh(self.dense(states)) * mask


class Own(PreTrainedModel):
    """Keeps its layers in whatever it is given, and runs them one after the other; ``tail`` stands in two places."""

    config_class = BertConfig

    def __init__(self, layers: nn.Module) -> None:
        super().__init__(BertConfig(vocab_size=60))
        self.embed, self.layers = nn.Embedding(60, 8), layers
        self.tail = nn.ModuleDict({"norm": nn.LayerNorm(8), "out": nn.Linear(8, 8)})
        self.head = nn.ModuleDict({"out": self.tail["out"]})
        self.post_init()

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        states = self.embed(input_ids)
        mask = torch.ones(len(states), 1, 1)
        for layer in self.layers.modules():
            if isinstance(layer, Masked):
                states = layer(mask, states)
        return self.head["out"](self.tail["norm"](states))


def test_what_a_dict_of_modules_holds_is_told_apart() -> None:
    model = Own(nn.ModuleList([nn.ModuleDict({"a": Masked(), "b": Masked()}), nn.ModuleDict({"a": Masked()})])).eval()
    assert list(find_units(model)) == [
        ("embed", None),
        ("layers.0.a", 0),
        ("layers.0.b", 1),
        ("layers.1.a", 2),
        ("tail.norm", None),
        ("tail.out", None),
        ("head.out", None),
    ]
    found = survey(model, make_examples(model, (2, 6)))
    assert all(unit.tree is not None for unit in found.units)
    assert found.linears == {
        "layers.0.a.dense",
        "layers.0.b.dense",
        "layers.1.a.dense",
        "tail.out",
        "head.out",
    }


def test_a_mask_before_the_states_does_not_hide_residual_adds() -> None:
    made = qs.plan(Own(nn.ModuleList([Masked()])).eval())
    assert vars(made.coverage["residual add"]) == {"found": 1, "quantized": 1, "refused": 0}


@pytest.mark.parametrize(
    ("rules", "message"),
    [("qdqbert", "no quantizer into Own: no encoder layer of it is run"), ("linear-only", "matches nothing")],
)
def test_layers_that_are_no_entries_of_a_list_are_not_passed_over_in_silence(rules: str, message: str) -> None:
    for call in (qs.plan, qs.convert):
        with pytest.raises(qs.MatchError, match=message):
            call(Own(nn.Sequential(Masked(), Masked())).eval(), rules)


def test_a_linear_called_by_the_code_around_its_block_is_said_to_be() -> None:
    model = Own(nn.ModuleList([Masked(), nn.Sequential(Masked())])).eval()
    reasons = {refusal.path: refusal.reason for refusal in qs.plan(model).refusals}
    assert "called by code around its block" in reasons["layers.1.0.dense"]


def test_encoders_in_a_list_have_layers_of_their_own() -> None:
    model = nn.Module()
    model.encoders = nn.ModuleList([build("bert", "BertModel"), build("bert", "BertModel")])
    layers = [(path, layer) for path, layer in find_units(model) if layer is not None]
    assert layers == [(f"encoders.{each}.encoder.layer.{layer}", layer) for each in range(2) for layer in range(2)]
