"""A file is opened once, and what was opened is passed along."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from exported import exported, inputs_for
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.onnx_export import Export
from qdq_surgery.onnx_file import opened, reader
from qdq_surgery.onnx_file.opened import OnnxFile, open_exported, open_file
from qdq_surgery.prove.lint import lint
from qdq_surgery.prove.parity import certify
from qdq_surgery.prove.receipt import receipt
from qdq_surgery.serve.intermediates import probe, runtimes

Bert = tuple[PreTrainedModel, Export]


@pytest.fixture
def bert() -> Bert:
    return exported("bert", num_hidden_layers=1)


@pytest.fixture
def parsed(bert: Bert, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was parsed since the file was written: a graph, or a list of sites."""
    assert bert[1].path.exists()
    calls: list[str] = []

    def counted(module: Any, name: str) -> None:
        right = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args: calls.append(name) or right(*args))

    counted(reader, "open_proto")
    counted(opened, "load_sites")
    return calls


LOOKS: dict[str, Callable[[Any, Any], Any]] = {
    "lint": lambda _, file: lint(file),
    "certify": lambda qmodel, file: certify(qmodel, file, inputs_for(qmodel, (2, 9))),
}


@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
def test_each_opens_a_file_once(look: str, bert: Bert, parsed: list[str]) -> None:
    qmodel, made = bert
    LOOKS[look](qmodel, made.path)
    assert parsed == ["open_proto", "load_sites"]


def test_a_receipt_opens_a_file_once(bert: Bert, parsed: list[str]) -> None:
    receipt(bert[1].path, shape=(2, 9))
    assert parsed == ["open_proto", "load_sites"]


def test_one_opened_file_for_all(bert: Bert, parsed: list[str]) -> None:
    qmodel, made = bert
    file = open_exported(made.path)
    for look in LOOKS.values():
        look(qmodel, file)
    assert parsed == ["open_proto", "load_sites"]


def test_what_is_known_is_not_read_again(bert: Bert, parsed: list[str]) -> None:
    made = bert[1]
    file = open_file(made.path, made.sites)
    assert file.sites == made.sites
    assert parsed == ["open_proto"]


def test_a_look_inside_leaves_the_opened_file_as_it_was(bert: Bert) -> None:
    qmodel, made = bert
    file = open_exported(made.path)
    outputs = [value.name for value in file.model.graph.outputs]
    values = [site.value for site in file.sites if site.role != "weight"]
    inputs = {name: value.numpy() for name, value in inputs_for(qmodel, (2, 9)).items()}
    for mode in runtimes("onnxruntime"):
        assert set(probe(file, inputs, values, mode)) == {*values, *outputs}
        assert [value.name for value in file.model.graph.outputs] == outputs
    with pytest.raises(qs.ExportError, match=r"has no value 'none', which it says that it has"):
        probe(file, inputs, [values[0], "none"], runtimes("onnxruntime")[0])
    assert [value.name for value in file.model.graph.outputs] == outputs


def test_a_file_that_changed_since_is_looked_through_again(bert: Bert, tmp_path: Path) -> None:
    qmodel, made = bert
    path = tmp_path / "model.onnx"
    path.write_bytes(made.path.read_bytes())
    file = open_exported(path)
    path.write_bytes(b"something else")
    with pytest.raises(qs.ExportError, match=r"model\.onnx is no ONNX file"):
        certify(qmodel, file, inputs_for(qmodel, (2, 9)))


def test_a_graph_that_is_in_no_file(bert: Bert) -> None:
    ir = pytest.importorskip("onnx_ir")
    file = OnnxFile(ir.load(bert[1].path))
    file.model.metadata_props["qdq_surgery.sites"] = "[1]"
    assert file.metadata["class"] == "BertModel"
    with pytest.raises(qs.ExportError, match=r"^this model, 'qdq_surgery\.sites' of its metadata, entry 0 is 1"):
        lint(file)
