"""Frozen models in files: a quarter of the size, the same outputs to the bit, and files of strangers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import BASE, batch_for, layers
from frozen_models import calibrated, frozen, outputs
from hearing import Heard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, BertForSequenceClassification, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.errors import ModelError
from qdq_surgery.freeze.frozen_state import NOTES, FrozenState, frozen_state
from qdq_surgery.integers import choice
from qdq_surgery.load_frozen import _state_in
from qdq_surgery.quantize.integer_embedding import IntegerEmbedding

WIDE = {"vocab_size": 1100, "num_hidden_layers": 1}
LINEAR = "encoder.layer.0.output.dense._weight_quantizer._integers"
TABLE = "embeddings.word_embeddings._weight_quantizer._integers"


def loaded(folder: Path, **options: Any) -> PreTrainedModel:
    """As the tiny models are: transformers takes another attention by itself."""
    model: PreTrainedModel = AutoModel.from_pretrained(folder, attn_implementation="eager", **options)
    return model


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    frozen("bert", "pytorch", **WIDE).save_pretrained(tmp_path / "frozen")
    return tmp_path / "frozen"


#: Their layers are BERT's, and their embeddings but for how positions are counted.
TWINS = ("roberta", "xlm-roberta", "camembert")


@pytest.mark.parametrize("model_type", [each for each in BASE if each not in TWINS])
def test_it_is_what_was_saved(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = model_type in ("albert", "modernbert")  # whose second layer is the first once more, or a local one
    model = frozen(model_type, "pytorch", vocab_size=1100, **layers(model_type, 2 if deep else 1))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr("qdq_surgery.load_frozen.assemble", None)  # it is not looked at again
    again = loaded(tmp_path)
    assert type(again).__name__ == type(model).__name__
    batch = batch_for(model, (2, 9))
    assert same(outputs(again, batch), outputs(model, batch))
    one, other = frozen_state(again), frozen_state(model)
    assert all(getattr(one, name) == getattr(other, name) for name in ("kept", "epilogues", "shared", "handovers"))
    assert type(again.get_input_embeddings()) is IntegerEmbedding
    assert qs.frozen_receipt(again, shape=(1, 4)).to_json() == qs.frozen_receipt(model, shape=(1, 4)).to_json()


def test_quantizers_that_are_left_are_saved_with_it(tmp_path: Path) -> None:
    model = frozen("bert", "qdqbert", num_hidden_layers=1)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    batch = batch_for(model, (2, 9))
    assert same(outputs(again, batch), outputs(model, batch))
    assert qs.quantizers(again).keys() == qs.quantizers(model).keys() != set()


def test_what_was_loaded_is_saved_again(folder: Path, tmp_path: Path) -> None:
    again = loaded(folder)
    again.save_pretrained(tmp_path / "again")  # before its weights were packed
    files = [load_file(each / "model.safetensors") for each in (folder, tmp_path / "again")]
    assert same(*files)
    configs = [json.loads((each / "config.json").read_text()) for each in (folder, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_file_holds_integers_and_no_float_weight(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    assert {state[LINEAR].dtype, state[TABLE].dtype} == {torch.int8}
    assert not [name for name in state if name.startswith("encoder") and name.endswith("dense.weight")]
    assert "embeddings.word_embeddings.weight" not in state


def test_weights_are_rounded_for_products_in_the_integers(tmp_path: Path) -> None:
    qmodel = calibrated("bert", "pytorch", **WIDE)
    qs.round_weights(qmodel, [batch_for(qmodel, (4, 12))])
    model = qs.freeze(qmodel)
    model.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "_rounding" in name]
    batch = batch_for(model, (2, 9))
    assert same(outputs(loaded(tmp_path), batch), outputs(model, batch))


def test_in_bfloat16(tmp_path: Path) -> None:
    model = qs.freeze(calibrated("bert", "pytorch", **WIDE).to(torch.bfloat16))
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.dtype == torch.bfloat16
    batch = batch_for(model, (2, 9))
    assert same(outputs(again, batch), outputs(model, batch))


def test_another_class_is_looked_at_anew(folder: Path, tmp_path: Path) -> None:
    eager = {"attn_implementation": "eager"}
    head = BertForSequenceClassification.from_pretrained(folder, **eager)
    batch = batch_for(head, (2, 9))
    base = loaded(folder)
    with torch.no_grad():
        assert torch.equal(head.bert(**batch).pooler_output, base(**batch).pooler_output)
    assert frozen_state(head).shared.keys() == {f"bert.{name}" for name in frozen_state(base).shared}
    head.save_pretrained(tmp_path / "head")
    assert same(
        outputs(BertForSequenceClassification.from_pretrained(tmp_path / "head", **eager), batch), outputs(head, batch)
    )


def test_the_first_thing_of_a_process(folder: Path) -> None:
    """transformers builds models without data, and whether the kernel runs here is seen on some."""
    choice._problem.cache_clear()
    loaded(folder)


def test_weights_are_packed_when_they_are_needed(folder: Path) -> None:
    model = loaded(folder)
    packed = model.get_submodule("encoder.layer.0.output.dense").product
    before = packed.integers()
    assert packed._packed is None
    outputs(model, batch_for(model, (2, 9)))
    assert packed._plain is None
    assert torch.equal(packed.integers(), before)


def test_a_machine_without_the_kernel_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdq_surgery.load_frozen.unsupported", lambda *_: "no kernel")
    with pytest.raises(ModelError, match="frozen BertModel does not run here: no kernel; load it on another device"):
        loaded(folder)
    monkeypatch.undo()
    with pytest.raises(ModelError, match="their results are float32 or bfloat16"):
        loaded(folder, dtype=torch.float16)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_devices_that_it_loads_on(device_map: Any, folder: Path) -> None:
    assert loaded(folder, device_map=device_map).device.type in choice.PRODUCTS


@pytest.mark.parametrize("device_map", ["meta", {"": "mps"}, {"embeddings": "cpu", "encoder": "xpu:1"}])
def test_devices_that_it_does_not_load_on(device_map: Any, folder: Path) -> None:
    with pytest.raises(
        ModelError, match=r"run on a CPU or an NVIDIA GPU, not on (meta|mps|xpu); load it on another devi"
    ):
        loaded(folder, device_map=device_map)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without an NVIDIA GPU")
@pytest.mark.parametrize("device_map", ["cuda", {"": 0}])
def test_a_gpu_that_is_not_there(device_map: Any, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"does not run here: torch .* multiplies no int8 matrices on this GPU"):
        loaded(folder, device_map=device_map)


def test_a_model_that_was_changed_by_hand_says_why_it_is_not_saved(tmp_path: Path) -> None:
    qmodel = calibrated("bert", "pytorch", **WIDE)
    qs.quantizers(qmodel)["encoder.layer.0.output.dense._input_quantizer"]._narrow_range = True
    model = qs.freeze(qmodel)
    with pytest.raises(ModelError, match=r"frozen BertModel cannot be saved: .* was changed by hand"):
        model.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def _state(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "model.safetensors"
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata()
        state = load_file(file)
        change(state)
        save_file(state, file, metadata)

    return apply


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def _moved(state: dict[str, Tensor]) -> None:
    state["encoder.layer.0.output.dense._input_quantizer._integers"] = state.pop(LINEAR)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_state(lambda state: state.pop(LINEAR)), "no integers of encoder.layer.0.output.dense._weight_quantizer"),
        (_state(lambda state: state.pop(TABLE)), "no integers of embeddings.word_embeddings._weight_quantizer"),
        (_state(lambda state: state.update({LINEAR: state[LINEAR].float()})), r"as F32 .* wanted int8 of \(32, 48\)"),
        (
            _state(lambda state: state.update({LINEAR: state[LINEAR][:-1]})),
            r"of the shape \(31, 48\), wanted int8 of \(32, 48\)",
        ),
        (_state(lambda state: state.update({LINEAR: state[LINEAR].T.contiguous()})), r"\(48, 32\)"),
        (_state(lambda state: state.update({TABLE: state[TABLE][:5]})), r"wanted int8 of \(1100, 32\)"),
        (_state(_moved), "no integers of|integers of .*, of which its config says nothing"),
        (_state(lambda state: state.pop(LINEAR.replace("_integers", "_amax"))), "has no range for 1 quantizers"),
        (_config(lambda config: config.pop("integers")), "is what a saved frozen model has"),
        (_config(lambda config: config.update(integers=[1])), "config.json is damaged: .*integers"),
        (
            _config(lambda config: config["integers"].update({"a.b_quantizer": None})),
            "a.b_quantizer', which is not in sites",
        ),
        (_config(lambda config: config["integers"].popitem()), "of which its config says nothing"),
        (
            _config(lambda config: config.update(disabled={"embeddings.word_embeddings._weight_quantizer": None})),
            "embeddings.word_embeddings._weight_quantizer is of integers, and the quantizer of its weight is none of 8",
        ),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"no file"), "cannot be read|damaged"),
    ],
)
def test_files_that_do_not_fit_are_refused(change: Callable[[Path], Any], message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(ModelError, match=message):
        loaded(folder)


NOTE = {"epilogues": [], "shared": {}, "handovers": []}
PARTS = ["encoder.layer.0", *(f"encoder.layer.0.{name}.dense" for name in ("intermediate", "output"))]
HANDED = [*PARTS, "encoder.layer.0.intermediate", "0", "encoder.layer.0.output", "0"]


def handed(*words: str, at: int) -> str:
    """Notes of one handover, with other words from this place on."""
    return json.dumps({**NOTE, "handovers": [[*HANDED[:at], *words, *HANDED[at + len(words) :]]]})


NOTES_THAT_DO_NOT_FIT = [
    "no json",
    json.dumps({**NOTE, "more": 1}),
    json.dumps({**NOTE, "epilogues": [["encoder.layer.0.output.dense", "embeddings.LayerNorm"]]}),
    json.dumps({**NOTE, "epilogues": [["pooler.dense", "encoder.layer.0.intermediate.intermediate_act_fn"]]}),
    json.dumps({**NOTE, "epilogues": [["a"]]}),
    json.dumps(
        {
            **NOTE,
            "epilogues": [["encoder.layer.0.intermediate.dense", "encoder.layer.0.intermediate.intermediate_act_fn"]]
            * 2,
        }
    ),
    json.dumps({**NOTE, "shared": {"": [["encoder.layer.0.output.dense"]]}}),
    json.dumps({**NOTE, "shared": {"encoder.layer": [["encoder.layer.0.output.dense"]]}}),
    json.dumps({**NOTE, "shared": {"encoder.layer.0": [["pooler.dense"]]}}),
    json.dumps({**NOTE, "shared": {"encoder.layer.0": []}}),
    json.dumps({name: each for name, each in NOTE.items() if name != "handovers"}),
    json.dumps({**NOTE, "handovers": [HANDED[:-1]]}),
    handed("encoder.layer", at=0),
    handed("encoder.layer.7", at=0),
    handed("encoder.layer.1", at=0),
    handed("encoder.layer.0.attention.self", at=1),
    handed("encoder.layer.0.intermediate.dense", at=2),
    handed("encoder.layer.0.attention.output.dense", at=2),  # reads as many as another gives
    handed("encoder.layer.1.output.dense", at=2),
    handed("encoder.layer.0.output", at=3),
    handed("encoder.layer.0.attention", at=5),
    handed("__import__('os')", at=4),
    json.dumps({**NOTE, "handovers": [HANDED] * 2}),
    # One that reads integers already would give some that nobody asked for.
    json.dumps({**NOTE, "shared": {PARTS[0]: [[PARTS[1]]]}, "handovers": [HANDED]}),
    json.dumps({**NOTE, "shared": {PARTS[0]: [[PARTS[2]]]}, "handovers": [HANDED]}),
]


@pytest.fixture(scope="module")
def unassembled(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    """A model with its integers, as it is when its notes are read."""
    folder = tmp_path_factory.mktemp("unassembled")
    frozen("bert", "pytorch", **WIDE).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qdq_surgery.load_frozen.assemble_as", lambda *_: None)
        return loaded(folder)


def read_notes(text: str, model: PreTrainedModel) -> FrozenState | None:
    found = _state_in({NOTES: text}, model, frozen_state(frozen("bert", "pytorch", **WIDE)).origin)
    return None if found is None else found[0]


@pytest.mark.parametrize("note", NOTES_THAT_DO_NOT_FIT)
def test_notes_that_do_not_fit_are_left_aside(note: str, unassembled: PreTrainedModel, heard: Heard) -> None:
    assert read_notes(note, unassembled) is None
    assert any("the model is looked at anew" in record.message for record in heard.records)


def test_notes_that_fit_are_taken(unassembled: PreTrainedModel, folder: Path) -> None:
    with safe_open(folder / "model.safetensors", framework="pt") as opened:
        note = opened.metadata()[NOTES]
    found, wanted = read_notes(note, unassembled), frozen_state(frozen("bert", "pytorch", **WIDE))
    assert found is not None
    assert (found.epilogues, found.shared, found.handovers) == (wanted.epilogues, wanted.shared, wanted.handovers)
    own = json.loads(handed(at=0))["handovers"]
    assert json.loads(note)["handovers"] == own  # what the notes above have something else in the place of


@pytest.mark.parametrize("note", [NOTES_THAT_DO_NOT_FIT[0], NOTES_THAT_DO_NOT_FIT[-1]])
def test_what_notes_do_not_say_is_found_again(note: str, folder: Path, heard: Heard) -> None:
    model = loaded(folder)
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(file), file, {**metadata, NOTES: note})
    again = loaded(folder)
    assert any("the model is looked at anew" in record.message for record in heard.records)
    assert frozen_state(again).epilogues == frozen_state(model).epilogues != ()
    assert frozen_state(again).handovers == frozen_state(model).handovers != ()
    batch = batch_for(model, (2, 9))
    assert same(outputs(again, batch), outputs(model, batch))


def test_a_frozen_config_is_not_for_float_models() -> None:
    with pytest.raises(ModelError, match=r"to freeze a model, call qdq_surgery.freeze"):
        type(frozen("bert", "pytorch", **WIDE).hf_quantizer.quantization_config)("pytorch")
