"""Saving over a model: the folder holds the old one or the new one, and nothing that is no file is replaced."""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
import json
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from ecosystem import calibrated
from saved import assert_reloaded, metadata_of
from torch import nn
from transformers import BertForSequenceClassification, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.checkpoint import save as saving


def load(folder: Path) -> PreTrainedModel:
    return BertForSequenceClassification.from_pretrained(folder)


@pytest.fixture
def other() -> PreTrainedModel:
    return another(calibrated())


def another(made: PreTrainedModel) -> PreTrainedModel:
    """With other weights and their ranges."""
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)
    qs.recalibrate_weights(made)
    return made


SHARDS = {"max_shard_size": 20_000}

#: Each shard is a step or two of a save, of which all are tried.
FEW = {"max_shard_size": 60_000}

#: The same for a model of one layer, which is saved and loaded at each step.
FEW_OF_ONE = {"max_shard_size": 36_000}


@pytest.mark.parametrize("first", [{}, SHARDS], ids=["whole", "shards"])
@pytest.mark.parametrize("then", [{}, SHARDS, {"max_shard_size": 40_000}], ids=["whole", "shards", "fewer-shards"])
def test_over_another_model(
    first: dict[str, Any], then: dict[str, Any], other: PreTrainedModel, tmp_path: Path
) -> None:
    calibrated().save_pretrained(tmp_path / "a", **first)
    (tmp_path / "a" / "mine.txt").write_text("mine")
    other.save_pretrained(tmp_path / "a", **then)
    other.save_pretrained(tmp_path / "b", **then)
    assert_reloaded(load(tmp_path / "a"), other)
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names | {"mine.txt"}
    for name in names:
        first_file, second_file = tmp_path / "a" / name, tmp_path / "b" / name
        if name.endswith(".safetensors"):  # whose metadata are in no order
            assert metadata_of(first_file) == metadata_of(second_file)
            assert first_file.stat().st_size == second_file.stat().st_size
        else:
            assert first_file.read_bytes() == second_file.read_bytes(), name


@pytest.mark.parametrize(
    ("name", "sharded", "after"),
    [
        ("replace", False, False),
        ("replace", True, False),
        ("replace", False, True),
        ("link", False, True),
        ("unlink", True, False),
        ("unlink", False, True),
    ],
)
def test_at_each_step_the_folder_holds_one_of_them(
    name: str, sharded: bool, after: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the process ended there: no step takes anything back that is needed.

    What one step of many files leaves is what the next one finds. (Linears alone are soon loaded.)
    """
    qmodel, options = calibrated(rules="linear-only", num_hidden_layers=1), FEW_OF_ONE if sharded else {}
    other = another(calibrated(rules="linear-only", num_hidden_layers=1))
    qmodel.save_pretrained(tmp_path / "before", **({} if sharded else FEW_OF_ONE))
    real: Callable[..., Any] = getattr(os, name)
    step = 0
    while True:
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "before", folder)
        count = -1

        def stopped(*args: Any, count_to: int = step, name: str = name, **kwargs: Any) -> Any:
            nonlocal count
            count += "qdq-surgery" not in str(args[0]) or name != "unlink"
            if after:
                real(*args, **kwargs)
            if count == count_to:
                raise KeyboardInterrupt
            return None if after else real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(saving.os, name, stopped)
            try:
                other.save_pretrained(folder, **options)
                stop = True
            except KeyboardInterrupt:
                stop = False
        found = load(folder)
        wanted = other if stop or torch.equal(weight(found), weight(other)) else qmodel
        assert_reloaded(found, wanted)
        other.save_pretrained(folder, **options)
        assert_reloaded(load(folder), other)
        names = [path.name for path in folder.iterdir()]
        assert not [name for name in names if name.startswith((".", "model-")) and not (sharded and "-of-" in name)]
        if stop:
            break
        step += 1
    assert step > 0 or name == "unlink"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "first", "then"),
    [("replace", {}, {}), ("replace", FEW, FEW), ("link", FEW, FEW), ("unlink", FEW, FEW)],
    ids=["replace-whole", "replace-shards", "link-shards", "unlink-shards"],
)
def test_at_each_step_a_model_has_its_own_config(
    name: str, first: dict[str, Any], then: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, quantizers and config are those of one model, of another size and by other rules than the other."""
    before = calibrated(rules="linear-only")
    after = calibrated(rules="pytorch", num_hidden_layers=1, intermediate_size=64)
    before.save_pretrained(tmp_path / "before", **first)
    real: Callable[..., Any] = getattr(os, name)
    kinds = []
    for step in itertools.count():
        folder = tmp_path / str(step)
        shutil.copytree(tmp_path / "before", folder)
        left = iter(range(step))

        def stopped(*args: Any, left: Iterator[int] = left, **kwargs: Any) -> Any:
            if next(left, None) is None:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
            patch.setattr(saving.os, name, stopped)
            after.save_pretrained(folder, **then)
            break
        found = load(folder)
        kinds.append(found.config.num_hidden_layers)
        assert_reloaded(found, {1: after, 2: before}[kinds[-1]])
    assert_reloaded(load(folder), after)
    assert kinds == sorted(kinds, reverse=True), "the old model came back"


def weight(model: PreTrainedModel) -> torch.Tensor:
    return model.classifier.weight  # type: ignore[no-any-return]


@pytest.mark.slow
def test_killed_at_any_time(tmp_path: Path, other: PreTrainedModel) -> None:
    """By a signal that no process can answer, at ten times spread over several savings."""
    folder, models = tmp_path / "model", {"a": calibrated(), "b": other}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    models["a"].save_pretrained(folder)
    code = """
import sys, transformers
import qdq_surgery
models = [transformers.BertForSequenceClassification.from_pretrained(path) for path in sys.argv[1:3]]
print("ready", flush=True)
while True:
    for model in models:
        model.save_pretrained(sys.argv[3])
"""
    printed = tmp_path / "printed"
    process = forked.start(code, tmp_path / "a", tmp_path / "b", folder, folder=printed)
    try:
        while (printed / "stdout").read_text() != "ready\n":
            assert process.is_alive(), (printed / "stderr").read_text()
            time.sleep(0.02)
        assert process.pid is not None
        for index in range(10):
            time.sleep(0.05 + 0.013 * index)
            os.kill(process.pid, signal.SIGSTOP)
            found = load(folder)
            wanted = next(model for model in models.values() if torch.equal(weight(found), weight(model)))
            assert_reloaded(found, wanted)
            os.kill(process.pid, signal.SIGCONT if index < 9 else signal.SIGKILL)
    finally:
        process.kill()
        process.join()
    assert_reloaded(load(folder), wanted)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "qdq_report.json"])
@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_what_is_no_regular_file_is_not_replaced(name: str, kind: str, tmp_path: Path, other: PreTrainedModel) -> None:
    folder, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    calibrated().save_pretrained(folder)
    (folder / name).rename(elsewhere)
    before = elsewhere.read_bytes()
    if kind == "link":
        (folder / name).symlink_to(elsewhere)
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        os.mkfifo(folder / name)
    listed = sorted(path.name for path in folder.iterdir())
    with pytest.raises(qs.ModelError, match=rf"{name} is .*, which is not replaced; remove it"):
        other.save_pretrained(folder)
    assert sorted(path.name for path in folder.iterdir()) == listed
    assert elsewhere.read_bytes() == before
    assert (folder / name).is_symlink() == (kind == "link")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(qs.ModelError, match="is a file; give the name of a folder"):
        calibrated().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_what_fails_leaves_the_old_model_and_this_one_as_it_was(tmp_path: Path, other: PreTrainedModel) -> None:
    qmodel = calibrated()
    qmodel.save_pretrained(tmp_path)
    next(iter(qs.quantizers(other).values())).amax = 0.0
    with pytest.raises(qs.ModelError, match="is not saved"):
        other.save_pretrained(tmp_path)
    with pytest.raises(qs.ModelError, match="is not saved"):
        other.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    assert not hasattr(other.config, "quantization_config")
    assert_reloaded(load(tmp_path), qmodel)


def test_a_model_that_nobody_holds_is_saved(tmp_path: Path) -> None:
    qmodel = calibrated()
    copy.deepcopy(qmodel).save_pretrained(tmp_path / "a")
    pickle.loads(pickle.dumps(qmodel)).save_pretrained(tmp_path / "b")
    load(tmp_path / "a").save_pretrained(tmp_path / "c")
    qs.convert(load_float(tmp_path)).save_pretrained(tmp_path / "d")
    for name in "abc":
        assert_reloaded(load(tmp_path / name), qmodel)
    assert len(qs.quantizers(load(tmp_path / "d"))) == len(qs.quantizers(qmodel))


def load_float(folder: Path) -> PreTrainedModel:
    made = calibrated()
    made.dequantize()
    made.save_pretrained(folder / "float")
    return load(folder / "float")


def test_a_copy_saves_itself(tmp_path: Path) -> None:
    qmodel = calibrated()
    copied = copy.deepcopy(qmodel)
    with torch.no_grad():
        copied.classifier.weight.add_(1.0)
    copied.config.id2label = {0: "no", 1: "yes"}
    copied.save_pretrained(tmp_path)
    assert_reloaded(load(tmp_path), copied)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == {"0": "no", "1": "yes"}


def test_it_is_called_like_transformers_own() -> None:
    qmodel = calibrated()
    own = inspect.signature(PreTrainedModel.save_pretrained)
    assert list(inspect.signature(qmodel.save_pretrained).parameters) == list(own.parameters)[1:]
    assert qmodel.save_pretrained.__doc__ == PreTrainedModel.save_pretrained.__doc__
    assert isinstance(qmodel, nn.Module)
    qmodel.dequantize()
    assert "save_pretrained" not in vars(qmodel)


@pytest.mark.parametrize(
    ("name", "said"), [("x" * 300, "File name too long"), ("a\0b", "NUL character"), ("link", "cannot be saved in")]
)
def test_a_folder_that_cannot_be_made(name: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(qs.ModelError, match=said):
        calibrated().save_pretrained(tmp_path / name)
    assert os.listdir(tmp_path) == ["link"]


def test_a_model_without_data_is_refused_in_words(tmp_path: Path) -> None:
    qmodel = calibrated().to("meta")
    with pytest.raises(qs.ModelError, match=r"_quantizer has no data .meta device.; load the model with its weights"):
        qmodel.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
