"""Texts on a local Ray cluster of two actors: the lines of one process, in the same order."""

from __future__ import annotations

import importlib.util
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import forked
import pytest
from pages import furnish
from repository import ROOT
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import qdq_surgery as qs

for needed in ("ray", "onnx", "onnxruntime"):
    if importlib.util.find_spec(needed) is None:
        pytest.skip(f"{needed} is not installed", allow_module_level=True)

#: Many batches for two actors, the last one not full.
BATCH = 16
COUNT = 50 * BATCH + 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model of the pages, as a file, its tokenizer, and texts; one of them is empty."""
    folder = tmp_path_factory.mktemp("ray")
    furnish(folder)
    words = (folder / "texts.txt").read_text(encoding="utf-8").split()
    drawn = random.Random(0)
    texts = [" ".join(drawn.choices(words, k=drawn.randint(1, 40))) for _ in range(COUNT)]
    texts[7] = ""
    (folder / "texts.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    qmodel = qs.convert(AutoModelForSequenceClassification.from_pretrained(folder / "my-bert"), "onnxruntime")
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-bert")
    qs.calibrate(qmodel, [dict(tokenizer(texts[:8], padding=True, return_tensors="pt"))])
    qs.export_onnx(qmodel, folder / "model.onnx")
    return folder


def one_process(folder: Path) -> list[dict[str, Any]]:
    """The same, without Ray: batches that are sorted alike are equal to the bit."""
    model = qs.load_onnx(folder / "model.onnx", threads=1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "my-bert")
    texts = (folder / "texts.txt").read_text(encoding="utf-8").splitlines()
    found = []
    for start in range(0, len(texts), BATCH):
        some = texts[start : start + BATCH]
        for text, outputs in zip(some, qs.run_rows(model, some, tokenizer), strict=True):
            scores = outputs["logits"].softmax(-1)
            label = model.config.id2label[int(scores.argmax())]
            found.append({"text": text, "label": label, "score": float(scores.max())})
    return found


#: No worker is started before one is needed: it would import as much as an actor, for nothing. And none stands back
#: behind what else runs here, or the test takes as long as that does.
ONLY_WHAT_RUNS = {
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_worker_niceness": "0",
}


#: The script's process has imported what it needs; the actors' import it, as on any machine.
AS_SCRIPT = """
import json, os, runpy, sys, warnings
warnings.simplefilter("ignore")  # Ray warns of itself
os.environ.update(json.loads(sys.argv[1]))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.slow
def test_two_actors_give_what_one_process_gives(folder: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="ray-") as scratch:  # short: the names of its sockets may not be long
        command = "{1}/scripts/ray_texts.py {0}/model.onnx {0}/texts.txt {0}/found.jsonl --tokenizer {0}/my-bert"
        given = f"{command.format(folder, ROOT)} --keep label --actors 2 --threads 1 --batch {BATCH}".split()
        environment = {**ONLY_WHAT_RUNS, "RAY_TMPDIR": scratch, "PYTHONPATH": str(ROOT)}
        forked.run(AS_SCRIPT, json.dumps(environment), *given, folder=folder / "printed")
    found = [json.loads(line) for line in (folder / "found.jsonl").read_text(encoding="utf-8").splitlines()]
    assert found == one_process(folder)
    assert len({each["label"] for each in found}) == 2 or len({each["score"] for each in found}) > BATCH
