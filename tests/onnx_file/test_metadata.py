"""What a file says about itself is read as a stranger's data: under a budget, and of the types it must be."""

from __future__ import annotations

import json
from typing import Any

import pytest

import qdq_surgery as qs
from qdq_surgery.onnx_file.metadata import Site, check_sites, dump_sites, load_sites, own_entries, read_config

SITES = [Site(["a", "b"], "input", "q", "d", "v", 0.25), Site(["w"], "weight", None, "e", "u", transposed=True)]
GOOD: dict[str, Any] = json.loads(dump_sites(SITES))[0]


def test_there_and_back() -> None:
    assert load_sites(dump_sites(SITES)) == SITES


def changed(**changes: Any) -> str:
    return json.dumps([{**GOOD, **changes}])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no JSON"),
        ("[" * 200_000, "nested deeper than 64"),
        ("{}", "is no list of at most 100000 sites"),
        ("[1]", "entry 0 is 1, no site"),
        ("[{}]", "entry 0 lacks 'dequantize'"),
        (changed(odd=1), "lacks 'odd', or should not have it"),
        (changed(quantizers="abc"), "has 'abc' as 'quantizers'"),
        (changed(quantizers=[]), r"has list as 'quantizers'"),
        (changed(quantizers=[1]), "as 'quantizers'"),
        (changed(quantizers=["a\x1b[2J"]), "as 'quantizers'"),
        (changed(role="output"), "has 'output' as 'role'"),
        (changed(role=[]), "as 'role'"),
        (changed(quantize=3), "as 'quantize'"),
        (changed(dequantize=None), "as 'dequantize'"),
        (changed(value=""), "as 'value'"),
        (changed(factor=0), "has 0 as 'factor'"),
        (changed(factor=True), "as 'factor'"),
        (changed(factor="1"), "as 'factor'"),
        ('[{"factor": 1e999, ' + json.dumps({k: v for k, v in GOOD.items() if k != "factor"})[1:] + "]", "as 'factor'"),
        (changed(transposed=1), "as 'transposed'"),
    ],
)
def test_what_is_no_list_of_sites(text: str, found: str) -> None:
    with pytest.raises(qs.ExportError, match=found) as caught:
        load_sites(text, "model.onnx, 'qdq_surgery.sites' of its metadata")
    assert str(caught.value).startswith("model.onnx, ")
    assert str(caught.value).isprintable()


NODES = {"q": ("QuantizeLinear", ["i"]), "d": ("DequantizeLinear", ["v"]), "e": ("DequantizeLinear", ["u"])}


def test_sites_of_the_graph() -> None:
    check_sites(SITES, NODES, "it")
    check_sites(SITES, {}, "it")  # that a pair is gone is told by who looks for it


@pytest.mark.parametrize(
    ("nodes", "found"),
    [
        ({"q": ("Erf", ["i"])}, "'q' as a QuantizeLinear, and it is 'Erf'"),
        ({"d": ("QuantizeLinear", ["v"])}, "'d' as a DequantizeLinear"),
        ({"d": ("DequantizeLinear", ["x"])}, "has 'v' as what the node 'd' makes"),
    ],
)
def test_sites_of_another_graph(nodes: dict[str, Any], found: str) -> None:
    with pytest.raises(qs.ExportError, match=found):
        check_sites(SITES, {**NODES, **nodes}, "it")


def test_two_sites_of_one_node() -> None:
    with pytest.raises(qs.ExportError, match="the node 'q' in two sites"):
        check_sites([SITES[0], SITES[0]], NODES, "it")


def test_entries_are_said_once() -> None:
    entries = [("qdq_surgery.sites", "[]"), ("other", "x"), ("other", "y")]
    assert own_entries(entries, "it") == {"sites": "[]"}
    with pytest.raises(qs.ExportError, match=r"'qdq_surgery\.sites' twice"):
        own_entries([*entries, entries[0]], "it")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("[]", "it is no object"),
        ('{"model_type": []}', r"'model_type' is list"),
        ('{"vocab_size": "many"}', "'vocab_size' is 'many'"),
        ('{"hidden_size": true}', "'hidden_size' is True"),
        ('{"pad_token_id": 1e3}', "'pad_token_id' is 1000.0"),
        ('{"max_position_embeddings": 1' + "0" * 30 + "}", "'max_position_embeddings' is"),
        ("[" * 100_000, "nested deeper"),
    ],
)
def test_configs_that_are_none(text: str, found: str) -> None:
    with pytest.raises(qs.ExportError, match=f"model.onnx holds no config that can be read: .*{found}"):
        read_config(text, "model.onnx")
