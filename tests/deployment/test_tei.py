"""A deployed folder for text-embeddings-inference: read here as its ONNX backend reads it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from architectures import BY_TYPE
from exported import exported

import qdq_surgery as qs
from qdq_surgery.deployment.folder import FILE
from qdq_surgery.deployment.tei import SERVED, check_served, write_served
from qdq_surgery.errors import OptionError
from qdq_surgery.targets.registry import TARGETS
from qdq_surgery.targets.session import Port

ONNXRUNTIME = TARGETS["onnxruntime"]

#: Texts of other lengths, as numbers of tokens.
TEXTS = ([5, 6, 7, 8, 9], [11, 12], [21])


def written(tmp_path: Path, model_type: str, head: str) -> Any:
    """The model whose folder is in ``tmp_path``."""
    qmodel, made = exported(model_type, head, "onnxruntime", rules="qdqbert", num_hidden_layers=1)
    (tmp_path / FILE.parent).mkdir()
    shutil.copy(made.path, tmp_path / FILE)
    check_served(ONNXRUNTIME, qmodel.config)
    write_served(tmp_path, ONNXRUNTIME)
    return qmodel


def served(folder: Path, output: str) -> tuple[Any, Any]:
    """What the server reads of a batch, and the mask that it pools with: numbers of 64 bits, padded on the right."""
    found = folder / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    session = onnxruntime.InferenceSession(found if found.exists() else folder / "onnx" / "model.onnx", options)
    width = max(map(len, TEXTS))
    ids = np.array([[*text, *[0] * (width - len(text))] for text in TEXTS], dtype=np.int64)
    mask = (ids != 0).astype(np.int64)
    given = {"input_ids": ids, "attention_mask": mask}
    asked_for = {"token_type_ids": np.zeros_like(ids), "position_ids": np.arange(width)[None].repeat(len(TEXTS), 0)}
    given |= {each.name: asked_for[each.name] for each in session.get_inputs() if each.name in asked_for}
    return session.run([output], given)[0], mask[:, :, None]


def test_it_pools_what_the_model_gives(tmp_path: Path) -> None:
    written(tmp_path, "bert", "BertModel")
    states, mask = served(tmp_path, "last_hidden_state")
    found = (states * mask).sum(1) / mask.sum(1)
    own = qs.load_onnx(tmp_path / FILE)
    for text, embedding in zip(TEXTS, found, strict=True):
        ids = torch.tensor([text])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        # Float sums in another order, with the padding.
        np.testing.assert_allclose(embedding, own(**batch).last_hidden_state.mean(1)[0].numpy(), rtol=0, atol=1e-5)
    assert (tmp_path / SERVED).read_bytes() == (tmp_path / FILE).read_bytes()


def test_it_reads_a_classifier_s_logits(tmp_path: Path) -> None:
    qmodel = written(tmp_path, "bert", "BertForSequenceClassification")
    logits, _ = served(tmp_path, "logits")
    assert logits.shape == (len(TEXTS), qmodel.config.num_labels)


@pytest.mark.parametrize(("target", "title"), [("openvino", "OpenVINO"), ("tensorrt", "TensorRT")])
def test_it_runs_onnx_runtime(target: str, title: str) -> None:
    with pytest.raises(OptionError, match=f"runs ONNX Runtime, and the file is for {title}; give --target onnxruntime"):
        check_served(TARGETS[target], BY_TYPE["bert"].config())


def test_it_wants_sizes_by_their_names() -> None:
    """A DistilBERT's config answers to them, and its file has others."""
    config = BY_TYPE["distilbert"].config()
    assert config.hidden_size == 32
    with pytest.raises(OptionError, match=r"wants hidden_size and num_hidden_layers in config.json, and a distilbert"):
        check_served(ONNXRUNTIME, config)


@pytest.mark.parametrize(
    ("inputs", "outputs", "found"),
    [
        ({"input_ids": 2}, {"logits": 2}, "the file differs in attention_mask; leave it out"),
        ({"input_ids": 2, "attention_mask": 2, "bbox": 3}, {"logits": 2}, "the file differs in bbox; leave it out"),
        ({"input_ids": 2, "attention_mask": 2}, {"logits": 3}, "the file gives logits with 3 axes; leave it out"),
        (
            {"input_ids": 2, "attention_mask": 2},
            {"start_logits": 2, "end_logits": 2},
            "the file gives start_logits with 2 axes, end_logits with 2 axes; leave it out",
        ),
    ],
)
def test_files_that_it_cannot_read(inputs: dict[str, int], outputs: dict[str, int], found: str, tmp_path: Path) -> None:
    def ports(sizes: dict[str, int]) -> list[Port]:
        return [Port(name, np.dtype("int64"), (None,) * axes) for name, axes in sizes.items()]

    class Session:
        def __init__(self, _: Path) -> None:
            self.inputs, self.outputs = ports(inputs), ports(outputs)

    session: Any = Session
    with pytest.raises(OptionError, match=found):
        write_served(tmp_path, replace(ONNXRUNTIME, session=session))
    assert not list(tmp_path.iterdir())
