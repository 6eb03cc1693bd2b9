"""An interrupted measurement goes on from its file, and from no other's."""

from __future__ import annotations

import copy
import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for, build
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.errors import OptionError
from qdq_surgery.sensitivity.runs.borrowed import Borrowed

OPTIONS: Any = {"sites": False, "layers": False}


@functools.cache
def _calibrated(rules: str) -> PreTrainedModel:
    qmodel = qs.convert(build("bert", "BertModel", num_hidden_layers=1), rules)
    qs.calibrate(qmodel, batches())
    return qmodel


def calibrated(rules: str = "qdqbert") -> PreTrainedModel:
    return copy.deepcopy(_calibrated(rules))


@functools.cache
def _finished() -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figures.json"
        qs.sensitivity(calibrated(), batches(), resume=path, **OPTIONS)
        return path.read_text()


def finished(folder: Path) -> Path:
    """The file of a whole measurement."""
    path = folder / "figures.json"
    path.write_text(_finished())
    return path


def batches() -> list[dict[str, torch.Tensor]]:
    model = build("bert", "BertModel", num_hidden_layers=1)
    return [batch_for(model, shape) for shape in ((3, 8), (2, 5), (2, 6))]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each run of the model."""
    counted: list[int] = []
    run = Borrowed.run

    def counting(self: Borrowed, *args: Any) -> Any:
        counted.append(1)
        return run(self, *args)

    monkeypatch.setattr(Borrowed, "run", counting)
    return counted


@pytest.mark.parametrize("when", [2, 25, 50])
def test_it_goes_on_where_it_was_interrupted(
    when: int, tmp_path: Path, runs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    qmodel, path = calibrated(), tmp_path / "figures.json"
    wanted = qs.sensitivity(qmodel, batches(), **OPTIONS)
    whole = len(runs)
    runs.clear()
    counting = Borrowed.run

    def interrupted(self: Borrowed, *args: Any) -> Any:
        if len(runs) == when:
            raise KeyboardInterrupt
        return counting(self, *args)

    monkeypatch.setattr(Borrowed, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qs.sensitivity(qmodel, iter(batches()), resume=path, **OPTIONS)
    monkeypatch.setattr(Borrowed, "run", counting)
    runs.clear()
    found = qs.sensitivity(qmodel, iter(batches()), resume=path, **OPTIONS)
    assert found.to_json() == wanted.to_json()
    # A batch that is begun again runs in float, in INT8 and once to see what can be left out.
    assert len(runs) <= whole - when + 6
    runs.clear()
    assert qs.sensitivity(qmodel, batches(), resume=path, **OPTIONS).to_json() == wanted.to_json()
    assert len(runs) == 3  # for the outlier channels


def test_more_can_be_asked_for_later(tmp_path: Path) -> None:
    qmodel, path = calibrated(), finished(tmp_path)
    wanted = qs.sensitivity(qmodel, batches(), sites=False)
    assert qs.sensitivity(qmodel, batches(), sites=False, resume=path).to_json() == wanted.to_json()


def _other_weights(qmodel: PreTrainedModel) -> None:
    with torch.no_grad():
        qmodel.embeddings.word_embeddings.weight[5, 5] += 1


def _other_range(qmodel: PreTrainedModel) -> None:
    next(iter(qs.quantizers(qmodel).values())).amax = 3.0


def _disabled(qmodel: PreTrainedModel) -> None:
    next(iter(qs.quantizers(qmodel).values())).disable()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            _other_weights,
            "has figures of something else: weights [0-9a-f]{16} there and [0-9a-f]{16} here; give another file",
        ),
        (_other_range, "something else: ranges"),
        (_disabled, "something else: sites"),
    ],
)
def test_a_file_of_another_model_is_refused(
    change: Callable[[PreTrainedModel], None], words: str, tmp_path: Path
) -> None:
    qmodel, path = calibrated(), finished(tmp_path)
    before = path.read_bytes()
    change(qmodel)
    with pytest.raises(OptionError, match=words):
        qs.sensitivity(qmodel, batches(), resume=path, **OPTIONS)
    assert path.read_bytes() == before


def test_a_file_of_other_rules_batches_or_another_metric_is_refused(tmp_path: Path) -> None:
    qmodel, path = calibrated(), finished(tmp_path)
    with pytest.raises(OptionError, match="rules qdqbert there and onnxruntime here"):
        qs.sensitivity(calibrated("onnxruntime"), batches(), resume=path, **OPTIONS)
    with pytest.raises(OptionError, match="metric mse there and cosine here"):
        qs.sensitivity(qmodel, batches(), "cosine", resume=path, **OPTIONS)
    own = tmp_path / "own.json"
    qs.sensitivity(qmodel, batches(), lambda *_: 1.0, resume=own, **OPTIONS)
    with pytest.raises(OptionError, match=r"metric .*<lambda> [0-9a-f]{8} there and .*<lambda> [0-9a-f]{8} here"):
        qs.sensitivity(qmodel, batches(), lambda *_: 2.0, resume=own, **OPTIONS)
    with pytest.raises(OptionError, match=r"figures\.json has figures of another batch 1; give the same"):
        qs.sensitivity(qmodel, [batches()[0], batches()[2]], resume=path, **OPTIONS)
    with pytest.raises(OptionError, match="has figures of 3 batches, and 2 came"):
        qs.sensitivity(qmodel, batches()[:2], resume=path, **OPTIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _: "{", "is no JSON that can be read"),
        (lambda _: "[]", "wanted a mapping"),
        (lambda data: json.dumps({**data, "schema": 2}), "wanted one of 1"),
        (lambda data: json.dumps({**data, "figures": {"int8": [1.0, 2.0]}}), "wanted three numbers"),
        (lambda data: json.dumps({**data, "figures": {"int8": [1.0, 2.0, 9]}}), "a whole number from 1 to 3"),
        (lambda data: json.dumps({**data, "figures": {"int8": [1.0, "2", 1]}}), "wanted a number"),
        (lambda data: json.dumps({**data, "batches": 3}), "wanted a list"),
    ],
)
def test_a_damaged_file_is_refused(change: Callable[[Any], str], words: str, tmp_path: Path) -> None:
    qmodel, path = calibrated(), finished(tmp_path)
    path.write_text(change(json.loads(path.read_text())))
    with pytest.raises(OptionError, match=f"holds no figures of a sensitivity: .*{words}"):
        qs.sensitivity(qmodel, batches(), resume=path, **OPTIONS)


def test_a_place_that_cannot_be_written_is_told_first(tmp_path: Path, runs: list[int]) -> None:
    qmodel = calibrated()
    for path in (tmp_path, tmp_path / "nowhere" / "figures.json"):
        with pytest.raises(OptionError, match="resume: "):
            qs.sensitivity(qmodel, batches(), resume=path, **OPTIONS)
    assert not runs


@pytest.mark.parametrize(("name", "said"), [("x" * 300, "File name too long"), ("a\0b", "NUL character")])
def test_a_name_that_no_file_can_have(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=rf"^resume: .*{said}"):
        qs.sensitivity(calibrated(), batches(), resume=tmp_path / name)
