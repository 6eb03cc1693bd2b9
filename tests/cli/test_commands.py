"""The command line: what each command prints and writes, exit codes, one-line errors."""

from __future__ import annotations

import errno
import io
import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from architectures import batch_for, build
from safetensors.torch import load_file
from transformers import BertForTokenClassification, GPT2Config, GPT2Model

import qdq_surgery as qs
from qdq_surgery.cli.commands import COMMANDS, main
from qdq_surgery.cli.folder import load_model, save_model
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.text import progress
from qdq_surgery.texts import standard_library


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "tagger"
    build("bert", "BertForTokenClassification", num_labels=4).save_pretrained(path)
    (path / "tokenizer.json").write_text("{}")
    return path


def test_convert_writes_weights_config_rules_and_report(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "converted"
    assert main(["convert", str(folder), str(output)]) == 0
    printed = capsys.readouterr().out
    assert "BertForTokenClassification: 40 quantizers by rule set qdqbert in 2 layers" in printed
    assert f"written to {output}" in printed
    names = {path.name for path in output.iterdir()}
    assert names == {"config.json", "model.safetensors", "qdq_report.json", "tokenizer.json"}
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    report = json.loads((output / "qdq_report.json").read_text())
    assert report["versions"]["transformers"].startswith("5.")
    assert report["quantizers"]["encoder-linear"] == 24
    assert [site["layers"] for site in report["sites"]] == ["0-1"] * 20
    # What was written is enough to make the same model again.
    again = BertForTokenClassification.from_pretrained(output)
    assert [*qs.quantizers(again)] == [
        *qs.quantizers(qs.convert(build("bert", "BertForTokenClassification", num_labels=4)))
    ]
    again(**batch_for(again, (2, 4)))


def test_rules_that_extend_others_travel_whole(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "schema: 1\nname: base\nextends: linear-only\nspecs:\n  weight: {num_bits: 4}\n"
    )
    (tmp_path / "own.yaml").write_text("schema: 1\nname: own\nextends: base.yaml\n")
    output = tmp_path / "converted"
    assert main(["convert", str(folder), str(output), "--rules", str(tmp_path / "own.yaml")]) == 0
    (tmp_path / "base.yaml").unlink()
    weight = plan_of(load_model(output)).rules.specs["weight"]
    assert weight is not None
    assert weight.num_bits == 4


def test_diff(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diff", str(folder), "--width", "120"]) == 0
    text = capsys.readouterr().out
    assert "BertOutput  bert.encoder.layer.0.output, in 2 layers" in text
    assert max(map(len, text.splitlines())) <= 120
    assert main(["diff", str(folder), "--json", "--rules", "linear-only"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["plan"]["rules"] == "linear-only"


def test_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(folder)]) == 0
    assert "no rule is about a linear outside the encoder layers" in capsys.readouterr().out
    assert main(["plan", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["coverage"]["matmul"] == {"found": 4, "quantized": 4, "refused": 0}


def test_rules(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rules", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in qs.shipped_rules())
    assert main(["rules", "show", "qdqbert"]) == 0
    assert capsys.readouterr().out == qs.shipped_rules()["qdqbert"].read_text()
    assert main(["rules", "check", "qdqbert"]) == 0
    assert "qdqbert: 6 rules, 0 exclusions, no mistake found" in capsys.readouterr().out
    assert main(["rules", "check", "linear-only", "--model", str(folder)]) == 0
    assert "fits tagger (BertForTokenClassification): 24 quantizers in 2 layers" in capsys.readouterr().out
    bad = tmp_path / "bad.yaml"
    bad.write_text("schema: 1\nname: bad\nextends: qdqbert\nspecs:\n  weight: {num_bit: 4}\n")
    assert main(["rules", "check", str(bad)]) == 1
    assert f"error: {bad}:5:12: unknown key 'num_bit'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "nowhere"], "nowhere is no folder; give one that model.save_pretrained"),
        (["plan", "{tmp}/empty"], "empty has no config.json"),
        (["plan", "{tmp}/bare"], "bare has no weights"),
        (["plan", "{tmp}/broken"], "model.safetensors cannot be read: "),
        (["plan", "{tmp}/headless"], "config.json names no class under 'architectures'"),
        (["plan", "{tmp}/unknown"], "names the class 'MyOwnHead', which transformers"),
        (["convert", "{folder}", "{tmp}/bare"], "bare exists and is not empty; give a new folder"),
        (["convert", "{folder}", "/proc/nothing/here"], "here cannot be written"),
        (
            ["plan", "{folder}", "--rules", "qdqbrt"],
            "'qdqbrt' is neither a shipped rule set nor a file; shipped: fuse-qkv, linear-only, onnxruntime, "
            "openvino, pytorch, qdqbert-scaled, qdqbert, tensorrt-both, tensorrt-none, tensorrt",
        ),
        (
            ["plan", "{folder}", "--rules", "{tmp}/typo.yaml"],
            "typo.yaml:5: rule 'typo' matches nothing in BertForToken",
        ),
        (["plan", "{tmp}/headless", "--class", "BertForPoetry"], "the class 'BertForPoetry' is asked for"),
        (["export", "{folder}", "{tmp}/x.txt"], "an ONNX file ends in .onnx"),
        (["plan", "\x1b[2J"], "\\x1b[2J is no folder"),
        (["demo", "--texts", "1"], "a nearest neighbour needs at least two texts"),
        (["demo", "--texts", "10000000"], "standard library has only"),
    ],
)
def test_mistakes_end_in_one_line(
    arguments: list[str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        standard_library, "_prose", lambda: ("a text", "another")
    )  # reading all of Python's own takes seconds
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"architectures": ["BertModel"], "model_type": "bert"}')
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"nothing")
    for name, config in (("headless", "{}"), ("unknown", '{"architectures": ["MyOwnHead"]}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / "model.safetensors").write_bytes(b"nothing")
    (tmp_path / "typo.yaml").write_text(
        "schema: 1\nname: t\nextends: qdqbert\nrules:\n"
        '  - {name: typo, why: w, match: {within: x, pattern: "linear(x, w)"}, quantize: {x: default}}\n'
    )
    code = main([argument.format(tmp=tmp_path, folder=folder) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 1
    assert captured.out == ""
    assert captured.err.startswith("qdq-surgery: error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["convert"],
        ["rules"],
        ["plan", "x", "--width", "wide"],
        ["plan", "x", "--width", "0"],
        ["plan", "a\0b"],
        ["unknown"],
    ],
)
def test_a_wrong_command_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage: qdq-surgery" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["quantise", "x"], "'quantise' is no command (did you mean quantize?); there are quantize, plan, "),
        (["xyz"], "'xyz' is no command; there are quantize, plan, "),
        (["plan", "x", "--rulse", "y"], "unrecognized arguments: '--rulse' 'y' (did you mean --rules?)"),
        (["plan", "x", "--jsno=1"], "unrecognized arguments: '--jsno=1' (did you mean --json?)"),
        (["plan", "x", "y"], "unrecognized arguments: 'y'\n"),
    ],
)
def test_what_is_misspelt_is_told_what_was_meant(
    arguments: list[str], meant: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize("words", ["--help", "--version", "nothing-of-the-kind", "demo --files x --texts 1"])
def test_torch_is_not_imported_for_what_does_not_need_it(words: str) -> None:
    """A process that is the command, whose first argument is its own name."""
    code = (
        "import sys; sys.argv = ['qdq-surgery', *sys.argv[1:]]\n"
        "from qdq_surgery.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules.keys() & {'torch', 'transformers', 'numpy'})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *words.split()], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.endswith("\n")
    assert done.stdout.splitlines()[-1] == ""


@pytest.mark.slow
def test_as_the_command_the_package_is_whole_and_its_reader_may_go(folder: Path) -> None:
    """What runs in it imports names of the package as everybody does, and loads folders that are converted.

    Then it is run as a module, and prints when nobody reads any more, as in front of ``| head -1``.
    """
    code = (
        "import runpy, sys; sys.argv = ['qdq-surgery', 'plan', sys.argv[1]]\n"
        "from qdq_surgery.cli import main\n"
        "assert main() == 0\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING\n"
        "assert 'qdq_surgery' in AUTO_QUANTIZER_MAPPING\n"
        "print('whole', flush=True)\n"
        "sys.stdin.read(); sys.argv[1] = 'diff'\n"
        "runpy.run_module('qdq_surgery', run_name='__main__')\n"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, str(folder)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        said = list(itertools.takewhile(lambda line: line != "whole\n", process.stdout))
        process.stdout.close()
        process.stdin.close()
        errors = process.stderr.read()
    assert "40 quantizers by rule set qdqbert" in "".join(said)
    assert process.returncode == 0, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert main(["completion", shell]) == 0
    printed = capsys.readouterr().out
    assert all(each.name in printed for each in COMMANDS)
    assert "round-weights" in printed
    if shell == "bash":
        done = subprocess.run(
            ["bash", "-c", f"{printed}\ncomplete -p qdq-surgery"], capture_output=True, text=True, check=True
        )
        assert done.stdout.rstrip().endswith("qdq-surgery")


@pytest.mark.parametrize("command", ["", *(each.name for each in COMMANDS)])
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert "usage: qdq-surgery" in capsys.readouterr().out


def test_a_failed_conversion_leaves_no_folder(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(BertForTokenClassification, "save_pretrained", fail)
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 1
    assert list(tmp_path.iterdir()) == []


def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.yaml").write_text("schema: 1\nname: r\u00e8gles\nextends: qdqbert\n", encoding="utf-8")
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii", write_through=True))
    monkeypatch.setattr(sys, "argv", ["qdq-surgery", "rules", "check", str(tmp_path / "mine.yaml")])
    assert main() == 0
    assert shown.getvalue().startswith(rb"r\xe8gles: ")


class FullDisk(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("command", ["rules list", "rules show qdqbert"])
def test_a_full_disk_behind_the_output(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", FullDisk())
    assert main(command.split()) == 1
    assert capsys.readouterr().err == "qdq-surgery: error: the output cannot be written: No space left on device\n"


def test_a_bar_appears_only_after_a_while(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """No time passes: the clock is one that is asked for two seconds, which are over at once or never."""
    import rich.console

    real = rich.console.Console
    waits: list[float] = []

    def terminal(**options: object) -> rich.console.Console:
        return real(**{**options, "force_terminal": True, "width": 80})  # type: ignore[arg-type]

    class Clock:
        daemon, over = False, False

        def __init__(self, seconds: float, then: Callable[[], None]) -> None:
            waits.append(seconds)
            self.start = then if self.over else lambda: None
            self.cancel = self.join = lambda: None

    monkeypatch.setattr(progress, "Console", terminal)
    monkeypatch.setattr(progress, "Timer", Clock)
    assert list(progress.track([1, 2], "quick", 2)) == [1, 2]
    assert "quick" not in capsys.readouterr().err
    monkeypatch.setattr(Clock, "over", True)
    with progress.steps(2) as bar:
        bar.next("slow")
    assert "slow" in capsys.readouterr().err
    assert waits == [progress.PATIENCE] * 2


def test_nothing_in_a_folder_is_lost_silently(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    qmodel = qs.convert(build("bert", "BertForTokenClassification", num_labels=4))
    qs.calibrate(qmodel, [batch_for(qmodel, (2, 6))])
    qmodel.save_pretrained(tmp_path / "calibrated")
    config = json.loads((tmp_path / "calibrated" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "calibrated" / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path / "calibrated")]) == 1
    assert "calibrated holds ranges of 40 quantizers" in capsys.readouterr().err
    shutil.copytree(folder, tmp_path / "other")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(
        json.dumps({**config, "architectures": ["BertForQuestionAnswering"]})
    )
    assert main(["plan", str(tmp_path / "other")]) == 1
    assert (
        "has no fitting weights for 2 parameters of BertForQuestionAnswering (first: qa_outputs.bias)"
        in capsys.readouterr().err
    )


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "tagger"
    build("bert", "BertForTokenClassification", num_labels=4, num_hidden_layers=1).save_pretrained(folder)
    qmodel = qs.convert(load_model(folder), "onnxruntime")
    file = tmp_path / "model.onnx"
    save_model(qmodel, tmp_path / "bare")
    assert main(["export", str(tmp_path / "bare"), str(file)]) == 1
    assert "calibrate the model" in capsys.readouterr().err
    assert not file.exists()
    qs.calibrate(qmodel, [batch_for(qmodel, (2, 9))], "max")
    save_model(qmodel, tmp_path / "calibrated")
    assert main(["export", str(tmp_path / "calibrated"), str(file), "--receipt"]) == 0
    printed = capsys.readouterr().out
    assert "6 weights in int8, 8 Q/DQ pairs for 10 quantizers of activations" in printed
    assert "agrees" in printed
    assert "linears of the encoder" in printed
    assert file.is_file()
    options = ["--target", "tensorrt", "--precision", "float16", "--no-parity", "--json"]
    assert main(["export", str(tmp_path / "calibrated"), str(file), *options, "--overwrite"]) == 1
    assert "with an unsigned grid, and tensorrt has only symmetric ones" in capsys.readouterr().err
    qmodel = qs.convert(load_model(folder), "tensorrt-none")
    qs.calibrate(qmodel, [batch_for(qmodel, (2, 9))], "max")
    save_model(qmodel, tmp_path / "symmetric")
    assert main(["export", str(tmp_path / "symmetric"), str(file), *options]) == 1
    assert "exists; add --overwrite, or give another path" in capsys.readouterr().err
    options.append("--overwrite")
    assert main(["export", str(tmp_path / "symmetric"), str(file), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["target"], found["opset"], found["parity"]) == ("tensorrt", 19, None)
    assert len(found["sites"]) == 14
    assert main(["export", str(folder), str(file), "--overwrite"]) == 1
    assert "is not converted" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"qdq-surgery {qs.__version__}\n"


def test_an_older_folder_needs_no_class_and_a_decoder_is_called_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("bert", "BertModel").save_pretrained(tmp_path / "old")
    config = json.loads((tmp_path / "old" / "config.json").read_text())
    del config["architectures"]
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    assert main(["plan", str(tmp_path / "old")]) == 0
    assert "BertModel: 40 quantizers" in capsys.readouterr().out
    GPT2Model(GPT2Config(n_layer=1, n_head=2, n_embd=32, vocab_size=64)).save_pretrained(tmp_path / "gpt2")
    assert main(["plan", str(tmp_path / "gpt2")]) == 1
    assert "GPT2Model is a decoder, and a decoder is not supported" in capsys.readouterr().err


def test_a_head_that_a_class_leaves_out_gets_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("bert", "BertForPreTraining").save_pretrained(tmp_path / "both")
    assert main(["plan", str(tmp_path / "both"), "--class", "BertForMaskedLM"]) == 0
    assert "qdq-surgery: note: " in (error := capsys.readouterr().err)
    assert "cls.seq_relationship.bias" in error


def test_advice_names_what_can_be_typed(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(folder), str(tmp_path / "bare"), "--rules", "onnxruntime"]) == 0
    assert main(["export", str(tmp_path / "bare"), str(tmp_path / "x.onnx")]) == 1
    assert "calibrate the model: qdq-surgery calibrate MODEL_DIR TEXTS OUTPUT_DIR" in capsys.readouterr().err


@pytest.mark.parametrize("width", ["0", "-1", "many", "99999999"])
def test_a_width_is_a_number_of_columns(width: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["plan", str(folder), "--width", width])
    assert stop.value.code == 2
    assert f"'{width}' is no number of columns; give 1 to 10000" in capsys.readouterr().err


def test_a_receipt_of_tensorrt_is_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.onnx"
    with pytest.raises(SystemExit) as stop:
        main(["export", str(folder), str(file), "--target", "tensorrt", "--receipt"])
    assert stop.value.code == 2
    assert "needs the layers of a built engine" in capsys.readouterr().err
    assert not file.exists()


@pytest.mark.parametrize(("name", "said"), [("x.txt", "ends in .onnx"), ("old.onnx", "exists; add --overwrite")])
def test_where_an_export_cannot_go_is_told_first(
    name: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "old.onnx").write_text("old")
    assert main(["export", str(tmp_path / "no model"), str(tmp_path / name)]) == 1
    assert said in capsys.readouterr().err
