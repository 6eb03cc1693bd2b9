"""Deployed folders: whole or not there, and a runtime's own form that computes what the file does."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from exported import exported, inputs_for

import qdq_surgery as qs
from qdq_surgery.deployment.folder import FILE, deployed_folder, model_files, write_own_form
from qdq_surgery.errors import ModelError, ParityError
from qdq_surgery.targets.openvino.own_form import write_own_form as written_by_openvino
from qdq_surgery.targets.registry import TARGETS

OPENVINO = TARGETS["openvino"]


def test_openvinos_own_form_is_compared_with_the_file(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    assert OPENVINO.own_form is not None
    qmodel, made = exported("bert", "BertModel", "openvino")
    inputs = {name: value.numpy() for name, value in inputs_for(qmodel, (2, 9)).items()}
    (tmp_path / "onnx").mkdir()
    shutil.copy(made.path, tmp_path / FILE)
    write_own_form(tmp_path, OPENVINO, inputs)
    form = tmp_path / OPENVINO.own_form.path
    size = form.stat().st_size + form.with_suffix(".bin").stat().st_size
    wanted = qs.load_onnx(made.path, "openvino", precision="float32")(**inputs_for(qmodel, (2, 9)))
    found = OPENVINO.own_form.run(form, inputs)
    # The same operations in the same order.
    assert all(np.array_equal(found[name], value.numpy()) for name, value in wanted.items())
    files = [(FILE.as_posix(), (tmp_path / FILE).stat().st_size), (OPENVINO.own_form.path, size)]
    assert model_files(tmp_path) == files

    def with_a_mistake(file: Path, form: Path) -> None:
        other = ir.load(file)
        name = next(name for name in other.graph.initializers if name.endswith("weight_quantizer/turned/scale"))
        value = other.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 3, name=name)
        ir.save(other, tmp_path / "other.onnx")
        written_by_openvino(tmp_path / "other.onnx", form)

    shutil.rmtree(form.parent)
    wrong = replace(OPENVINO, own_form=OPENVINO.own_form._replace(write=with_a_mistake))
    with pytest.raises(ParityError, match=f"{form.name}, which OpenVINO made of {FILE.name}, differs from it by"):
        write_own_form(tmp_path, wrong, inputs)


def test_a_runtime_without_a_form_of_its_own_gets_none(tmp_path: Path) -> None:
    write_own_form(tmp_path, TARGETS["onnxruntime"], {})
    assert list(tmp_path.iterdir()) == []


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    source = tmp_path / "float"
    (source / "1_Pooling").mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "modules.json", "model.safetensors", "1_Pooling/config.json"):
        (source / name).write_text(name)
    (source / "3_epochs").mkdir()
    # (No repository keeps the folder of a module without files.)
    (source / "modules.json").write_text(
        '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Normalize", "type": "models.Normalize"}]'
    )
    with pytest.raises(RuntimeError, match="stop"), deployed_folder(tmp_path / "out", source, source):
        raise RuntimeError("stop")
    assert [path.name for path in tmp_path.iterdir()] == ["float"]
    with deployed_folder(tmp_path / "out", source, source) as draft:
        assert not (tmp_path / "out").exists()
        assert not (draft / "model.safetensors").exists()
    names = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert names == {"config.json", "tokenizer.json", "modules.json", "1_Pooling/config.json"}
    with pytest.raises(ModelError, match="exists and is not empty"), deployed_folder(tmp_path / "out", source, source):
        pass


@pytest.mark.parametrize("kind", ["models.Normalize", "sentence_transformer.modules.Normalize"])
def test_a_module_without_files_has_no_folder_on_the_hub(kind: str, tmp_path: Path) -> None:
    """Git has no empty folders: the real all-MiniLM-L6-v2 comes without its 2_Normalize."""
    (tmp_path / "float").mkdir()
    modules = f'[{{"path": ""}}, {{"path": "2_Normalize", "type": "sentence_transformers.{kind}"}}]'
    (tmp_path / "float" / "modules.json").write_text(modules)
    with deployed_folder(tmp_path / "out", tmp_path / "float", tmp_path) as draft:
        assert (draft / "modules.json").read_text() == modules
        assert not (draft / "2_Normalize").exists()


@pytest.mark.parametrize(
    ("said", "most", "found"),
    [
        ('{"model_max_length": 256, "a": "\u00e9"}', 512, 256),
        ('{"model_max_length": 1000000000000000019884624838656, "a": "\u00e9"}', 512, 512),
        ('{"model_max_length": 514, "a": "\u00e9"}', 512, 512),
        ('{"a": "\u00e9"}', 512, 512),
        ('{"model_max_length": null, "a": "\u00e9"}', 512, 512),
        ('{"model_max_length": true, "a": "\u00e9"}', 512, 512),
        ('{"a": "\u00e9"}', None, None),  # relative positions
    ],
)
def test_the_tokenizer_says_where_texts_are_cut(said: str, most: int | None, found: int | None, tmp_path: Path) -> None:
    (tmp_path / "float").mkdir()
    file = tmp_path / "float" / "tokenizer_config.json"
    file.write_text(said, encoding="utf-8")
    with deployed_folder(tmp_path / "out", tmp_path / "float", tmp_path / "float", most):
        pass
    written = (tmp_path / "out" / "tokenizer_config.json").read_text(encoding="utf-8")
    assert json.loads(written).get("model_max_length") == found
    assert json.loads(written)["a"] == "\u00e9"
    assert file.read_text(encoding="utf-8") == said  # the float model's own stays as it is
    assert (written == said) is (found in (256, None))


def test_a_tokenizer_s_config_is_a_strangers(tmp_path: Path) -> None:
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "tokenizer_config.json").write_text("[]")
    source = tmp_path / "float"
    with (
        pytest.raises(ModelError, match=r"tokenizer_config\.json cannot be read"),
        deployed_folder(tmp_path / "out", source, source, 512),
    ):
        pass


@pytest.mark.parametrize(
    ("modules", "found"),
    [
        ('[{"path": "2_Dense"}]', "has no folder 2_Dense, which its modules.json names"),
        ('[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]', "has no folder 2_Dense"),
        ('[{"path": "2_Normalize", "type": "x.Normalizer"}]', "has no folder 2_Normalize"),
        ('[{"path": "../other", "type": "a.Normalize"}]', r"names '\.\./other', which is no folder beside it"),
        ('[{"path": "2_Normalize", "type": 3}]', "cannot be read"),
        ('[{"path": "../other"}]', r"names '\.\./other', which is no folder beside it"),
        ('[{"path": ".."}]', "which is no folder beside it"),
        ('[{"name": "0"}]', "cannot be read: 'path'"),
        ('{"path": 3}', "cannot be read"),
        ("no json", "cannot be read"),
    ],
)
def test_a_list_of_modules_is_a_strangers(modules: str, found: str, tmp_path: Path) -> None:
    (tmp_path / "float").mkdir()
    (tmp_path / "float" / "modules.json").write_text(modules)
    with pytest.raises(ModelError, match=found), deployed_folder(tmp_path / "out", tmp_path / "float", tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["float"]


def test_a_tokenizers_config_that_may_not_be_written_to_is_written_anew(tmp_path: Path) -> None:
    """With a name that is half of a character, as Python reads it from JSON."""
    (tmp_path / "float").mkdir()
    file = tmp_path / "float" / "tokenizer_config.json"
    file.write_text('{"a": "a\\ud83d"}')
    file.chmod(0o444)
    with deployed_folder(tmp_path / "out", tmp_path / "float", tmp_path / "float", 512):
        pass
    written = tmp_path / "out" / "tokenizer_config.json"
    assert json.loads(written.read_text()) == {"a": "a\ud83d", "model_max_length": 512}
    assert os.access(written, os.W_OK)
    assert file.stat().st_mode & 0o777 == 0o444
