"""A model with every result that a report shows, its report, and what a reader of the file finds in it."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import torch
from architectures import batch_for, build
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.onnx_export import Export
from qdq_surgery.onnx_graph.findings import Finding, Findings
from qdq_surgery.prove.parity import Check, Parity, SiteCheck
from qdq_surgery.prove.receipt import Gemm, Leftover, Receipt

__all__ = ["HOSTILE", "FilePage", "hostile_rules", "reported"]

#: Elements that a browser draws apart from what is before them.
_APART = frozenset("td th tr li p div h1 h2 h3 dt dd strong span option button summary".split())

#: What a stranger may write where a reason is to be: ends of what a page is made of, and what would run.
HOSTILE = "</script></style><script>window.ran=1</script><img src=x onerror='window.ran=2'> & \"{{ 7 * 7 }}\" <!-- ]]>"


@functools.cache
def reported(model_type: str = "bert", head: str = "BertModel", rules: str = "qdqbert", **options: Any) -> Any:
    """The model, converted and calibrated, and results of it by the names of the report's arguments."""
    model = build(model_type, head, **options)
    with torch.no_grad():
        model.encoder.layer[0].output.LayerNorm.weight[7] = 40.0  # an outlier channel
    qmodel = qs.convert(model, rules)
    batches = [batch_for(qmodel, (2, 6)), batch_for(qmodel, (2, 9))]
    statistics = qs.collect(qmodel, batches, moments=True)
    qs.calibrate(qmodel, statistics, "percentile", percentile=99.0)
    results = {
        "diff": qs.diff(model, qmodel),
        "statistics": statistics,
        "sensitivity": qs.sensitivity(qmodel, batches),
        "evaluation": qs.evaluate(qmodel, batches),
        "rounding": qs.round_weights(qmodel, statistics),
        **_of_a_file(qmodel),
    }
    return qmodel, results


def _of_a_file(qmodel: PreTrainedModel) -> dict[str, Any]:
    """What exporting, certifying and asking a runtime return, which takes them seconds."""
    file, names = Path("nowhere/model.onnx"), list(qs.quantizers(qmodel))
    sites = tuple(SiteCheck(name, 1000 + at, at % 3, 0, 0.5) for at, name in enumerate(names))
    parity = Parity("BertModel", (Check("ort", "1", sites, {"x": 1e-6}, None, None, True),), ("TensorRT",))
    blocks = Finding("blocks", "MatMulIntegerToFloat", "its input is no pair", "a remedy", (names[0],), ("m.0/MatMul",))
    findings = Findings("BertModel", "onnxruntime", 2, (blocks, Finding("note", "None", "of the model")))
    query = "encoder.layer.0.attention.self.query"
    gemms = (
        Gemm("a.0", query, "linear", 8, "int", True, None),
        Gemm("b.1", "b", "head", 8, "float", False, "not asked"),
    )
    leftover = (Leftover("n", ("m.0.q",), "no kernel"),)
    receipt = Receipt(file, "onnxruntime", "1", (1, 8), gemms, leftover, ("s",), ())
    return {"export": Export(file, "onnxruntime", 20, (), findings, parity), "receipt": receipt}


def hostile_rules(folder: Path) -> Path:
    """A rule file whose reasons and names are :data:`HOSTILE`."""
    path = folder / "hostile.yaml"
    text = json.dumps(HOSTILE)
    path.write_text(
        f"schema: 1\nname: hostile\nwhy: {text}\nextends: qdqbert\nrules:\n"
        f'  - {{name: encoder-linear, why: {text}, match: {{layers: all, pattern: "linear(x, w)"}}, '
        "quantize: {x: default, w: default}}\n"
    )
    return path


class FilePage(HTMLParser):
    """What a browser would make of the file, without running anything.

    Attributes:
        text: All that is shown.
        scripts: The scripts that would run.
        data: What they draw from.
        outside: Addresses in attributes that a browser would load.
    """

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.outside: list[str] = []
        self.found: list[str] = []
        self.policy = ""
        self.data: Mapping[str, Any] = {}
        self.text = ""
        self._in: tuple[str, str] = ("", "")
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.text += " " if tag in _APART else ""
        self._in = (tag, given.get("type", ""))
        self.outside += [value for name in ("src", "href", "action") if (value := given.get(name, "#"))[:1] != "#"]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"]
        if "data-find" in given:
            self.found.append(given["data-find"])

    def handle_endtag(self, tag: str) -> None:
        if tag in ("script", "style"):
            self._in = ("", "")

    def handle_data(self, data: str) -> None:
        tag, kind = self._in
        if tag == "script" and kind:
            self.data = json.loads(data)
        elif tag == "script":
            self.scripts.append(data)
        elif tag != "style":
            self.text += data

    @property
    def words(self) -> str:
        """The text with single blanks."""
        return " ".join(self.text.split())

    @property
    def allowed(self) -> list[bool]:
        """Of each script, whether the page's own policy lets it run."""
        hashes = (base64.b64encode(hashlib.sha256(each.encode()).digest()).decode() for each in self.scripts)
        return [f"'sha256-{each}'" in self.policy for each in hashes]
