"""The run scripts, end to end on tiny random models and tiny tasks."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from tiny_checkpoint import save_tiny_bert

import run_classification
import run_ner
import run_qa
from tasks.generate import generate

TINY = "--max_seq_length 96 --per_device_train_batch_size 8 --num_calib_batch 2 --max_steps 2 --learning_rate 1e-3"


@dataclass(frozen=True)
class Script:
    name: str
    main: Callable[[list[str]], None]
    metric: str
    outputs: int = 1


SCRIPTS = {
    "qa": Script("qa", run_qa.main, "exact_match", outputs=2),
    "pairs": Script("pairs", run_classification.main, "accuracy"),
    "sentences": Script("sentences", run_classification.main, "accuracy"),
    "ner": Script("ner", run_ner.main, "f1"),
}


@dataclass(frozen=True)
class Place:
    """A task's files, an encoder, and where runs write."""

    script: Script
    folder: Path

    def run(self, model: str, output: str, options: str) -> Path:
        files = [next(self.folder.glob(f"{self.script.name}_{part}.*")) for part in ("train", "held_out")]
        given = f"--model_name_or_path {self.folder / model} --output_dir {self.folder / output} {TINY} {options}"
        self.script.main([*given.split(), "--train_file", str(files[0]), "--validation_file", str(files[1])])
        return self.folder / output

    def evaluate(self, file: Path, options: str = "") -> Path:
        """Scores of an exported file; nothing but the file and what lies beside it is given."""
        held_out = next(self.folder.glob(f"{self.script.name}_held_out.*"))
        given = f"--onnx {file} --output_dir {self.folder / 'evaluated'} --max_seq_length 96 --do_eval {options}"
        self.script.main([*given.split(), "--validation_file", str(held_out)])
        return self.folder / "evaluated"

    def error(self, model: str, options: str) -> str:
        with pytest.raises(SystemExit) as caught:
            self.run(model, "refused", options)
        return str(caught.value)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Place]:
    """For each task the files and an encoder; made once."""
    made = {}
    for name, script in SCRIPTS.items():
        folder = tmp_path_factory.mktemp(name)
        train, _ = generate(name, folder, train=24, held_out=9)
        save_tiny_bert(folder / "encoder", train.read_text(encoding="utf-8").splitlines())
        made[name] = Place(script, folder)
    return made


def scores(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "eval_results.json").read_text())
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qa", "pairs", "ner"])
def test_from_an_encoder_to_onnx(name: str, places: dict[str, Place], capsys: pytest.CaptureFixture[str]) -> None:
    place = places[name]
    metric = place.script.metric

    trained = place.run("encoder", "fp32", "--fp32 --do_train --do_eval")
    printed = capsys.readouterr().out
    assert "it gets a new, untrained one" in printed
    assert "trained 2 steps" in printed
    assert 0 <= scores(trained)[metric] <= 100
    assert scores(trained)["model"] == "float"
    again = place.run("fp32", "fp32-again", "--fp32 --do_eval")
    assert "untrained" not in capsys.readouterr().out
    assert scores(again)[metric] == scores(trained)[metric]

    calibrated = place.run("fp32", "calibrated", "--do_calib --do_eval")
    assert scores(calibrated)["model"] == "quantized"
    again = place.run("calibrated", "calibrated-again", "--do_eval")
    assert scores(again)[metric] == scores(calibrated)[metric]
    ranges = {key: value for key, value in weights(calibrated).items() if key.endswith("_amax")}
    assert len(ranges) == 20

    trained = place.run("calibrated", "qat", "--do_train --do_eval --save_onnx --teacher " + str(place.folder / "fp32"))
    after = weights(trained)
    assert all(torch.equal(value, after[key]) for key, value in ranges.items() if "weight_quantizer" not in key)
    moved = [key for key, value in weights(calibrated).items() if not torch.equal(value, after[key])]
    assert any(key.endswith("query.weight") for key in moved)

    check_onnx(trained / "model.onnx", place.script.outputs)
    capsys.readouterr()
    for runtime in ("onnxruntime", "openvino"):
        evaluated = place.evaluate(trained / "model.onnx", f"--runtime {runtime}")
        found = scores(evaluated)
        assert found["model"].startswith(f"ONNX ({runtime}")
        assert found["model"] in capsys.readouterr().out
        assert found.keys() == scores(trained).keys()
        # One of the nine examples may tip where a runtime rounds a tie, or computes in bfloat16.
        assert found[metric] == pytest.approx(scores(trained)[metric], abs=100 / 9 + 0.01)


def test_the_onnx_file_of_a_float_model(places: dict[str, Place]) -> None:
    place = places["sentences"]
    trained = place.run("encoder", "float", "--fp32 --do_train --do_eval --save_onnx")
    found = scores(place.evaluate(trained / "model.onnx"))
    assert found["accuracy"] == scores(trained)["accuracy"]
    assert (trained / "predictions.tsv").read_text() == (place.folder / "evaluated" / "predictions.tsv").read_text()


@pytest.mark.slow
def test_a_file_for_another_runtime_elsewhere(places: dict[str, Place]) -> None:
    """Written from a converted folder into a folder of its own, with the tokenizer beside it."""
    place = places["pairs"]
    place.run("encoder", "to-export", "--do_calib")
    folder = place.run("to-export", "exported", "--save_onnx --target openvino")
    assert not (folder / "model.safetensors").exists()
    assert scores(place.evaluate(folder / "model.onnx", "--runtime openvino"))["examples"] == 9


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def check_onnx(path: Path, outputs: int) -> None:
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    # One pair for quantizers with the same input and range, those of query, key and value; six weights are stored.
    assert 14 - 4 <= nodes.count("QuantizeLinear") == nodes.count("DequantizeLinear") - 6 <= 14
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for shape in ((1, 7), (3, 12)):
        feed = {each.name: np.ones(shape, dtype=np.int64) for each in session.get_inputs()}
        found = session.run(None, feed)
        assert len(found) == outputs
        assert all(each.shape[0] == shape[0] and np.isfinite(each).all() for each in found)


def test_a_run_is_repeatable(places: dict[str, Place]) -> None:
    one, other = (
        weights(places["pairs"].run("encoder", name, "--fp32 --do_train --seed 3")) for name in ("one", "other")
    )
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_learned_ranges_are_saved_as_ranges(places: dict[str, Place]) -> None:
    place = places["sentences"]
    before = place.run("encoder", "fixed", "--do_calib --calibrator max")
    learned = place.run("encoder", "learned", "--do_calib --calibrator max --do_train --learn_ranges")
    again = place.run("learned", "learned-again", "--do_eval")
    assert scores(again)["model"] == "quantized"
    ranges = [key for key in weights(before) if key.endswith("_amax")]
    assert any(not torch.equal(weights(before)[key], weights(learned)[key]) for key in ranges)


def test_training_goes_on_from_a_checkpoint(places: dict[str, Place]) -> None:
    place = places["ner"]
    place.run("encoder", "whole", "--do_calib --do_train --save_steps 1")
    checkpoints = place.folder / "whole" / "checkpoints"
    assert sorted(folder.name for folder in checkpoints.iterdir()) == ["checkpoint-1", "checkpoint-2"]
    first = f"--resume_from_checkpoint {checkpoints / 'checkpoint-1'}"
    resumed = place.run("encoder", "resumed", f"--do_calib --do_train {first}")
    whole = weights(place.folder / "whole")
    assert all(torch.equal(value, whole[key]) for key, value in weights(resumed).items())


@pytest.mark.parametrize(
    ("model", "options", "found"),
    [
        ("encoder", "--do_train", r"20 quantizers of .* have no range .*; give --do_calib"),
        ("encoder", "--do_eval", r"have no range"),
        ("none", "--do_eval", r"none has no config.json"),
        ("encoder", "--do_eval --fp32 --max_seq_length 500", r"knows 128 positions; give at most 128"),
        ("encoder", "--do_train --fp32 --teacher {folder}/encoder", r"has no trained ForSequenceClassification head"),
        ("encoder", "--do_train --fp32 --resume_from_checkpoint last", r"has no checkpoint; train with --save_steps"),
        ("encoder", "--do_train --fp32 --resume_from_checkpoint nowhere", r"nowhere is no folder"),
        ("encoder", "--do_eval --rules nonsense", r"nonsense"),
        ("encoder", "--do_eval --fp32 --tokenizer_name {folder}", r"has no tokenizer that can be loaded"),
    ],
)
def test_refusals_say_what_to_do(places: dict[str, Place], model: str, options: str, found: str) -> None:
    import re

    message = places["pairs"].error(model, options.format(folder=places["pairs"].folder))
    assert message.startswith("error: ")
    assert re.search(found, message)


@pytest.mark.slow
def test_files_that_cannot_be_evaluated(places: dict[str, Place]) -> None:
    place = places["pairs"]
    file = place.run("encoder", "tagged", "--fp32 --do_train --save_onnx") / "model.onnx"

    def error(script: Any, *options: str) -> str:
        held_out = ["--validation_file", str(next(place.folder.glob("pairs_held_out.*")))]
        with pytest.raises(SystemExit) as caught:
            script.main([*held_out, "--do_eval", "--output_dir", str(place.folder / "refused"), *options])
        return str(caught.value)

    assert "nowhere.onnx is no file; give one that" in error(run_classification, "--onnx", "nowhere.onnx")
    message = error(run_classification, "--onnx", str(file), "--max_seq_length", "500")
    assert f"{file} knows 128 positions; give at most 128" in message
    other = place.folder / "other.tsv"
    other.write_text(next(place.folder.glob("pairs_held_out.*")).read_text().replace("1\n", "9\n"))
    message = error(run_classification, "--onnx", str(file), "--validation_file", str(other))
    assert f"{file} knows the labels ['" in message
    moved = file.rename(place.folder / "alone.onnx")
    assert "has no tokenizer that can be loaded; give one with --tokenizer" in error(
        run_classification, "--onnx", str(moved)
    )
    span = places["qa"]
    file = span.run("encoder", "spans", "--fp32 --save_onnx") / "model.onnx"
    assert (
        "holds a BertForQuestionAnswering, whose head cannot be replaced, and this script needs one with a "
        "ForSequenceClassification head"
    ) in error(run_classification, "--onnx", str(file))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ("--do_eval", "give either --model_name_or_path, the folder of a model, or --onnx"),
        ("--do_eval --onnx m.onnx --model_name_or_path m", "give either --model_name_or_path, the folder"),
        ("--onnx m.onnx --do_eval --do_train --train_file x", "--onnx evaluates a file as it is; leave --do_train out"),
        ("--onnx m.onnx --do_eval --fp32", "--onnx evaluates a file as it is; leave --fp32 out"),
        ("--onnx m.onnx", "nothing to do"),
        ("--onnx m.onnx --do_eval --runtime tensorrt", "invalid choice: 'tensorrt'"),
        ("--model_name_or_path m --do_eval --runtime openvino", "--runtime says what to run --onnx on"),
        ("--model_name_or_path m --do_eval --target openvino", "--target says how to --save_onnx"),
        ("--model_name_or_path m --fp32 --save_onnx --target openvino", "--target is for quantized models"),
    ],
)
def test_options_of_onnx_that_do_not_fit(options: str, found: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_classification.main([*options.split(), "--validation_file", "x", "--output_dir", "y"])
    assert found in capsys.readouterr().err


def test_a_quantized_folder_is_not_taken_for_a_float_one(places: dict[str, Place]) -> None:
    place = places["pairs"]
    folder = place.run("encoder", "quantized", "--do_calib")
    assert "holds a quantized model; give the float model" in place.error("quantized", "--fp32 --do_eval")
    assert "is quantized; give the float model" in place.error("quantized", f"--do_train --teacher {folder}")


def test_data_with_other_labels_is_refused(places: dict[str, Place]) -> None:
    place = places["ner"]
    place.run("encoder", "tagger", "--fp32 --do_train")
    path = next(place.folder.glob("ner_held_out.*"))
    other = place.folder / "other.txt"
    other.write_text(path.read_text().replace("PER", "HUMAN"))
    given = f"--model_name_or_path {place.folder / 'tagger'} --output_dir {place.folder / 'o'} --fp32 --do_eval"
    with pytest.raises(SystemExit, match=r"and the data has \['B-HUMAN'.* beside them"):
        run_ner.main([*given.split(), "--validation_file", str(other)])


def test_long_contexts_are_answered_in_windows(places: dict[str, Place]) -> None:
    folder = places["qa"].run("encoder", "windows", "--fp32 --do_eval --max_seq_length 48 --doc_stride 8")
    answers = json.loads((folder / "predictions.json").read_text())
    ranked = json.loads((folder / "nbest_predictions.json").read_text())
    assert len(answers) == 9
    assert all(answers[name] == candidates[0]["text"] for name, candidates in ranked.items())


#: What torchrun does: it tells each of its processes who it is, and runs the script. Without it they need not import
#: torch, it and they.
AS_TORCHRUN = """
import os, runpy, sys
rank, meet = sys.argv[1:3]
os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", GROUP_RANK="0")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=meet, OMP_NUM_THREADS="1")
import torch
torch.set_num_threads(1)
sys.argv = sys.argv[3:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_processes_calibrate_like_one(places: dict[str, Place], tmp_path: Path) -> None:
    """As torchrun starts them: each process brings half of the batches, and training leaves the ranges as they are."""
    place = places["qa"]
    alone = place.run("encoder", "alone", "--do_calib --num_calib_batch 4")
    files = [place.folder / f"qa_{part}.json" for part in ("train", "held_out")]
    options = f"--model_name_or_path {place.folder / 'encoder'} --output_dir {place.folder / 'both'} {TINY}"
    options += (
        f" --do_calib --num_calib_batch 4 --do_train --do_eval --train_file {files[0]} --validation_file {files[1]}"
    )
    given = [free_port(), run_qa.__file__, *options.split()]
    folders = [tmp_path / str(rank) for rank in range(2)]
    both = [forked.start(AS_TORCHRUN, rank, *given, folder=folder) for rank, folder in enumerate(folders)]
    said = "".join([forked.ended(process, folder) for process, folder in zip(both, folders, strict=True)])
    assert said.count("calibrated by the rules' methods") == 1  # only one process speaks
    assert scores(place.folder / "both")["examples"] == 9
    ranges = [load_file(folder / "model.safetensors") for folder in (alone, place.folder / "both")]
    names = [name for name in ranges[0] if name.endswith("_quantizer._amax")]
    assert len(names) == 20
    assert all(torch.equal(ranges[0][name], ranges[1][name]) for name in names)
