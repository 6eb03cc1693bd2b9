"""A deployed file as Triton's model repository."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from exported import exported

from qdq_surgery.deployment.folder import FILE
from qdq_surgery.deployment.triton import _port, check_repository, write_repository
from qdq_surgery.errors import OptionError
from qdq_surgery.targets.registry import TARGETS
from qdq_surgery.targets.session import Port


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_a_repository_has_the_file_and_what_goes_in_and_out(runtime: str, tmp_path: Path) -> None:
    pytest.importorskip(runtime)
    qmodel, made = exported("bert", "BertModel", "openvino")
    (tmp_path / "onnx").mkdir()
    shutil.copy(made.path, tmp_path / FILE)
    (tmp_path / "onnx" / "model_quantized.onnx.data").write_text("weights beside it")
    (tmp_path / "onnx" / "other.onnx").write_text("another file")
    write_repository(tmp_path, "my-bert", TARGETS[runtime])
    home = tmp_path / "triton" / "my-bert"
    files = sorted(path.relative_to(home).as_posix() for path in home.rglob("*") if path.is_file())
    assert files == ["1/model_quantized.onnx", "1/model_quantized.onnx.data", "config.pbtxt"]
    assert (home / "1" / FILE.name).read_bytes() == made.path.read_bytes()
    lines = (home / "config.pbtxt").read_text().splitlines()
    assert lines[:4] == [
        'name: "my-bert"',
        f'backend: "{runtime}"',
        'default_model_filename: "model_quantized.onnx"',
        "max_batch_size: 64",
    ]
    ports = [
        re.findall(r'^(\w+) \[ \{ name: "(\w+)", data_type: (\w+), dims: \[ (.*) \] \} \]$', each) for each in lines[4:]
    ]
    found = [port for [port] in filter(None, ports)]
    assert sorted(port for port in found if port[0] == "input") == [
        ("input", "attention_mask", "TYPE_INT64", "-1"),
        ("input", "input_ids", "TYPE_INT64", "-1"),
        ("input", "token_type_ids", "TYPE_INT64", "-1"),
    ]
    assert ("output", "last_hidden_state", "TYPE_FP32", f"-1, {qmodel.config.hidden_size}") in found
    assert lines[-1] == "instance_group [ { count: 1, kind: KIND_CPU } ]"
    assert len(found) == len(lines) - 5


@pytest.mark.parametrize("name", ["", "..", "a/b", ".hidden", 'a"b', "\u00e9t\u00e9", "a\n"])
def test_a_name_is_a_folder_s(name: str) -> None:
    with pytest.raises(OptionError, match="is no name of a model"):
        check_repository(name, TARGETS["onnxruntime"])


def test_an_engine_is_built_where_it_runs() -> None:
    with pytest.raises(OptionError, match="engines of TensorRT"):
        check_repository("my-bert", TARGETS["tensorrt"])


def test_a_number_for_each_row_has_dims() -> None:
    assert "dims: [ 1 ], reshape: { shape: [ ] }" in _port("output", Port("score", np.dtype("float32"), (None,)))
