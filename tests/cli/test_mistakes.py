"""Every command, with one mistake at a time: a line says where, what was found and what to do, and nothing is left."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
from tiny_checkpoint import TEXTS, save_tiny_bert

from qdq_surgery.cli.commands import COMMANDS, main, parser

#: What is right, by command; each line below changes one thing of it. (It is run by the other tests.)
RIGHT = {
    "quantize": "model texts.txt out",
    "plan": "model",
    "diff": "model",
    "explain": "model encoder.layer.0",
    "convert": "model out",
    "calibrate": "model texts.txt out",
    "evaluate": "cal texts.txt",
    "sensitivity": "cal texts.txt",
    "tune": "model texts.txt out.yaml",
    "export": "cal out.onnx",
    "lint": "foreign.onnx --target onnxruntime",
    "receipt": "model.onnx",
    "report": "cal out.html",
    "rules": "check qdqbert",
    "demo": "--texts 2",
    "completion": "bash",
}

NO_FOLDER = "nowhere is no folder; give one that model.save_pretrained(...) wrote"
NO_CONFIG = "full has no config.json; give a folder that model.save_pretrained(...) wrote"
TYPO = "bad.yaml:5:12: unknown key 'num_bit' in specs.weight; known: axis, .*num_bits"
NOTHING = "typo.yaml:5: rule 'typo' matches nothing in BertModel .*; correct its pattern or scope"
TAKEN = "exists and is not empty; give a new folder"
CONVERTED = "cal is converted already, by its own rules; leave --rules out"
FLOAT = "this BertModel is not converted; convert it first: qdq-surgery convert MODEL_DIR OUTPUT_DIR"
NO_RANGE = "calibrate the model: qdq-surgery calibrate MODEL_DIR TEXTS OUTPUT_DIR"
NO_ONNX = "old.onnx is no ONNX file that can be opened"
FOREIGN = "foreign.onnx was not written by qdq-surgery export; .*; export the model anew"
CHOICE = "invalid choice: 'gpu' (choose from "
NO_TEXTS = "none.txt cannot be read: No such file"

#: Command, arguments, what is said; a message of argparse has the exit code 2, every other one 1.
WRONG = {
    "quantize": {
        "nowhere texts.txt out": NO_FOLDER,
        "model none.txt out": NO_TEXTS,
        "model texts.txt full": TAKEN,
        "model texts.txt out --target gpu": CHOICE,
        "model texts.txt out --batch 0": "batches of 0 texts hold nothing: give at least 1 (--batch",
        "model texts.txt out --length 2": "texts of at most 2 tokens .*: give at least 3 (--length",
        "model texts.txt out --report old.html": "old.html exists; give another path",
        "model texts.txt out --report page.txt": "page.txt cannot be written: a report ends in .html",
        "cal texts.txt out": "cal is converted already; give the float model, or export it",
    },
    "plan": {
        "nowhere": NO_FOLDER,
        "texts.txt": "texts.txt is no folder; give one",
        "full": NO_CONFIG,
        "model --rules bad.yaml": TYPO,
        "model --rules typo.yaml": NOTHING,
        "model --rules ''": "'' is neither a shipped rule set nor a file",
        "''": "an empty text is no folder; give one",
        "model --width 0": "'0' is no number of columns; give 1 to 10000",
        "model --class BertForMaskdLM": "'BertForMaskdLM' is asked for, .* lacks (did you mean BertForMaskedLM?)",
        "cal --rules qdqbert": CONVERTED,
    },
    "diff": {
        "nowhere": NO_FOLDER,
        "full": NO_CONFIG,
        "model --rules none.yaml": "'none.yaml' is neither a shipped rule set nor a file; shipped: .*; or give",
        "model --rules bad.yaml": TYPO,
        "model --width x": "'x' is no number of columns; give 1 to 10000",
        "cal --rules qdqbert": CONVERTED,
    },
    "explain": {
        "nowhere": NO_FOLDER,
        "full": NO_CONFIG,
        "model encoder.layer.7": "there is no module 'encoder.layer.7'; near it: encoder.layer.0",
        "model nothing": "there is no module 'nothing'; at the top there are: embeddings, encoder",
        "model --rules typo.yaml": NOTHING,
        "cal --rules qdqbert": CONVERTED,
    },
    "convert": {
        "nowhere out": NO_FOLDER,
        "model": "the following arguments are required: OUTPUT_DIR",
        "model full": TAKEN,
        "model texts.txt": TAKEN,
        "model out --rules bad.yaml": TYPO,
        "model out --class GPT2Model": "model has no fitting weights for .* of GPT2Model (first: .*; save the",
        "cal out": "this BertModel holds quantizers already (first: .*); convert the float model",
    },
    "calibrate": {
        "nowhere texts.txt out": NO_FOLDER,
        "model none.txt out": NO_TEXTS,
        "model empty.txt out": "empty.txt has no text; write one in each line",
        "model utf16.txt out": "utf16.txt is UTF-16, no UTF-8 text; save it as UTF-8",
        "model rows.csv out": "rows.csv:1: no column is called text or sentence; say which has the texts: --column",
        "model texts.txt out --column words": "texts.txt has no columns",
        "model texts.txt full": TAKEN,
        "model texts.txt out --percentile 99": "--percentile goes with --method percentile only",
        "model texts.txt out --method percentile --percentile 200": "percentile 200.0 is outside (0, 100]; give for",
        "model texts.txt out --tokenizer full": "full .*tokenizer",
        "model texts.txt out --tokenizer ''": "an empty text is no folder, so it has no tokenizer",
        "model texts.txt out --rules ''": "'' is neither a shipped rule set nor a file",
        "cal texts.txt out --rules qdqbert": CONVERTED,
    },
    "evaluate": {
        "model texts.txt": FLOAT,
        "cal none.txt": NO_TEXTS,
        "cal texts.txt --metric kl": "--metric 'kl' is not for the outputs of BertModel; take one of 'mse', 'cosine'",
        "cal texts.txt --max-loss much": "'much' is no loss; give a number from 0 on",
        "cal texts.txt --runtime openvino": "--runtime goes with --onnx FILE only",
        "cal texts.txt --onnx none.onnx": "there is no file none.onnx",
        "cal texts.txt --onnx old.onnx": NO_ONNX,
        "cal texts.txt --onnx foreign.onnx": FOREIGN,
    },
    "sensitivity": {
        "model texts.txt": FLOAT,
        "bare texts.txt": NO_RANGE,
        "cal none.txt": NO_TEXTS,
        "cal texts.txt --metric kl": "--metric 'kl' compares probabilities, and BertModel has no logits .*; take 'mse'",
        "cal texts.txt --resume old.html": "resume: old.html holds no figures of a sensitivity: .*; give another file",
        "cal texts.txt --resume full": "resume: full holds no figures of a sensitivity: it is a directory",
    },
    "tune": {
        "cal texts.txt out.yaml": "holds quantizers already (first: .*); convert the float model",
        "model none.txt out.yaml": NO_TEXTS,
        "model texts.txt out.txt": "out.txt cannot be written: a rule file ends in .yaml; give out.yaml, say",
        "model texts.txt bad.yaml": "bad.yaml exists; give another path",
        "model texts.txt none/out.yaml": "none/out.yaml cannot be written: there is no folder none; make it first",
        "model texts.txt out.yaml --budget -1": "--budget -1.0 is no error: give a number of at least 0",
        "model texts.txt out.yaml --float-share 2": "--float-share 2.0 is no share: give a number from 0 to 1",
        "model texts.txt out.yaml --target gpu": "'gpu' is neither a shipped rule set nor a file; shipped: ",
    },
    "export": {
        "model out.onnx": FLOAT,
        "bare out.onnx": NO_RANGE,
        "cal out.txt": "out.txt cannot be written: an ONNX file ends in .onnx; give out.onnx, say",
        "cal old.onnx": "old.onnx exists; add --overwrite, or give another path",
        "cal out.onnx --opset 3": "opset 3 is not supported for onnxruntime; choose one of 19 to",
        "cal out.onnx --target gpu": CHOICE,
        "cal out.onnx --precision float16": "precision 'float16' is not supported for onnxruntime; choose float32",
        "cal out.onnx --target tensorrt --receipt": "--receipt of tensorrt needs the layers of a built engine: ",
    },
    "lint": {
        "": "the following arguments are required: FILE",
        "none.onnx": "there is no file none.onnx",
        "full": "full is no ONNX file that can be opened: it is a directory",
        "texts.txt": "texts.txt is no ONNX file that can be opened: its name does not end in .onnx",
        "old.onnx": NO_ONNX,
        "foreign.onnx": "foreign.onnx does not tell what it was exported for; give --target 'onnxruntime', ",
        "foreign.onnx --target gpu": CHOICE,
    },
    "receipt": {
        "none.onnx": "there is no file none.onnx",
        "full": "full is no ONNX file that can be opened: it is a directory",
        "old.onnx": NO_ONNX,
        "foreign.onnx": FOREIGN,
        "foreign.onnx --require 2": "--require 2 is no share; give above 0, at most 1",
        "foreign.onnx --target gpu": CHOICE,
    },
    "report": {
        "nowhere out.html": NO_FOLDER,
        "model out.html": FLOAT,
        "cal old.html": "old.html exists; add --overwrite, or give another path",
        "cal out.txt": "out.txt cannot be written: a report ends in .html; give out.html, say",
        "cal out.html --sensitivity": "--sensitivity is measured on TEXTS; name them after HTML",
        "cal out.html texts.txt --resume x.json": "--resume goes with --sensitivity only",
        "cal out.html --onnx foreign.onnx": FOREIGN,
        "cal out.html none.txt": NO_TEXTS,
    },
    "rules": {
        "": "the following arguments are required: ACTION",
        "chek qdqbert": "invalid choice: 'chek' (choose from .*list.*, .*show.*, .*check.*)",
        "list more": "unrecognized arguments: 'more'",
        "show none.yaml": "'none.yaml' is neither a shipped rule set nor a file; shipped: ",
        "check bad.yaml": TYPO,
        "check texts.txt": "texts.txt:1:1: found no mapping at the top; write keys: schema, name",
        "check typo.yaml --model model": NOTHING,
        "check qdqbert --model nowhere": NO_FOLDER,
    },
    "demo": {
        "--texts 1": "--texts 1: a nearest neighbour needs at least two texts",
        "--texts x": "argument --texts: invalid int value: 'x'",
        "--onnx x.txt": "x.txt cannot be written: an ONNX file ends in .onnx; give x.onnx, say",
        "--onnx old.onnx": "old.onnx exists; add --overwrite, or give another path",
        "--files full": TAKEN,
        "--files out --onnx x.onnx": "--files writes the model and texts alone; leave --onnx and --overwrite out",
    },
    "completion": {
        "": "the following arguments are required: SHELL",
        "fish": "invalid choice: 'fish' (choose from .*bash.*, .*zsh.*, .*tcsh.*)",
        "BASH": "invalid choice: 'BASH' (choose from .*bash.*, .*zsh.*, .*tcsh.*)",
        "bash zsh": "unrecognized arguments: 'zsh'",
        "bash --jsno": "unrecognized arguments: '--jsno'",
    },
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a user may have: a model, float, converted and calibrated, texts, and files that are something else."""
    onnx = pytest.importorskip("onnx")
    folder = tmp_path_factory.mktemp("files")
    save_tiny_bert(folder / "model", [*TEXTS, "0 1 2 3 4 5 6 7 8 9"])
    (folder / "texts.txt").write_text("\n".join(f"{TEXTS[number % 4]} {number}" for number in range(20)))
    (folder / "empty.txt").write_text("")
    (folder / "utf16.txt").write_bytes("a short one\n".encode("utf-16"))
    (folder / "rows.csv").write_text("id,words\n1,a short one\n")
    (folder / "full").mkdir()
    for name in ("full/x", "old.onnx", "old.html"):
        (folder / name).write_text("old")
    (folder / "bad.yaml").write_text("schema: 1\nname: bad\nextends: qdqbert\nspecs:\n  weight: {num_bit: 4}\n")
    (folder / "typo.yaml").write_text(
        "schema: 1\nname: t\nextends: qdqbert\nrules:\n"
        '  - {name: typo, why: w, match: {within: x, pattern: "linear(x, w)"}, quantize: {x: default}}\n'
    )
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", ends[:1], ends[1:])
    onnx.save(onnx.helper.make_model(graph), folder / "foreign.onnx")
    rules = ["--rules", "onnxruntime"]
    assert main(["convert", str(folder / "model"), str(folder / "bare"), *rules]) == 0
    words = ["calibrate", str(folder / "model"), str(folder / "texts.txt"), str(folder / "cal"), *rules]
    assert main(words) == 0
    return folder


def test_every_command_has_five_mistakes_and_what_is_right_parses() -> None:
    names = [each.name for each in COMMANDS]
    assert list(RIGHT) == list(WRONG) == names
    assert all(len(mistakes) >= 5 for mistakes in WRONG.values())
    for name, words in RIGHT.items():
        assert parser(name).parse_args([name, *words.split()]).run


@pytest.mark.parametrize(("command", "words"), [(name, words) for name, each in WRONG.items() for words in each])
def test_a_mistake_is_said_in_a_line_and_writes_nothing(
    command: str, words: str, files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    before = sorted(files.rglob("*"))
    try:
        code = main([command, *shlex.split(words)])
    except SystemExit as stop:
        code = 2 if stop.code == 2 else -1
    said = capsys.readouterr().err
    errors = re.findall(r"^qdq-surgery(?: [\w ]+)?: error: (.*)$", said, re.MULTILINE)
    assert len(errors) == 1, said
    wanted = re.escape(WRONG[command][words]).replace(r"\.\*", ".*")
    assert re.search(wanted, errors[0]), errors[0]
    assert code == (2 if "usage: " in said else 1)
    assert "Traceback" not in said
    assert not re.search(r"\b(named_modules|overwrite=|metric=|budget=|target=)", said)  # Python, for who types
    left = [path for path in sorted(files.rglob("*")) if path not in before]
    for path in left:  # for the tests that follow
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert left == []


def test_a_loss_of_quantizers_without_ranges_gets_a_note(
    files: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(files)
    note = "quantizers have no range yet (first: encoder.layer.0.attention.self.query._input_quantizer)"
    for folder, noted in (("bare", True), ("cal", False)):
        assert main(["evaluate", folder, "texts.txt"]) == 0
        assert (note in capsys.readouterr().err) is noted
