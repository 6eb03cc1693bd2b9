"""No string of a file runs as code: refused by the reader, by the surgery, and by what generates source."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem import calibrated
from safetensors.torch import load_file, save_file
from saved import WEIGHTS, assert_reloaded, change_config, logits, metadata_of
from torch import nn
from torch.fx import Graph
from transformers import BertForSequenceClassification

import qdq_surgery as qs
from qdq_surgery.checkpoint.plan_cache import DIGEST, METADATA
from qdq_surgery.graph.block_graph import BlockGraph
from qdq_surgery.graph.compiled_graph import compile_graph
from qdq_surgery.surgery.apply import prepare
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.text.layer_names import fold

HOSTILE = (
    'x"),RAN.append(1),getattr(self,"x_quantizer',
    "x_quantizer'); RAN.append(1); ('",
    "x_quantizer\n    RAN.append(1)",
    "a b_quantizer",
    "LayerNorm",
    "__class__",
    "x\u202e_quantizer",
    "ﬁ_quantizer",
)


def forge(folder: Path, name: str) -> None:
    """A folder whose plan and config agree on a hostile name, with the digest that belongs to the plan."""
    metadata = metadata_of(folder / WEIGHTS)
    data = json.loads(metadata[METADATA])
    site = next(entry for entry in data["plan"]["sites"] if entry[7] == "q")
    old = site[1]
    site[1] = f"{old.rpartition('.')[0]}.{name}"
    text = json.dumps(data)
    metadata.update({METADATA: text, DIGEST: hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()})
    tensors = load_file(folder / WEIGHTS)
    for layer in range(2):
        tensors[f"{site[1].replace('*', str(layer))}._amax"] = tensors.pop(f"{old.replace('*', str(layer))}._amax")
    save_file(tensors, folder / WEIGHTS, metadata=metadata)

    def change(config: Any) -> None:
        config["sites"][site[1]] = config["sites"].pop(old)

    change_config(folder, change)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_forged_folder_is_refused(name: str, tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path)
    forge(tmp_path, name)
    with pytest.raises(qs.QdqSurgeryError) as caught:
        logits(BertForSequenceClassification.from_pretrained(tmp_path))
    assert all(line.isprintable() for line in str(caught.value).split("\n"))


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_a_forged_plan_is_passed_over(name: str, tmp_path: Path) -> None:
    """Where only the plan is forged, the rules are matched anew, and the model is the one that was saved."""
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    metadata = metadata_of(tmp_path / WEIGHTS)
    data = json.loads(metadata[METADATA])
    site = next(entry for entry in data["plan"]["sites"] if entry[7] == "q")
    site[1] = f"{site[1].rpartition('.')[0]}.{name}"
    text = json.dumps(data)
    metadata.update({METADATA: text, DIGEST: hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()})
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata=metadata)
    assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path), qmodel)


def test_a_plan_with_another_digest_is_passed_over(tmp_path: Path) -> None:
    """Positions exchanged, as in a file that was changed by hand: the digest tells."""
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    metadata = metadata_of(tmp_path / WEIGHTS)
    data = json.loads(metadata[METADATA])
    pair = [entry for entry in data["plan"]["sites"] if entry[7] in ("local", "residual")][:2]
    pair[0][4], pair[1][4] = pair[1][4], pair[0][4]
    metadata[METADATA] = json.dumps(data)
    save_file(load_file(tmp_path / WEIGHTS), tmp_path / WEIGHTS, metadata=metadata)
    assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path), qmodel)


@pytest.mark.parametrize("name", HOSTILE, ids=ascii)
def test_the_surgery_refuses_the_name(name: str) -> None:
    qmodel = calibrated()
    plan = plan_of(qmodel)
    qmodel.dequantize()
    index = next(i for i, site in enumerate(plan.sites) if site.capture == "local")
    sites = list(plan.sites)
    sites[index] = dataclasses.replace(sites[index], quantizer=f"{sites[index].owner}.{name}")
    with pytest.raises(qs.MatchError, match=r"cannot be the name of a quantizer|has already"):
        prepare(qmodel, dataclasses.replace(plan, sites=tuple(sites)), None)


RAN: list[int] = []


@pytest.mark.parametrize("name", [name for name in HOSTILE if not name.isascii() or not name.isidentifier()], ids=ascii)
@pytest.mark.parametrize("kind", ["call_module", "get_attr", "call_method", "keyword"])
def test_generated_source_cannot_hold_the_name(name: str, kind: str) -> None:
    graph = Graph()
    value = graph.placeholder("value")
    if kind == "keyword":
        node = graph.call_function(torch.add, (value,), {name: value})
    else:
        node = graph.create_node(kind, name, () if kind == "get_attr" else (value,))
    graph.output(node)
    with pytest.raises(qs.TraceError, match="a name that cannot stand in a graph"):
        compile_graph(BlockGraph("", "forward", nn.Identity(), "forward", graph))
    assert RAN == []


def test_names_of_arguments_reach_no_source() -> None:
    """The keys of a dict that a forward is given may come from anywhere."""

    class Fed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dense = nn.Linear(32, 32)

        def forward(self, states: dict[str, torch.Tensor]) -> torch.Tensor:
            first, second = states.values()
            return self.dense(first) + second

    from qdq_surgery.graph.shell_copy import shadow
    from qdq_surgery.trace.recorder import record

    key = "x=RAN.append(1), y"
    states = {key: torch.ones(2, 32), "x=RAN_append_1_, y": torch.ones(2, 32)}
    block = shadow(Fed())
    routine, wanted = record(block, Fed.forward, (states,), {})
    variant = compile_graph(routine)
    assert RAN == []
    assert torch.equal(variant.run(block, list(states.values())), wanted)
    assert "RAN.append" not in variant.source


def test_a_name_that_the_rules_give_is_a_name(tmp_path: Path) -> None:
    """The converse: what is not hostile passes all three."""
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    assert fold({site.quantizer: site.layer for site in plan_of(qmodel).sites})
    assert_reloaded(BertForSequenceClassification.from_pretrained(tmp_path), qmodel)
