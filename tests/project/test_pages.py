"""The code of every page runs, block after block, on a tiny model; and of some pages, what it made is what they say."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import PAGES, SENTENCES, Reader, blocks, furnish

import qdq_surgery as qs
from qdq_surgery.cli.demo import command, files

#: What a page needs beside the package itself.
OPTIONAL = "onnx bokeh openvino accelerate peft sentence_transformers".split()
LANGUAGES = {"python", "yaml", "bash", "text", "mermaid", "js"}


#: Encoder layers of a page's model: tracing takes seconds for each.
LAYERS = {"docs/rules.md": 2}


def needs(page: str) -> list[str]:
    code = "\n".join(block.text for block in blocks(page) if block.elsewhere is None)
    words = {
        "onnx": "export_onnx|qdq-surgery (export|quantize)",
        "bokeh": r"qs\.report|qdq-surgery report",
        "openvino": 'runtime="openvino"',
        "accelerate": "QATTrainer",
    }
    return [name for name in OPTIONAL if re.search(words.get(name, name), code)]


def the_guide_is_right(scope: dict[str, Any]) -> None:
    """What was saved is the calibrated, trained model, and it comes back whole."""
    trained, again, batch = scope["qmodel"], scope["again"], scope["held_out"][0]
    ranges = {name: quantizer.amax for name, quantizer in qs.quantizers(again).items()}
    assert all(torch.equal(quantizer.amax, ranges[name]) for name, quantizer in qs.quantizers(trained).items())
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, trained(**batch).logits)
        assert not torch.equal(qs.convert(scope["model"])(**batch).logits, trained(**batch).logits)
    assert Path("model.onnx").stat().st_size > 0


def the_rules_are_right(scope: dict[str, Any]) -> None:
    bits = {name: q.num_bits for name, q in qs.quantizers(scope["qmodel"]).items()}
    assert bits["bert.encoder.layer.1.output.dense._input_quantizer"] == 16
    assert not any(".layer.0." in name and ".add_" in name for name in bits)


def the_classes_are_right(scope: dict[str, Any]) -> None:
    assert type(scope["bert"]) is qs.QDQBertForSequenceClassification
    assert len(scope["outputs"].attentions) == scope["bert"].config.num_hidden_layers


CHECKS: dict[str, Callable[[dict[str, Any]], None]] = {
    "docs/guide.md": the_guide_is_right,
    "docs/rules.md": the_rules_are_right,
    "docs/qdqbert.md": the_classes_are_right,
}


def a_tiny_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `demo` finds is what the page's reader has; with the real model, test_journey.py runs its command."""
    texts = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
    monkeypatch.setattr(files, "checkpoint", lambda: folder / SENTENCES)
    monkeypatch.setattr(command, "DEMO_TEXTS", 24)
    monkeypatch.setattr(files, "standard_library_texts", lambda count: texts[:count])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.usefixtures("default_descriptors")
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_the_code_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = [name for name in needs(page) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{page} needs {', '.join(missing)}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    furnish(tmp_path, LAYERS.get(page, 1))
    a_tiny_demo(tmp_path, monkeypatch)
    reader = Reader(page)
    reader.read()
    if page in CHECKS:
        CHECKS[page](reader.scope)


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_of_a_language_that_is_run(page: str) -> None:
    """An odd number of fences, or one that is indented, would hide code from the reader of the pages."""
    assert {block.language for block in blocks(page)} <= LANGUAGES
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    assert text.count("```") == 2 * len(blocks(page))


@pytest.mark.parametrize(
    ("language", "text", "error"),
    [
        ("python", "1 / 0\n", ZeroDivisionError),
        ("yaml", "schema: 1\nname: nameless\n", AssertionError),
        ("yaml", "# bad.yaml\nschema: 1\nname: bad\nrules: 3\n", qs.RuleFileError),
        ("text", "what nobody printed\n", AssertionError),
        ("python", "# In an environment with fastembed:\nfrom fastembed import (\n", SyntaxError),
        pytest.param(
            *("js", "const a = (;\n", AssertionError),
            marks=pytest.mark.skipif(shutil.which("node") is None, reason="there is no node"),
        ),
        ("bash", "pip install nothing-of-the-kind\n", AssertionError),
        ("bash", "python scripts/benchmark_load.py --no-such-option 3\n", AssertionError),
        ("bash", "qdq-surgery plan no-such-folder\n", AssertionError),
        ("bash", "make everything\n", AssertionError),
    ],
)
def test_what_is_wrong_in_a_page_is_seen(
    language: str, text: str, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    page = tmp_path / "page.md"
    page.write_text(f"# A page\n\n```{language}\n{text}```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=f"{re.escape(str(page))}:4: ") as caught:
        Reader(str(page)).read()
    assert type(caught.value.__cause__) is error
