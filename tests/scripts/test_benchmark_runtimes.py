"""The benchmark of runtimes on a tiny model, and what it prints on made-up figures."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import benchmark_runtimes as bench
from runtimes import goals, machine, with_reference
from runtimes.figures import BASE, Figures, Measured
from runtimes.goals import Goal
from runtimes.subjects import INPUTS, SUBJECTS, Batch, Shape, Subject, make_batch, make_model
from runtimes.timing import BUSY, PATIENCE, Watch, interleaved
from runtimes.workspace import Contender, Missing, Prepared, Workspace, package

TINY = Subject(
    "tiny",
    {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 128,
    },
)

#: Of a contender's logits to the float model's: INT8 of a tiny model with random weights is well above it.
ALIKE = 0.95

#: The contenders that need each package.
NEED = {
    "onnxruntime": [
        *("ort-fp32", "ort-fp32-unfused", "ort-dynamic", "ort-static", "ort-static-matmul"),
        *("reference-ort", "ours-onnxruntime", "ours-onnxruntime-plain"),
    ],
    "openvino": [
        *("openvino-fp32", "openvino-bf16", "openvino-nncf", "openvino-nncf-f32"),
        *("reference-openvino", "reference-openvino-f32"),
        *("ours-openvino", "ours-openvino-plain", "ours-openvino-qdqbert", "ours-openvino-f32"),
    ],
    "nncf": ["openvino-nncf", "openvino-nncf-f32"],
    "torchao": ["torchao"],
}


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model on the command line."""
    monkeypatch.setitem(SUBJECTS, "tiny", TINY)


def workspace(folder: Path, reference: Path | None = None) -> Workspace:
    model = make_model(TINY)
    return Workspace(model, folder, 1, [make_batch(model, Shape(2, 16), seed) for seed in range(2)], reference)


def fake_run(value: float = 1.0) -> Callable[[Batch], list[Any]]:
    return lambda batch: [np.full(batch["input_ids"].shape, value, np.float32)] * 2


def fake(milliseconds: dict[str, tuple[float, ...]], megabytes: dict[str, float]) -> Figures:
    figures = Figures("BERT-base", ["8x128", "1x128", "1x384"][: len(next(iter(milliseconds.values())))])
    for name, each in milliseconds.items():
        seconds = {shape: [value / 1e3] for shape, value in zip(figures.shapes, each, strict=True)}
        figures.contenders[name] = Measured(f"words of {name}", megabytes.get(name), 0.99, seconds)
    return figures


# --- the models ------------------------------------------------------------------------------------------------------


def test_nothing_in_a_model_can_be_folded_away() -> None:
    model = make_model(TINY)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.LayerNorm):
            assert bool((module.bias != 0).all())
        if isinstance(module, nn.LayerNorm):
            assert bool((module.weight != 1).all())
    again = make_model(TINY)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


def test_subjects_have_the_shapes_of_the_published_models() -> None:
    config = {
        name: make_model(Subject("", {**subject.config, "vocab_size": 8})).config for name, subject in SUBJECTS.items()
    }
    sizes = {
        name: (each.num_hidden_layers, each.hidden_size, each.num_attention_heads, each.intermediate_size)
        for name, each in config.items()
    }
    assert sizes == {"base": (12, 768, 12, 3072), "minilm": (6, 384, 12, 1536)}


def test_batch() -> None:
    batch = make_batch(make_model(TINY), Shape(3, 16), 0)
    assert tuple(batch) == INPUTS
    assert all(each.shape == (3, 16) and each.dtype == np.int64 for each in batch.values())
    assert all(each.flags.c_contiguous for each in batch.values())
    assert set(batch["token_type_ids"].ravel()) == {0, 1}


@pytest.mark.parametrize("text", ["", "8", "x128", "8x", "0x128", "8x0", "-1x8", "8 x 128", "8x128x2"])
def test_a_shape_that_is_none(text: str) -> None:
    with pytest.raises(ValueError, match="rows x tokens, as in 8x128"):
        Shape.parse(text)


def test_shape() -> None:
    assert Shape.parse("8x128") == Shape(8, 128)
    assert str(Shape(1, 384)) == "1x384"


# --- the contenders --------------------------------------------------------------------------------------------------


def test_only_and_skip() -> None:
    assert bench.chosen([], []) == list(bench.CONTENDERS)
    assert bench.chosen(["torch-fp32", "ort-fp32"], []) == ["ort-fp32", "torch-fp32"]
    assert "ort-dynamic" not in bench.chosen([], ["ort-dynamic"])
    with pytest.raises(ValueError, match="no contender tensorrt; there are ort-fp32"):
        bench.chosen(["tensorrt"], [])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "tensorrt"], "there is no contender tensorrt"),
        (["--models", "large"], "there is no model large; there are base, minilm"),
        (["--shapes", "128"], "a shape is rows x tokens"),
        (["--runs", "0"], "at least 1"),
    ],
    ids=["contender", "model", "shape", "runs"],
)
def test_wrong_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", NEED)
def test_a_missing_package_is_a_word(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [each for each in sys.modules if each.partition(".")[0] == name]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, name, None)
    for contender in NEED[name]:
        if name == "nncf" and not installed("openvino"):
            pytest.skip("openvino is not installed")
        with pytest.raises(Missing, match=f"{name} is not installed; pip install {name}"):
            bench.CONTENDERS[contender].prepare(workspace(tmp_path))


def test_every_contender_with_a_package_is_in_that_test() -> None:
    assert {*NEED["onnxruntime"], *NEED["openvino"], *NEED["torchao"], "torch-fp32"} == set(bench.CONTENDERS)


def test_an_import_that_fails_inside_a_package_is_no_missing_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_installed_peer.py").write_text("import no_such_dependency_of_a_peer\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency_of_a_peer"):
        package("half_installed_peer")


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_contenders_on_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    temporary, found = tmp_path / "temporary", tmp_path / "found.json"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    monkeypatch.setattr(bench, "CALIBRATION_BATCHES", 2)
    monkeypatch.setattr(bench, "CALIBRATION_SHAPE", Shape(2, 16))
    monkeypatch.setattr(bench, "Watch", lambda: FakeWatch([0.0]))  # other tests run beside: no round would be quiet
    given = ["--models", "tiny", "--shapes", "2x16,1x24", "--runs", "1", "--threads", "1", "--json", str(found)]
    status = bench.main([*given, "--skip", "torchao"])  # compiling takes a minute
    out, said = capsys.readouterr()
    assert status == 0, said

    text = found.read_text()
    assert str(tmp_path) not in text
    figures = json.loads(text)["models"]["tiny"]
    absent = {
        name for package_, names in NEED.items() if package_ != "torchao" and not installed(package_) for name in names
    }
    absent |= {"reference-ort", "reference-openvino", "reference-openvino-f32"}
    assert set(figures["skipped"]) == absent
    assert set(figures["contenders"]) == set(bench.CONTENDERS) - absent - {"torchao"}
    assert figures["failed"] == {}
    for name, each in figures["contenders"].items():
        assert all(value > 0 for value in each["milliseconds"].values()), name
        assert each["cosine"] > ALIKE, name
        assert (each["megabytes"] is None) == (name == "torch-fp32")
        assert re.search(rf"^ *{name} .* ms", out, re.MULTILINE)
    assert "reference-ort is skipped: it needs --reference, a Python with transformers 4.40.2" in said
    assert not list(temporary.iterdir())


@pytest.mark.usefixtures("tiny")
def test_what_fails_is_said_and_the_others_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def prepare(_: Workspace) -> Prepared:
        raise RuntimeError("cannot open /some/where/model.onnx\nat all")

    def run(_: Batch) -> list[Any]:
        raise ValueError("wrong input")

    made = {
        BASE: lambda _: Prepared(fake_run()),
        "broken": prepare,
        "refusing": lambda _: Prepared(run),
    }
    monkeypatch.setattr(bench, "CONTENDERS", {name: Contender(name, name, each) for name, each in made.items()})
    found = tmp_path / "found.json"
    given = ["--models", "tiny", "--shapes", "1x8", "--runs", "1", "--keep", str(tmp_path / "kept")]
    assert bench.main([*given, "--json", str(found)]) == 1
    said = capsys.readouterr().err
    assert "broken FAILED: RuntimeError: cannot open model.onnx at all" in said
    assert "refusing FAILED: ValueError: wrong input" in said
    figures = json.loads(found.read_text())["models"]["tiny"]
    assert list(figures["contenders"]) == [BASE]
    assert set(figures["failed"]) == {"broken", "refusing"}
    assert (tmp_path / "kept" / "tiny").is_dir()


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for a Python is a shell script")
def test_the_reference_is_exported_by_its_own_python(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\nbasename "$1" > "$3"\nls "$2" >> "$3"\n')
    python.chmod(0o755)
    (tmp_path / "folder").mkdir()
    made = with_reference._export(workspace(tmp_path / "folder", python))
    assert made.read_text().split() == ["export_reference.py", "batch-0", "batch-1", "config.json", "weights"]
    python.write_text("#!/bin/sh\nexit 3\n")
    assert with_reference._export(workspace(tmp_path / "folder", python)) == made


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for a Python is a shell script")
def test_a_reference_that_fails_gives_its_last_words(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho Traceback >&2\necho 'No module named onnx' >&2\nexit 1\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match="export failed: No module named onnx"):
        with_reference._export(workspace(tmp_path, python))


# --- timing ----------------------------------------------------------------------------------------------------------


class FakeWatch(Watch):
    def __init__(self, shares: list[float]) -> None:
        super().__init__()
        self.shares = shares

    def stop(self) -> float:
        return self.shares.pop(0)


def test_contenders_take_turns() -> None:
    calls = []
    batch = make_batch(make_model(TINY), Shape(1, 4), 0)
    runs = {name: lambda _, name=name: calls.append(name) for name in "ab"}
    kept = interleaved(runs, batch, 2, FakeWatch([0.0, 0.0]), rest=0.0)  # type: ignore[arg-type]
    assert "".join(calls) == "aabb" * 2
    assert [list(each.seconds) for each in kept] == [["a", "b"]] * 2


def test_disturbed_rounds_are_run_again() -> None:
    quiet, busy = BUSY / 2, BUSY * 4
    kept = interleaved({}, {}, 2, FakeWatch([busy, quiet, busy, quiet, quiet]), rest=0.0)
    assert [each.others for each in kept] == [quiet, quiet]


def test_patience_ends() -> None:
    shares = [BUSY * (2 + at) for at in range(2 * PATIENCE)]
    kept = interleaved({}, {}, 2, FakeWatch(list(reversed(shares))), rest=0.0)
    assert [each.others for each in kept] == shares[:2]


def test_watch_reads_what_others_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "stat"
    monkeypatch.setattr("runtimes.timing.os.cpu_count", lambda: 2)
    monkeypatch.setattr("runtimes.timing.os.sysconf", lambda _: 100)
    clock = iter([10.0, 14.0])
    monkeypatch.setattr("runtimes.timing.time.perf_counter", lambda: next(clock))
    own = iter([(1.0, 0.5), (2.0, 0.5)])
    times = type("Times", (), {"__init__": lambda self, user, system: self.__dict__.update(user=user, system=system)})
    monkeypatch.setattr("runtimes.timing.os.times", lambda: times(*next(own)))  # type: ignore[call-arg]
    file.write_text("cpu  100 0 50 900 7 0 0 0 0 0\ncpu0 1 2 3\n")
    watch = Watch(file)
    watch.start()
    file.write_text("cpu  250 10 60 1500 9 10 10 10 0 0\ncpu0 1 2 3\n")
    # 2 s of work in 4 s of 2 cores, 1 s of it our own.
    assert watch.stop() == pytest.approx(1 / 8)


def test_watch_without_statistics(tmp_path: Path) -> None:
    watch = Watch(tmp_path / "none")
    watch.start()
    assert watch.stop() == 0.0


@pytest.mark.usefixtures("tiny")
def test_figures_of_a_busy_machine_are_marked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "CONTENDERS", {BASE: Contender(BASE, BASE, lambda _: Prepared(fake_run()))})
    monkeypatch.setattr(bench, "Watch", lambda: FakeWatch([0.5, 0.4, 0.3]))
    assert bench.main(["--models", "tiny", "--shapes", "1x8", "--runs", "1"]) == 0
    assert "tiny 1x8: other processes took 30% of the cores' time; measure again" in capsys.readouterr().err


# --- what is printed -------------------------------------------------------------------------------------------------

MADE_UP = {
    "ort-fp32": (600.0, 80.0, 240.0),
    "ort-dynamic": (220.0, 40.0, 110.0),
    "openvino-nncf": (150.0, 21.0, 90.0),
    "openvino-nncf-f32": (149.0, 20.0, 80.0),
    "ours-onnxruntime": (200.0, 41.0, 100.0),
    "ours-onnxruntime-plain": (190.0, 40.0, 100.0),
    "ours-openvino": (140.0, 20.0, 60.0),
    "ours-openvino-f32": (140.0, 20.0, 60.0),
}
SIZES = {"ort-fp32": 440.0, "ours-onnxruntime": 198.0, "ours-openvino": 199.0}


def test_markdown() -> None:
    figures = fake({"ort-fp32": (600.0, 80.04), "torch-fp32": (900.0, 99.96)}, {"ort-fp32": 440.2})
    assert figures.markdown().splitlines() == [
        "| BERT-base | 8 x 128 | 1 x 128 | file |",
        "|---|--:|--:|--:|",
        "| words of ort-fp32 | 600 ms, 1.00 x | 80.0 ms, 1.00 x | 440 MB |",
        "| words of torch-fp32 | 900 ms, 0.67 x | 100.0 ms, 0.80 x |  |",
    ]


def test_without_the_base_there_are_times_and_no_ratios() -> None:
    figures = fake({"torch-fp32": (900.0,)}, {})
    assert figures.cells("torch-fp32") == ["900 ms", "", "0.990"]


def test_goals() -> None:
    found = {goal.words: goal for goal in goals.goals(fake(MADE_UP, SIZES))}
    verdicts = {words: goal.met for words, goal in found.items()}
    assert verdicts == {
        "ours-openvino / openvino-nncf at 8x128, times as fast": True,
        "ours-openvino / openvino-nncf at 1x128, times as fast": True,
        "ours-openvino / openvino-nncf at 1x384, times as fast": True,
        "ours-openvino / reference-openvino at 8x128, times as fast": None,
        "ours-openvino / reference-openvino at 1x128, times as fast": None,
        "ours-openvino / reference-openvino at 1x384, times as fast": None,
        "ours-openvino / ort-fp32 at 8x128, times as fast": True,
        "ours-openvino-f32 / openvino-nncf-f32 at 8x128, times as fast": True,
        "ours-openvino-f32 / openvino-nncf-f32 at 1x128, times as fast": False,
        "ours-openvino-f32 / openvino-nncf-f32 at 1x384, times as fast": True,
        "ours-openvino-f32 / reference-openvino-f32 at 8x128, times as fast": None,
        "ours-openvino-f32 / reference-openvino-f32 at 1x128, times as fast": None,
        "ours-openvino-f32 / reference-openvino-f32 at 1x384, times as fast": None,
        "ours-openvino-f32 / ort-fp32 at 8x128, times as fast": True,
        "ours-openvino-qdqbert / reference-openvino at 8x128, times as fast": None,
        "ours-openvino-qdqbert / reference-openvino at 1x128, times as fast": None,
        "ours-openvino-qdqbert / reference-openvino at 1x384, times as fast": None,
        "ours-onnxruntime / ort-fp32 at 8x128, times as fast": True,
        "ours-onnxruntime / ort-fp32 at 1x128, times as fast": False,
        "ours-onnxruntime / ort-dynamic at 8x128, times as fast": True,
        "ours-onnxruntime / ort-dynamic at 1x128, times as fast": False,
        "ours-onnxruntime / ort-dynamic at 1x384, times as fast": True,
        "ours-onnxruntime / ours-onnxruntime-plain at 8x128, times as fast": False,
        "ours-onnxruntime / ours-onnxruntime-plain at 1x128, times as fast": True,
        "ours-onnxruntime / ours-onnxruntime-plain at 1x384, times as fast": True,
        "ours-openvino / ours-openvino-plain at 8x128, times as fast": None,
        "ours-openvino / ours-openvino-plain at 1x128, times as fast": None,
        "ours-openvino / ours-openvino-plain at 1x384, times as fast": None,
        "file of ours-onnxruntime / float file": True,
        "file of ours-openvino / float file": False,
    }
    assert found["ours-openvino / openvino-nncf at 1x384, times as fast"].measured == pytest.approx(1.5)


def test_goals_as_text() -> None:
    figures = fake(MADE_UP, SIZES)
    lines = goals.lines(figures)
    assert lines[0] == "BERT-base: 13 of 18 goals are met"
    assert "  met: ours-openvino / openvino-nncf at 8x128, times as fast: 1.071, at least 1.05" in lines
    assert "  MISSED: ours-onnxruntime / ort-fp32 at 1x128, times as fast: 1.951, at least 2.00" in lines
    assert "  met: file of ours-onnxruntime / float file: 0.450, at most 0.45" in lines
    assert lines[-1] == "  12 are not measured: contenders or shapes are left out"
    assert str(Goal("a goal", None, 1.0)) == "not measured: a goal: at least 1.00"


def test_goals_and_markdown_are_printed_for_base(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "measure", lambda *_: fake(MADE_UP, SIZES))
    assert bench.main(["--models", "base", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("| BERT-base | 8 x 128 | 1 x 128 | 1 x 384 | file |\n")
    assert "\nBERT-base: 13 of 18 goals are met\n" in out


def test_the_machine_is_described_without_names_and_paths(tmp_path: Path) -> None:
    information = tmp_path / "cpuinfo"
    information.write_text(
        "model name\t: Fast\nflags\t\t: fpu avx2 avx512_vnni avx512_bf16 avx512fancy\n\nflags\t: amx_int8\n"
    )
    found = machine.describe(2, information)
    assert found["flags"] == ["avx2", "avx512_vnni", "avx512_bf16"]
    assert found["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert set(found) == {"python", "versions", "architecture", "flags", "cores", "threads"}
    assert machine.describe(2, tmp_path / "none")["flags"] == []


def test_cosine() -> None:
    one, other = [np.array([[1.0, 0.0]]), np.array([[0.0]])], [np.array([[1.0, 1.0]]), np.array([[0.0]])]
    assert bench.cosine(one, other) == pytest.approx(math.sqrt(0.5))
