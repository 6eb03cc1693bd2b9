"""Exported files called like the models they were made from: outputs, pipelines, and what is refused."""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import json
import pickle
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, batch_for, build, layers, tensors_of
from hearing import Heard
from tiny_checkpoint import tiny_tokenizer
from transformers import PreTrainedModel, pipeline
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import qdq_surgery as qs
from qdq_surgery.hf.config_facts import max_tokens
from qdq_surgery.hf.example_inputs import sample_inputs
from qdq_surgery.onnx_export import export_onnx
from qdq_surgery.serve.feed import _ZERO_TYPES
from qdq_surgery.serve.model import OnnxModel, load_onnx
from qdq_surgery.targets.registry import runtimes

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("openvino")

from exported import calibrated, exported, inputs_for  # noqa: E402

RUNTIMES = runtimes()

#: A runtime may round a tie the other way; the step of a quantizer that does moves an output by up to 0.0066.
STEP = 0.02

TEXTS = ["the cat sat on the mat", "a dog ran", "the bird sang to the dog on the mat"]


def assert_near(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Within a step but for a value or two, of which one in front was a tie that went the other way."""
    assert found.shape == wanted.shape
    difference = (found - wanted).abs()
    assert float(difference.max()) < 2 * STEP
    assert float((difference > STEP).float().mean()) < 0.01


class Files:
    """Quantized models and their files, made when they are first asked for; the tokenizer gives every input."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer(TEXTS, size=60)

    def get(self, head: str, **more: Any) -> tuple[PreTrainedModel, Path]:
        """The model and a file of it, which other tests use, too.

        Args:
            more: ``dynamic``, or options of the config.
        """
        qmodel, file = exported("bert", head, rules="qdqbert", num_hidden_layers=1, **more)
        return qmodel, file.path

    def batch(self, *texts: str) -> dict[str, torch.Tensor]:
        return dict(self.tokenizer(list(texts or TEXTS), padding=True, return_tensors="pt"))


@pytest.fixture(scope="module")
def files() -> Files:
    return Files()


@pytest.fixture(scope="module")
def spans(files: Files) -> Path:
    return files.get("BertForQuestionAnswering")[1]


def load(path: Path, runtime: str = "onnxruntime", **more: Any) -> OnnxModel:
    """The file in float32 wherever it is not INT8, so that it can be compared."""
    if runtime == "openvino":
        more.setdefault("precision", "f32")
    return load_onnx(path, runtime, **more)


@functools.cache
def opened(path: Path, runtime: str) -> OnnxModel:
    """One for all tests that only call it."""
    return load(path, runtime)


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(qs.ModelError) as caught:
        call()
    return str(caught.value)


#: What a runtime gives does not depend on what the head is for: each head on one of them.
HEADS = dict(
    zip(
        [
            "BertModel",
            "BertForQuestionAnswering",
            "BertForSequenceClassification",
            "BertForTokenClassification",
            "BertForMaskedLM",
            "BertForPreTraining",
            "BertForMultipleChoice",
        ],
        itertools.cycle(RUNTIMES),
    )
)


@pytest.mark.slow
@pytest.mark.parametrize(("head", "runtime"), HEADS.items())
def test_it_returns_what_the_model_returns(head: str, runtime: str, files: Files) -> None:
    qmodel, path = files.get(head)
    model = opened(path, runtime)
    batch = files.batch(*TEXTS[::-1], "the mat")  # another batch size and length than the file was made with
    if head == "BertForMultipleChoice":
        batch = {name: value.unflatten(0, (2, 2)) for name, value in batch.items()}
    with torch.no_grad():
        wanted = qmodel(**batch)
    found = model(**batch)
    assert type(found) is type(wanted)
    assert list(found) == list(wanted)
    for name, value in tensors_of(wanted).items():
        assert_near(tensors_of(found)[name], value)
    as_tuple = model(**batch, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert all(torch.equal(one, other) for one, other in zip(as_tuple, found.to_tuple(), strict=True))


@pytest.mark.slow
def test_tuples_are_put_together(tmp_path: Path, files: Files) -> None:
    """Of the file that tests/test_onnx_export.py looks at, too."""
    qmodel, batch = calibrated(num_hidden_layers=1, output_hidden_states=True), files.batch()
    export_onnx(qmodel, tmp_path / "model.onnx", {**inputs_for(qmodel, (2, 9)), "output_attentions": True})
    with torch.no_grad():
        wanted = qmodel(**batch, output_attentions=True)
    wanted = {name: value for name, value in wanted.items() if len(value)}  # of no cross attention it has none
    for runtime in RUNTIMES:
        model = load(tmp_path / "model.onnx", runtime)
        found = model(**batch)
        assert list(found) == list(wanted)
        for name in ("hidden_states", "attentions"):
            assert isinstance(found[name], tuple)
            for one, other in zip(found[name], wanted[name], strict=True):
                assert_near(one, other)
        assert list(model(**batch, output_hidden_states=True)) == list(wanted)
        without = model(**batch, output_hidden_states=False, output_attentions=False)
        assert list(without) == ["last_hidden_state", "pooler_output"]


def test_it_has_what_code_for_models_asks_for(spans: Path, files: Files) -> None:
    qmodel, model = files.get("BertForQuestionAnswering")[0], load_onnx(str(spans))
    assert isinstance(model, OnnxModel)
    assert type(model).__name__ == type(qmodel).__name__
    assert type(model.config) is type(qmodel.config)
    assert model.config.to_dict() == qmodel.config.to_dict()
    assert (model.device, model.dtype, model.training) == (torch.device("cpu"), torch.float32, False)
    assert model.main_input_name == "input_ids"
    assert model.base_model_prefix == "bert"
    assert not model.can_generate()
    assert model.eval() is model.train(False) is model.to("cpu") is model.to(device=model.device) is model
    assert model.to(torch.float32) is model
    assert model.target == "onnxruntime"
    assert model.session is not None
    assert model.compiled is None
    assert repr(model).startswith(f"BertForQuestionAnswering('{spans}' on onnxruntime ")
    assert repr(model).endswith("input_ids, attention_mask, token_type_ids -> start_logits, end_logits)")


def test_copies_open_the_file_again(spans: Path, files: Files) -> None:
    model = load_onnx(spans, threads=1)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.threads == 1
        assert torch.equal(other(**files.batch()).start_logits, model(**files.batch()).start_logits)


@pytest.mark.slow
def test_a_pickle_is_loaded_wherever_the_file_is(
    spans: Path, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opened by a path from the working directory, and loaded in a process that has another one."""
    monkeypatch.chdir(spans.parent)
    models = [load(Path(spans.name), runtime, threads=1) for runtime in RUNTIMES]
    pickled = tmp_path / "models.pickle"
    pickled.write_bytes(pickle.dumps((files.batch(), [(model, model(**files.batch())) for model in models])))
    code = (
        "import os, pickle, sys, torch\n"
        "os.chdir(os.sep)\n"
        "batch, pairs = pickle.load(open(sys.argv[1], 'rb'))\n"
        "for again, wanted in pairs:\n"
        "    found = again(**batch)\n"
        "    assert type(found) is type(wanted)\n"
        "    assert all(torch.equal(found[name], wanted[name]) for name in wanted)\n"
        "    print(again.path, again.runtime, again.threads, again.precision)"
    )
    printed = forked.run(code, pickled, folder=tmp_path / "printed")
    assert printed.splitlines() == [f"{spans} {model.runtime} 1 {model.precision}" for model in models]


def test_a_pickle_without_its_file_names_it(spans: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(spans, tmp_path / "model.onnx"))
    pickled = pickle.dumps(load_onnx(path))
    assert len(pickled) < 1000 < path.stat().st_size
    path.unlink()
    with pytest.raises(qs.ModelError, match=rf"the pickled model is the file {path}, which is not there .* on each"):
        pickle.loads(pickled)


def test_an_evaluation_loop(files: Files) -> None:
    qmodel, path = files.get("BertForSequenceClassification")
    found = []
    for model in (qmodel, load_onnx(path)):
        model.eval()
        with torch.inference_mode():
            batch = {name: value.to(model.device) for name, value in files.batch().items()}
            found.append([output.argmax(-1) for output in (model(**batch).logits, model(**batch)[0])])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


# Pipelines


def close(found: Any, wanted: Any) -> None:
    """The same structure with the same words, and scores within STEP."""
    assert type(found) is type(wanted)
    if isinstance(wanted, Mapping):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            close(found[name], value)
    elif isinstance(wanted, (list, tuple)):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            close(one, other)
    elif isinstance(wanted, (float, np.floating)):
        assert found == pytest.approx(wanted, abs=2 * STEP, rel=0)
    else:
        assert found == wanted


@pytest.mark.parametrize(
    ("task", "head", "options"),
    [
        ("text-classification", "BertForSequenceClassification", {"top_k": None}),
        ("sentiment-analysis", "BertForSequenceClassification", {"batch_size": 2}),
        ("token-classification", "BertForTokenClassification", {}),
        ("feature-extraction", "BertModel", {}),
        ("fill-mask", "BertForMaskedLM", {"targets": ["cat", "dog"], "top_k": 2}),
        ("zero-shot-classification", "BertForSequenceClassification", {"candidate_labels": ["cat", "dog"]}),
    ],
)
def test_pipelines(task: Any, head: str, options: dict[str, Any], files: Files, heard: Heard) -> None:
    qmodel, path = files.get(head)
    texts = [text.replace("mat", "[MASK]") for text in TEXTS[::2]] if task == "fill-mask" else TEXTS
    found = [
        pipeline(task, model=model, tokenizer=files.tokenizer, device="cpu")(texts, **options)
        for model in (opened(path, HEADS[head]), qmodel)
    ]
    close(*found)
    assert "not supported" not in heard.text


def test_a_pipeline_of_its_own_for_spans_as_transformers_had_it(spans: Path, files: Files) -> None:
    """The task 'question-answering' is gone from transformers 5; what it did needs the two logits only."""
    qmodel = files.get("BertForQuestionAnswering")[0]
    batch = dict(files.tokenizer("a dog", "the cat sat on the mat", return_tensors="pt"))
    with torch.no_grad():
        wanted = qmodel(**batch)
    found = load_onnx(spans)(**batch)
    assert found.start_logits.argmax() == wanted.start_logits.argmax()
    assert found.end_logits.argmax() == wanted.end_logits.argmax()


# What is left out, and what is too much


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_what_is_left_out_is_what_the_model_takes(runtime: str, spans: Path, files: Files) -> None:
    model, ids = opened(spans, runtime), files.batch("the cat sat")["input_ids"]
    wanted = model(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=torch.zeros_like(ids))
    for found in (
        model(input_ids=ids),
        model(ids),
        model(ids, None, token_type_ids=None, labels=None, use_cache=False),
        model(input_ids=ids.numpy(), attention_mask=np.ones(ids.shape, dtype=np.int32)),
        model(input_ids=ids.int(), attention_mask=torch.ones_like(ids).bool()),
        model(input_ids=ids.T.contiguous().T),
    ):
        assert torch.equal(found.start_logits, wanted.start_logits)
    other = model(input_ids=ids, token_type_ids=torch.ones_like(ids))
    assert not torch.equal(other.start_logits, wanted.start_logits)


@pytest.mark.slow
def test_what_changes_nothing_may_be_given(tmp_path: Path, files: Files) -> None:
    qmodel, batch = files.get("BertForSequenceClassification")[0], files.batch("the cat sat")
    ids = batch["input_ids"]
    export_onnx(qmodel, tmp_path / "ids.onnx", {"input_ids": ids}, dynamic=False)
    model = load_onnx(tmp_path / "ids.onnx")
    assert model.inputs == ("input_ids",)
    assert torch.equal(model(**batch).logits, model(ids).logits)
    batch["token_type_ids"][0, -2:] = 1
    assert "has no input 'token_type_ids'; it takes input_ids. Leave it out, or export" in refusal(
        lambda: model(**batch)
    )
    assert "has no input 'attention_mask'" in refusal(lambda: model(ids, torch.zeros_like(ids)))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda architecture: architecture.model_type)
def test_what_the_models_take_for_what_is_left_out(architecture: Any) -> None:
    """The runner's defaults are the models' own, and its longest text is the longest that they take."""
    head = next(name for name in architecture.heads() if name.endswith("ForSequenceClassification"))
    model = build(architecture.model_type, head, **layers(architecture.model_type, 1))
    ids = batch_for(model, (2, 7))["input_ids"]
    has_types = "token_type_ids" in inspect.signature(model.forward).parameters
    assert has_types == (architecture.model_type in _ZERO_TYPES)
    with torch.no_grad():
        plain = model(ids).logits
        assert torch.equal(model(ids, attention_mask=torch.ones_like(ids)).logits, plain)
        if has_types:
            assert torch.equal(model(ids, token_type_ids=torch.zeros_like(ids)).logits, plain)
        longest = max_tokens(model.config)
        assert (longest is None) == (architecture.model_type == "modernbert")
        model(torch.full((1, longest or 50), 5))
        if longest is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(torch.full((1, longest + 1), 5))


IDS = torch.full((2, 6), 5)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, r"needs 'input_ids', which is not given"),
        ({"input_ids": IDS, "labels": IDS}, r"computes no loss: leave 'labels' out"),
        ({"input_ids": IDS, "start_positions": IDS[:, 0]}, r"computes no loss: leave 'start_positions' out"),
        (
            {"input_ids": IDS, "inputs_embeds": IDS},
            r"no input 'inputs_embeds'; it takes input_ids, attention_mask, token_type_ids",
        ),
        ({"input_ids": IDS, "use_cache": True}, r"keeps no cache; leave 'use_cache' out"),
        (
            {"input_ids": IDS, "output_attentions": True},
            r"does not return attentions; .*output_attentions=True among the example_inputs",
        ),
        ({"input_ids": IDS, "output_hidden_states": True}, r"does not return hidden_states; .* export the model again"),
        ({"input_ids": IDS.float()}, r"'input_ids' is of float32, and .*\.onnx takes int64; convert it"),
        ({"input_ids": IDS.tolist()}, r"'input_ids' is a list; give a torch.Tensor or a numpy.ndarray"),
        ({"input_ids": IDS.to("meta")}, r"'input_ids' is on meta and .* runs on the CPU; move it with .to\('cpu'\)"),
        ({"input_ids": IDS[0]}, r"'input_ids' has shape \(6,\), and .* takes \(any, any\)"),
        ({"input_ids": IDS, "attention_mask": IDS[:, :5]}, r"'attention_mask' has shape \(2, 5\), and the tokens are"),
        ({"input_ids": IDS, "token_type_ids": IDS[:1]}, r"'token_type_ids' has shape \(1, 6\), and the tokens are"),
        ({"input_ids": IDS.repeat(1, 7)}, r"42 tokens are given, and .* knows 40 positions; truncate the texts"),
        ({"input_ids": IDS * 12}, r"'input_ids' holds 60, and .* knows 0 to 59 \(vocab_size of its config\)"),
        ({"input_ids": -IDS}, r"'input_ids' holds -5, and"),
        ({"input_ids": IDS, "token_type_ids": IDS}, r"'token_type_ids' holds 5, and .* knows 0 to 1 \(type_vocab_size"),
    ],
)
def test_refused_calls(given: dict[str, Any], found: str, spans: Path) -> None:
    for runtime in RUNTIMES:
        assert re.search(found, refusal(lambda runtime=runtime: opened(spans, runtime)(**given)))


def test_refused_places(spans: Path) -> None:
    model = opened(spans, "onnxruntime")
    assert "is given 30 arguments without a name" in refusal(lambda: model(*[None] * 30))
    assert "'input_ids' is given twice" in refusal(lambda: model(IDS, input_ids=IDS))
    assert "runs on the CPU and cannot move to cuda:0; give device='cpu' to a pipeline" in refusal(
        lambda: model.to("cuda:0")
    )
    assert "cannot be converted to torch.float16" in refusal(lambda: model.to(torch.float16))
    assert "cannot be trained; train the PyTorch model" in refusal(model.train)


def test_a_file_of_one_shape_takes_no_other() -> None:
    """One of those that tests/test_onnx_export.py looks at."""
    qmodel, file = exported("bert", "BertForNextSentencePrediction", num_hidden_layers=1, dynamic=False)
    inputs = sample_inputs(qmodel, None, False)
    model, (batch, tokens) = load_onnx(file.path), inputs["input_ids"].shape
    assert model(**inputs).logits.shape == (batch, 2)
    assert f"takes ({batch}, {tokens}); export with dynamic=True" in refusal(lambda: model(input_ids=IDS))


# Threads


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_calls_from_several_threads(runtime: str, spans: Path, files: Files) -> None:
    model = opened(spans, runtime)
    batches = [files.batch(text) for text in TEXTS] * 8
    alone = [model(**batch).start_logits for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda batch: model(**batch).start_logits, batches))
    assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_outputs_outlive_the_next_call(runtime: str, spans: Path, files: Files) -> None:
    model = opened(spans, runtime)
    first = model(**files.batch(TEXTS[0])).start_logits
    kept = first.clone()
    model(**files.batch(TEXTS[0].replace("cat", "dog")))
    assert torch.equal(first, kept)


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_call_that_fails_in_the_runtime_spoils_no_other(
    runtime: str, threads: int, spans: Path, files: Files
) -> None:
    """OpenVINO with one thread gave the outputs of the call before, and failed ever after."""
    model = load(spans, runtime, threads=threads)
    before = model(**files.batch()).start_logits
    long = np.full((1, 41), 5)
    feed = {"input_ids": long, "attention_mask": np.ones_like(long), "token_type_ids": np.zeros_like(long)}
    assert f"{spans} failed on {runtime} " in refusal(lambda: model._session.run(feed))
    assert torch.equal(model(**files.batch()).start_logits, before)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_number_of_threads(runtime: str, spans: Path) -> None:
    assert load_onnx(spans, runtime).threads == torch.get_num_threads()
    assert load_onnx(spans, runtime, threads=1).threads == 1


# Opening


def test_openvino_and_its_precision(spans: Path, files: Files) -> None:
    from openvino import Core

    model = load_onnx(spans, "openvino", precision="float32")
    assert (model.precision, model.session) == ("float32", None)
    assert load_onnx(spans, "openvino", precision="f32").precision == "float32"
    assert model.compiled is not None
    assert load_onnx(spans, "openvino").precision in ("float32", "bfloat16")
    if "BF16" in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        half = load_onnx(spans, "openvino", precision="bf16")
        assert half.precision == "bfloat16"
        assert half.dtype is torch.float32
        assert not torch.equal(half(**files.batch()).start_logits, model(**files.batch()).start_logits)
    else:
        assert "needs a CPU with bfloat16" in refusal(lambda: load_onnx(spans, "openvino", precision="bf16"))


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"runtime": "tensorrt"}, "there is no runtime 'tensorrt'; use 'onnxruntime' or 'openvino'"),
        ({"precision": "f32"}, "precision is for openvino; onnxruntime computes in what the file says"),
        ({"runtime": "openvino", "precision": "f16"}, "there is no precision 'f16'; use 'float32' or 'bfloat16'"),
        (
            {"runtime": "openvino", "precision": "float16"},
            "precision 'float16' is not supported for openvino; use 'float32' or 'bfloat16'",
        ),
        ({"threads": 0}, "threads is 0; give 1 or more"),
    ],
)
def test_refused_options(options: dict[str, Any], found: str, spans: Path) -> None:
    assert found in refusal(lambda: load_onnx(spans, **options))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_runtime_that_is_not_installed(runtime: str, spans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, runtime, None)
    message = refusal(lambda: load_onnx(spans, runtime))
    assert f"needs {runtime}, which is not installed; pip install 'qdq-surgery[" in message


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_files_that_are_none(runtime: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert "nowhere.onnx is no file; give one that" in refusal(lambda: load_onnx(tmp_path / "nowhere.onnx", runtime))
    assert "is no file" in refusal(lambda: load_onnx(tmp_path, runtime))
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"no model" * 20)
    assert f"{broken} cannot be opened by {runtime} " in refusal(lambda: load_onnx(broken, runtime))
    capfd.readouterr()  # OpenVINO tries TensorFlow's formats, too, aloud


def graph(path: Path, *nodes: Any) -> Path:
    """A file with ``input_ids`` made float as ``x``, and ``nodes`` that make ``logits`` of it."""
    make = onnx.helper
    begin = make.make_node("Cast", ["input_ids"], ["x"], to=onnx.TensorProto.FLOAT)
    inputs = [make.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, ["batch", "sequence"])]
    outputs = [make.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)]
    made = make.make_graph([begin, *nodes], "graph", inputs, outputs)
    opsets = [make.make_opsetid("", 19), make.make_opsetid("com.acme", 1)]
    onnx.save(make.make_model(made, opset_imports=opsets, ir_version=9), path)
    return path


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_of_someone_else(runtime: str, tmp_path: Path) -> None:
    path = graph(tmp_path / "other.onnx", onnx.helper.make_node("Erf", ["x"], ["logits"]))
    message = refusal(lambda: load_onnx(path, runtime))
    assert "does not say what model it is ('qdq_surgery.class' is not in its metadata); give a file that" in message


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("domain", ["", "com.acme"])
def test_an_operator_that_the_runtime_lacks(runtime: str, domain: str, tmp_path: Path) -> None:
    node = onnx.helper.make_node("Frobnicate", ["x"], ["logits"], name="encoder/Frobnicate", domain=domain)
    message = refusal(lambda: load_onnx(graph(tmp_path / "custom.onnx", node), runtime))
    operator = f"{domain}:Frobnicate" if domain else "Frobnicate"
    assert f", which lacks the operator {operator} of node 'encoder/Frobnicate'; use a newer version" in message


def test_an_operator_that_the_runtime_lacks_for_a_type(tmp_path: Path) -> None:
    make, half = onnx.helper.make_node, onnx.TensorProto.BFLOAT16
    nodes = [
        make("Cast", ["x"], ["y"], to=half),
        make("Erf", ["y"], ["z"], name="encoder/Erf"),
        make("Cast", ["z"], ["logits"], to=onnx.TensorProto.FLOAT),
    ]
    message = refusal(lambda: load_onnx(graph(tmp_path / "half.onnx", *nodes)))
    assert "which lacks the operator Erf of node 'encoder/Erf'" in message


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_file_without_its_weights(runtime: str, spans: Path, tmp_path: Path) -> None:
    model, path = onnx.load(spans), tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    assert torch.isfinite(load_onnx(path, runtime)(input_ids=IDS).start_logits).all()
    (tmp_path / "model.onnx.data").unlink()
    assert "; a file of weights beside it is missing or damaged" in refusal(lambda: load_onnx(path, runtime))


def config(**changes: Any) -> Callable[[str], str]:
    return lambda text: json.dumps({**json.loads(text), **changes})


@pytest.mark.parametrize(
    ("key", "change", "found"),
    [
        ("config", lambda _: "{", "holds no config that can be read"),
        ("config", lambda _: "[]", "holds no config that can be read"),
        ("config", config(model_type="frobert"), "holds a model of type 'frobert', which transformers "),
        (
            "outputs",
            lambda _: "antigravity.ModelOutput",
            "returns a antigravity.ModelOutput; import antigravity before",
        ),
        ("outputs", lambda _: "subprocess.Popen", "returns a subprocess.Popen, which is no output class"),
        ("outputs", lambda _: "transformers.modeling_outputs.Gone", "Gone, which is not found in transformers"),
        (
            "outputs",
            lambda _: "transformers.modeling_outputs.MaskedLMOutput",
            "has an output 'start_logits', which the",
        ),
    ],
)
def test_metadata_that_cannot_be_used(
    key: str, change: Callable[[str], str], found: str, spans: Path, tmp_path: Path
) -> None:
    model = onnx.load(spans)
    entry = next(entry for entry in model.metadata_props if entry.key == f"qdq_surgery.{key}")
    entry.value = change(entry.value)
    onnx.save(model, tmp_path / "changed.onnx")
    assert found in refusal(
        lambda: load_onnx(tmp_path / "changed.onnx", "openvino" if key == "outputs" else "onnxruntime")
    )
    assert "antigravity" not in sys.modules


def test_a_class_of_the_users_own(spans: Path, tmp_path: Path) -> None:
    model = onnx.load(spans)
    next(entry for entry in model.metadata_props if entry.key == "qdq_surgery.class").value = "MySpans"
    onnx.save(model, tmp_path / "own.onnx")
    loaded = load_onnx(tmp_path / "own.onnx")
    assert type(loaded).__name__ == "MySpans"
    assert loaded.main_input_name == "input_ids"
    assert loaded(input_ids=IDS).start_logits.shape == IDS.shape
    assert type(loaded.config) is CONFIG_MAPPING["bert"]
