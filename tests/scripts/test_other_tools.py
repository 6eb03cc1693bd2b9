"""Deployed folders in other tools: what is compared and told; and the tools themselves, where they are installed.

`bash scripts/other_tools.sh` installs them, into .tools.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pages import SENTENCES, Block, blocks, furnish
from repository import ROOT

import other_tools
from qdq_surgery.cli.commands import main as command
from qdq_surgery.deployment.triton import write_repository
from qdq_surgery.padding.token_masks import token_means
from qdq_surgery.targets.registry import TARGETS
from qdq_surgery.texts import standard_library
from tools import environments
from tools.compared import Comparison, Rows, compared, page_table, printed
from tools.deployed import ours
from tools.environments import made, make, pins, rows_in
from tools.given import EMBEDDINGS, LOGITS, give, given, mean_embeddings
from tools.page import BEGIN, END, written
from tools.tools import TOOLS, Tool
from versions.environments import MissingError

TOOLS_FOLDER = ROOT / ".tools"
PAGE = (ROOT / "docs" / "deployment.md").read_text(encoding="utf-8")
FILE = "onnx/model_quantized.onnx"

#: As all-MiniLM-L6-v2 has it, whose folder has no 2_Normalize.
MODULES = """[
  {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
  {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
  {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"}
]"""

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="there is no node")


def rows(values: Any, version: str = "1.31.1") -> Rows:
    return Rows(FILE, {"tool": "7.1"}, ("onnxruntime", version), np.asarray(values, dtype=np.float32))


OURS = np.array([[0.6, 0.8], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (rows(OURS), True),
        (rows(OURS + 1e-6), True),  # float32 rounding
        (rows(OURS + 1e-4), False),  # a value that went the other way at a tie
        (rows(OURS + 1e-4, "1.30.0"), True),  # ... in another version of the runtime
        (rows(OURS[::-1], "1.30.0"), False),
        (rows(OURS * 1.01, "1.31.1"), False),  # the same direction, and another normalization
        (rows([[0.6, 0.8], [np.nan, 0.0]]), False),
        (rows([[0.6, 0.8], [np.nan, 0.0]], "1.30.0"), False),
        (rows(OURS[:1]), False),  # not broadcast
        ("ended with 1: no such file", False),
    ],
)
def test_a_tool_is_right_to_the_rounding_of_the_runtime(found: Rows | str, right: bool) -> None:
    assert compared("a tool", EMBEDDINGS, rows(OURS), found).right is right


def test_the_largest_difference_and_the_smallest_cosine_are_told() -> None:
    made = compared("a tool", EMBEDDINGS, rows(OURS * 2), rows([[1.2, 1.6], [1.9, 0.1]]))
    assert made.difference == pytest.approx(0.05, rel=1e-6)
    assert made.cosine == pytest.approx(1.9 / np.hypot(1.9, 0.1), rel=1e-6)
    lines = printed([made, compared("b", LOGITS, rows(OURS), "no npm")]).splitlines()
    assert re.split(r"  +", lines[1]) == ["a tool", "7.1", "onnxruntime 1.31.1", FILE, EMBEDDINGS, "5e-02", "0.998618"]
    assert lines[3].startswith("a tool, embeddings: differs by 5.0e-02, smallest cosine 0.998618; ")
    assert lines[4] == "b, logits: no npm"
    assert f"| a tool | 7.1 | onnxruntime 1.31.1 | `{FILE}` | embeddings | 5e-02 | 0.998618 |" in page_table([made])


def test_the_table_takes_its_place_on_the_page() -> None:
    page = f"before\n{BEGIN}old\n{END}\nafter\n"
    assert written(page, "\\1 new\n") == f"before\n{BEGIN}\\1 new\n{END}\nafter\n"
    with pytest.raises(ValueError, match="once each"):
        written("no marks", "new\n")


def test_the_page_has_what_the_script_runs_in_its_versions() -> None:
    """... and says of each tool that it gives our numbers."""
    table = PAGE.partition(BEGIN)[2].partition(END)[0]
    found = [line.strip("| ").split(" | ") for line in table.splitlines()[2:]]
    asked = {(tool.name, tool.target, wanted): tool for tool in TOOLS for wanted in tool.wanted}
    assert sorted((row[0], row[2].split()[0], row[4]) for row in found) == sorted(asked)
    for name, version, runtime, file, wanted, difference, cosine in found:
        tool = asked[name, runtime.split()[0], wanted]
        assert version in pins(tool).values()
        package = "onnxruntime-node" if name == "Transformers.js" else tool.target
        assert runtime.split()[1] == pins(tool)[package]
        assert tool.target in ("onnxruntime", file.split("/")[0].strip("`"))
        assert float(difference) <= 2e-6
        assert float(cosine) == 1


@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool.program.endswith(".py")])
def test_a_tool_runs_the_runtime_that_we_run(tool: Tool) -> None:
    own = dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "scripts" / "constraints.txt").read_text(), re.MULTILINE))
    assert pins(tool)[tool.target] == own[tool.target]
    assert pins(tool).get("torch", own["torch"]) == own["torch"]


def test_means_are_ours() -> None:
    states, mask = (
        torch.randn(3, 5, 4, generator=torch.manual_seed(0)),
        torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1, 0, 0, 0, 0]]),
    )
    wanted = torch.nn.functional.normalize(token_means(states, mask), dim=-1)
    # Float32 rounding of a sum of five.
    assert np.allclose(mean_embeddings(states.numpy(), mask.numpy()), wanted.numpy(), rtol=0, atol=1e-6)


def test_what_a_program_writes_is_what_is_read(tmp_path: Path) -> None:
    (tmp_path / "batches.json").write_text('[["a", "b"], ["c"]]')
    task = given([str(tmp_path), str(tmp_path / "batches.json"), EMBEDDINGS, str(tmp_path / "out.json")])
    give(task, tmp_path / FILE, ["torch"], lambda texts: [[len(texts), 0.1]] * len(texts), "numpy")
    found = Rows.read(tmp_path / "out.json")
    assert found.file == FILE
    assert found.versions == {"torch": torch.__version__, "numpy": np.__version__}
    assert found.runtime == ("numpy", np.__version__)
    assert np.array_equal(found.rows, np.array([[2, 0.1], [2, 0.1], [1, 0.1]], dtype=np.float32))


@needs_node
def test_the_program_for_node_is_one() -> None:
    subprocess.run(["node", "--check", "scripts/tools/in_transformers_js.mjs"], cwd=ROOT, check=True)


def test_what_cannot_be_installed_fails_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(other_tools, "deploy", lambda output, *_: output)
    monkeypatch.setattr(other_tools, "ours", lambda *_: rows(OURS))
    monkeypatch.setattr(
        standard_library, "_prose", lambda: tuple(map(str, range(1000)))
    )  # reading Python's own takes seconds
    assert other_tools.main(["--folder", str(tmp_path), "--environments", "transformers-js"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "Transformers.js, logits: no npm on the path"
    assert not made(TOOLS[-1], tmp_path)


def test_a_page_is_written_whole(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        other_tools.main(["--write-page", "--environments", "fastembed"])
    assert "leave out --environments" in capsys.readouterr().err


def test_an_environment_is_made_once_for_its_requirements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = TOOLS[0]
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(environments, "run", lambda command, **_: ran.append(command))
    ran: list[Any] = []
    for text, runs in (("a==1\n", 2), ("a==1\n", 0), ("torch==2\na==1\n", 4)):
        (tmp_path / "optimum-onnx.txt").write_text(text)
        ran.clear()
        make(tool, tmp_path / "made")
        assert len(ran) == runs
        assert made(tool, tmp_path / "made")


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of the page, of tiny models; each has the file, and OpenVINO's form of it."""
    folder = tmp_path_factory.mktemp("deployed")
    furnish(folder)
    (folder / SENTENCES / "modules.json").write_text(MODULES)
    (folder / SENTENCES / "1_Pooling").mkdir()
    (folder / SENTENCES / "1_Pooling" / "config.json").write_text(
        '{"word_embedding_dimension": 32, "pooling_mode_mean_tokens": true}'
    )
    for model, output in (("my-bert", "my-bert-deployed"), (SENTENCES, "my-embedder-deployed")):
        words = [str(folder / model), str(folder / "texts.txt"), str(folder / output), "--target", "openvino"]
        assert command(["quantize", *words, "--no-round-weights"]) == 0
        write_repository(folder / output, "int8", TARGETS["onnxruntime"])
    texts = (folder / "texts.txt").read_text().splitlines()
    (folder / "batches.json").write_text(json.dumps([texts[:8], texts[8:16]]))
    return folder


def installed(tool: Tool) -> None:
    if not made(tool, TOOLS_FOLDER):
        pytest.skip(
            f"{tool.environment} is not installed; bash scripts/other_tools.sh --environments {tool.environment}"
        )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tool", "wanted"),
    [(tool, wanted) for tool in TOOLS for wanted in tool.wanted],
    ids=lambda each: "-".join(each[:2]) if isinstance(each, Tool) else each,
)
def test_a_tool_gives_our_numbers(tool: Tool, wanted: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    installed(tool)
    home: Path = request.getfixturevalue("deployed")
    folder = home / {EMBEDDINGS: "my-embedder-deployed", LOGITS: "my-bert-deployed"}[wanted]
    os.symlink(TOOLS_FOLDER / tool.environment, tmp_path / tool.environment)
    found = rows_in(tool, tmp_path, folder, home / "batches.json", wanted)
    own = ours(folder, tool.target, json.loads((home / "batches.json").read_text()), wanted)
    made: Comparison = compared(tool.name, wanted, own, found)
    assert made.right, printed([made])
    assert found.rows.std(0).max() > 1e-3  # texts differ
    place = "triton" if tool.environment == "triton" else {"onnxruntime": "onnx", "openvino": "openvino"}[tool.target]
    assert found.file.partition("/")[0] == place


def test_a_program_that_fails_says_why(tmp_path: Path) -> None:
    [tool] = [tool for tool in TOOLS if tool.name == "fastembed"]
    installed(tool)
    os.symlink(TOOLS_FOLDER / tool.environment, tmp_path / tool.environment)
    (tmp_path / "batches.json").write_text("[]")
    with pytest.raises(MissingError, match=r"config\.json"):
        rows_in(tool, tmp_path, tmp_path / "nothing", tmp_path / "batches.json", EMBEDDINGS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "block", [each for each in blocks("docs/deployment.md") if each.elsewhere], ids=lambda each: f"line {each.line}"
)
def test_the_page_s_lines_run_in_the_tool(block: Block, request: pytest.FixtureRequest) -> None:
    tool = next(tool for tool in TOOLS if tool.environment == block.elsewhere)
    installed(tool)
    home: Path = request.getfixturevalue("deployed")
    environment = TOOLS_FOLDER / tool.environment
    words: list[str | Path] = [environment / "bin" / "python", "-c", block.text]
    if block.language == "js":  # an import looks beside the program, and above
        (home / "page.mjs").write_text(block.text)
        os.symlink(environment / "node_modules", home / "node_modules")
        words = ["node", "page.mjs"]
    done = subprocess.run(
        words, cwd=home, text=True, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\b32\b|'score': 0\.\d+", done.stdout), done.stdout
