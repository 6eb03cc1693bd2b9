"""What release 0.1.0 wrote before its packages were named anew works as it did: folders, rules, files, commands.

The fixtures were made by scripts/make_fixtures.py on one CPU. Whatever is data is compared exactly: ranges, plans,
rules, integers, names, findings. What a machine computes is not the same to the bit on another one: floats are summed
in another order, and where that moves a value across the middle between two integers it becomes the next one. So
outputs are compared with those of the fixture within a tolerance, and to the bit with those of a model that is
converted here.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from repository import ROOT, TESTS
from safetensors.torch import load_file
from saved import config_of, count_matches, metadata_of
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs
from make_fixtures import EXPORTS, MODELS, commands, computed, public_names, ranges
from qdq_surgery.checkpoint import plan_cache
from qdq_surgery.cli.commands import parser
from qdq_surgery.onnx_file.opened import open_exported
from qdq_surgery.surgery.model_state import plan_of

FIXTURES = TESTS / "fixtures" / "0.1.0"
VERSIONS: dict[str, str] = json.loads((FIXTURES / "versions.json").read_text())

#: Another order of summing in float32, over outputs of about 1.
FLOAT = 1e-5
#: A value that becomes the next integer moves an output by a step or so, of 127 to the largest.
QUANTIZED = 0.05

SHARDS = "*.safetensors"

#: Beside the dataclasses: what users are given, and do not make.
MADE_HERE = {"OnnxModel"}

RULES = sorted(path.stem for path in (FIXTURES / "rules").glob("*.yaml"))


def data(*parts: str) -> Any:
    return json.loads(FIXTURES.joinpath(*parts).read_text())


def tensors(kind: str, name: str) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in load_file(FIXTURES / kind / f"{name}.safetensors").items()}


def inputs_of(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if not value.is_floating_point()}


def weights_in(folder: Path) -> dict[str, Tensor]:
    return {key: value for path in folder.glob(SHARDS) for key, value in load_file(path).items()}


def load(name: str) -> PreTrainedModel:
    model: PreTrainedModel = getattr(transformers, MODELS[name][0]).from_pretrained(FIXTURES / "models" / name)
    return model.eval()


def same_versions(*names: str) -> bool:
    """Whether these are the packages of the fixtures; Python counts by its minor version."""
    here = {name: platform.python_version() if name == "python" else version(name) for name in names}
    wanted = {name: VERSIONS[name] for name in names}
    for each in (here, wanted):
        if "python" in each:
            each["python"] = each["python"].rpartition(".")[0]
    return here == wanted


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    """Within ``tolerance`` of the largest value."""
    assert found.dtype == wanted.dtype
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max().clamp(min=1)


# ------------------------------------------------------------------------------------------------------ saved folders


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_has_its_ranges_and_outputs(name: str) -> None:
    wanted = tensors("models", name)
    model = load(name)
    found = ranges(model)
    assert found.keys() == {key for key in wanted if key.startswith("ranges/")}
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    made = computed(model, inputs_of(wanted))
    assert_close(made["float/logits"], wanted["float/logits"], FLOAT)
    assert_close(made["logits"], wanted["logits"], QUANTIZED)
    assert not torch.equal(made["logits"], made["float/logits"])


@pytest.mark.parametrize("name", MODELS)
def test_a_saved_folder_is_what_converting_gives_here(name: str) -> None:
    """The same weights, converted now by the same rules, with the ranges of the folder: equal to the bit."""
    inputs = inputs_of(tensors("models", name))
    loaded, plain = load(name), load(name).dequantize()
    again = qs.convert(plain, plan_of(loaded).rules)
    again.load_state_dict(loaded.state_dict())
    assert torch.equal(computed(again.eval(), inputs)["logits"], computed(loaded, inputs)["logits"])


@pytest.mark.parametrize("release", ["0.1.0", "99"])
@pytest.mark.parametrize("name", MODELS)
def test_the_plan_of_a_saved_folder_is_that_of_then(name: str, release: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read from the weights' metadata, under the versions that wrote it; any other matches anew, the same."""
    monkeypatch.setattr(plan_cache, "__version__", release)
    made = count_matches(monkeypatch)
    found = plan_of(load(name))
    assert found.to_json() == data("models", f"{name}.plan.json")
    kept = release == VERSIONS["qdq_surgery"] and same_versions("torch", "transformers", "python")
    assert made == ([] if kept else [MODELS[name][0]])


@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    before, after = FIXTURES / "models" / name, tmp_path / "after"
    load(name).save_pretrained(after, max_shard_size=MODELS[name][-1])
    assert {path.name for path in after.iterdir()} == {path.name for path in before.iterdir()}
    assert config_of(after) == config_of(before)
    # Which shard has which tensor follows the order of the state dict, which is not that of a model just calibrated.
    found, wanted = weights_in(after), weights_in(before)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in found)
    locks = [json.loads(metadata_of(path)[plan_cache.METADATA]) for path in (*before.glob(SHARDS), *after.glob(SHARDS))]
    for lock in locks:
        del lock["fits"]  # the versions of now
    assert all(lock == locks[0] for lock in locks)
    reports = [json.loads((folder / "qdq_report.json").read_text()) for folder in (before, after)]
    for report in reports:
        del report["versions"]
    assert reports[0] == reports[1]


def test_a_pickled_model_is_refused_and_the_changelog_says_so() -> None:
    """It names modules that there are no more; nothing comes back half."""
    with (
        gzip.open(FIXTURES / "models" / "pickled.pt.gz") as file,
        pytest.raises((AttributeError, ModuleNotFoundError), match="qdq_surgery"),
    ):
        torch.load(file, weights_only=False)
    assert "Pickles of whole converted models" in (ROOT / "CHANGELOG.md").read_text()


# --------------------------------------------------------------------------------------------------------------- rules


@pytest.mark.parametrize("name", RULES)
def test_rule_files_mean_what_they_meant(name: str) -> None:
    wanted = data("rules", f"{name}.json")
    assert qs.QDQConfig(FIXTURES / "rules" / f"{name}.yaml").to_dict()["rules"] == wanted
    stored = {"quant_method": "qdq_surgery", "schema": 1, "rules": wanted}  # as a config.json has them
    assert qs.QDQConfig.from_dict(stored).to_dict() == stored


@pytest.mark.parametrize("name", MODELS)
def test_rules_find_what_they_found(name: str) -> None:
    """Matched now, by the files of then."""
    source = MODELS[name][2]
    file = FIXTURES / (source if source.endswith(".yaml") else f"rules/{source}.yaml")
    assert qs.plan(load(name).dequantize(), file).to_json() == data("models", f"{name}.plan.json")


# ------------------------------------------------------------------------------------------------------ exported files


@pytest.fixture
def exported(request: pytest.FixtureRequest) -> Path:
    for package in ("onnx", "onnx_ir", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    return FIXTURES / "exports" / f"{request.param}.onnx"


every_target = pytest.mark.parametrize("exported", EXPORTS, indirect=True)


@every_target
def test_an_exported_file_runs(exported: Path) -> None:
    wanted = tensors("exports", exported.stem)
    served = qs.load_onnx(exported)
    found = served(**inputs_of(wanted))
    assert type(served).__name__ == MODELS["bert"][0]
    assert type(found) is transformers.modeling_outputs.SequenceClassifierOutput
    assert_close(found.logits, wanted["logits"], QUANTIZED)


@pytest.mark.parametrize("exported", ["onnxruntime", "openvino"], indirect=True)
def test_an_exported_file_computes_what_its_folder_does(exported: Path) -> None:
    """Site by site, on this machine: all but ties are equal to the bit."""
    parity = qs.certify(load("bert"), exported, inputs_of(tensors("exports", exported.stem)), (exported.stem,))
    parity.require()


@every_target
def test_the_findings_are_those_of_then(exported: Path) -> None:
    found = json.dumps(qs.lint(exported).to_json())
    assert json.loads(found) == data("exports", f"{exported.stem}.json")["findings"]


@pytest.mark.parametrize("exported", ["onnxruntime", "openvino"], indirect=True)
def test_the_receipt_is_that_of_then(exported: Path) -> None:
    """The products to the last one; how they run only by the same runtime on the same kind of machine.

    And OpenVINO's kernels depend on the CPU's instructions.
    """
    wanted, found = data("exports", f"{exported.stem}.json")["receipt"], qs.receipt(exported, shape=(2, 7)).to_json()
    assert found.keys() == wanted.keys()
    products = [
        [[gemm[key] for key in ("name", "module", "kind", "macs")] for gemm in each["gemms"]]
        for each in (found, wanted)
    ]
    assert products[0] == products[1]
    if exported.stem == "onnxruntime" and same_versions("onnxruntime") and platform.machine() == VERSIONS["cpu"]:
        del found["path"], wanted["path"]
        assert found == wanted


@every_target
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_exporting_again_gives_the_same_integers_and_metadata(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "again.onnx"
    inputs = inputs_of(tensors("exports", exported.stem))
    qs.export_onnx(load("bert"), path, inputs, exported.stem, parity=False, **EXPORTS[exported.stem])
    found, wanted = (dict(open_exported(each).metadata) for each in (path, exported))
    assert found.keys() == wanted.keys()
    for key in found.keys() - {"version", "config"}:
        assert found[key] == wanted[key]
    if same_versions("transformers"):
        assert json.loads(found["config"]) == json.loads(wanted["config"])
    weights = open_exported(path).weights, open_exported(exported).weights
    assert weights[0].keys() == weights[1].keys()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


# ------------------------------------------------------------------------------------------------- names and commands


def test_the_public_names_are_still_there() -> None:
    """And their arguments, in the same places; what has been added can be left out."""
    now, then = public_names(), data("interface.json")
    del then["commands"]
    assert then.keys() <= now.keys()
    for name, wanted in then.items():
        found = now[name]
        assert set(wanted["members"]) <= set(found["members"]), name
        assert set(wanted["bases"]) <= set(found["bases"]), name
        if dataclasses.is_dataclass(getattr(qs, name)) or name in MADE_HERE:
            continue  # the members of results are what is read
        given = [key for key, (kind, _) in wanted["arguments"].items() if kind == "POSITIONAL_OR_KEYWORD"]
        assert [*found["arguments"]][: len(given)] == given, name
        for argument, facts in wanted["arguments"].items():
            assert found["arguments"][argument] == facts, f"{name}({argument})"
        for argument in found["arguments"].keys() - wanted["arguments"].keys():
            kind, default = found["arguments"][argument]
            assert default or kind.startswith("VAR_"), f"{name}({argument}) is new and must be given"


def test_the_commands_have_their_options() -> None:
    now, then = dict(commands(parser())), data("interface.json")["commands"]
    assert then.keys() <= now.keys()
    for command, options in then.items():
        for option, wanted in options.items():
            found = now[command][option]
            assert set(wanted["choices"] or ()) <= set(found["choices"] or ()), f"{command} {option}"
            assert {**found, "choices": None} == {**wanted, "choices": None}, f"{command} {option}"
        assert not [name for name in now[command].keys() - options.keys() if now[command][name]["wanted"]]


@pytest.mark.slow
def test_both_ways_to_start_the_command_are_there() -> None:
    [place] = re.findall(r'^qdq-surgery = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert place == "qdq_surgery.cli:main"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "qdq_surgery", "--version"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"qdq-surgery {qs.__version__}\n"), done.stderr


def test_the_fixtures_stay_small() -> None:
    """And name no place of the machine that made them."""
    files = [path for path in FIXTURES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 400_000
    for path in files:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        assert not re.search(rb"/(tmp|home|root|work)/", content), path
