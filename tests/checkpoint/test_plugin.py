"""Loading and saving by transformers' own ways: what comes back, and what is refused."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forked
import pytest
import torch
from architectures import batch_for, build
from ecosystem import CLASSIFIER, assert_equal, calibrated, ranges, state
from fresh_import import fresh_import
from peft import LoraConfig
from pytorch_quantization import nn as quant_nn
from pytorch_quantization.nn.modules.clip import Clip
from pytorch_quantization.tensor_quant import QuantDescriptor
from safetensors.torch import load_file
from saved import (
    WEIGHTS,
    assert_reloaded,
    change_config,
    change_lock,
    config_of,
    count_matches,
    logits,
    metadata_of,
)
from torch import nn
from torch.overrides import TorchFunctionMode
from training_task import Texts, arguments
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    Trainer,
)

import qdq_surgery as qs
from qdq_surgery.checkpoint import plugin
from qdq_surgery.checkpoint.plugin import QDQQuantizer
from qdq_surgery.surgery.apply import prepare
from qdq_surgery.surgery.model_state import plan_of
from qdq_surgery.trainer import QATTrainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning"),
]

QUERY = "bert.encoder.layer.0.attention.self.query._input_quantizer"


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = BertForSequenceClassification.from_pretrained(folder, **options)
    return model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    calibrated().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# Forms of checkpoints ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["int8", "a-b"])
def test_a_variant(variant: str, tmp_path: Path) -> None:
    calibrated().save_pretrained(tmp_path, variant=variant)
    assert not (tmp_path / WEIGHTS).exists()
    assert_reloaded(load(tmp_path, variant=variant), calibrated())


PLACES = {
    "bert.embeddings": "cpu",
    "bert.encoder.layer.0": "disk",
    "bert.encoder.layer.1": "cpu",
    "bert.pooler": "cpu",
    "dropout": "cpu",
    "classifier": "cpu",
}


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto", "cpu"], ids=str)
def test_a_device_map(device_map: Any, folder: Path) -> None:
    assert_reloaded(load(folder, device_map=device_map), calibrated())


@pytest.mark.parametrize(("device_map", "locked"), [(PLACES, False), ({"": "disk"}, True)], ids=["one layer", "all"])
def test_on_a_disk(device_map: Any, locked: bool, folder: Path, tmp_path: Path) -> None:
    if not locked:
        change_lock(folder, lambda _: None)
    found = load(folder, device_map=device_map, offload_folder=str(tmp_path / "offloaded"))
    assert found.bert.encoder.layer[0].output.dense.weight.is_meta
    assert_equal(ranges(found), ranges(calibrated()))
    assert torch.equal(logits(found), logits(calibrated()))
    with pytest.warns(UserWarning, match="save a model with offloaded modules"):
        found.save_pretrained(tmp_path / "again")
    assert_reloaded(load(tmp_path / "again"), calibrated())


def test_a_state_dict_of_the_caller_is_what_is_saved(tmp_path: Path) -> None:
    qmodel = calibrated()
    weights = {name: value + 1 if name == "classifier.bias" else value for name, value in qmodel.state_dict().items()}
    qmodel.save_pretrained(tmp_path, state_dict=dict(weights))  # transformers empties the dict that it is given
    assert_equal(state(load(tmp_path)), weights)


def test_again_and_again(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path / "again")
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == sorted(
        path.name for path in folder.iterdir()
    )
    for path in folder.iterdir():
        other = tmp_path / "again" / path.name
        if path.suffix == ".safetensors":  # whose format leaves the order of the metadata to chance
            assert metadata_of(other) == metadata_of(path)
            assert_equal(load_file(other), load_file(path))
            assert other.stat().st_size == path.stat().st_size
        else:
            assert other.read_bytes() == path.read_bytes()
    model = load(folder)
    model.save_pretrained(folder)  # over the files that it came from
    assert_reloaded(load(folder), calibrated())


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "itself": lambda model: model,
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_are_saved_as_well(how: str, folder: Path, tmp_path: Path) -> None:
    copied = COPIES[how](load(folder))
    assert isinstance(copied.hf_quantizer, QDQQuantizer)
    copied.save_pretrained(tmp_path / "copy")
    assert_reloaded(load(tmp_path / "copy"), calibrated())
    assert config_of(tmp_path / "copy") == config_of(folder)


@pytest.mark.parametrize("trainer", [Trainer, QATTrainer])
def test_checkpoints_of_a_trainer(trainer: type[Trainer], folder: Path, tmp_path: Path) -> None:
    made = trainer(
        load(folder),
        arguments(tmp_path / "out", max_steps=4, save_strategy="steps", save_steps=2),
        train_dataset=Texts(),
    )
    made.train()
    made.save_model(str(tmp_path / "end"))
    trained = made.model.eval()
    for name in ("end", "out/checkpoint-4"):
        found = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert_equal(state(found), state(trained))
        assert torch.equal(logits(found), logits(trained))
    half_way = load(tmp_path / "out" / "checkpoint-2")
    assert not torch.equal(half_way.classifier.weight, trained.classifier.weight)
    resumed = trainer(half_way, arguments(tmp_path / "out", max_steps=4, save_strategy="no"), train_dataset=Texts())
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert_equal(state(resumed.model), state(trained))


# State of the quantizers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("locked", [True, False])
def test_each_quantizer_is_as_it_was(locked: bool, tmp_path: Path) -> None:
    qmodel = calibrated()
    found = list(qs.quantizers(qmodel).values())
    for index, each in enumerate(found):
        (each.disable, each.disable_quant, each.learn_amax, each.reset_amax, lambda: None)[index % 5]()
    qmodel.save_pretrained(tmp_path)
    if not locked:
        change_lock(tmp_path, lambda _: None)
    again = load(tmp_path)
    assert_reloaded(again, qmodel)
    for each, other in zip(qs.quantizers(again).values(), found, strict=True):
        assert each.enabled == other.enabled
        assert each._if_quant == other._if_quant
        assert each.learns == other.learns == isinstance(each.amax, nn.Parameter)
        assert (each.amax is None) == (other.amax is None)
        assert not each.training
    assert {"disabled", "learned", "quant_disabled", "without_range"} < config_of(tmp_path).keys()


LEARNED = """\
schema: 1
name: learned
specs:
  x: {learn: true, max_amax: 2.5}
  w: {axis: 0, learn: true}
rules:
  - name: linears
    why: all of them
    match: {layers: all, pattern: "linear(x, w)"}
    quantize: {x: x, w: w}
"""


@pytest.mark.parametrize("fixed", [True, False])
def test_rules_that_learn_do_not_learn_what_was_fixed(fixed: bool, tmp_path: Path) -> None:
    (tmp_path / "rules.yaml").write_text(LEARNED)
    qmodel = qs.convert(build("bert", CLASSIFIER), tmp_path / "rules.yaml")
    qs.calibrate(qmodel, [batch_for(qmodel, (4, 8))])
    if fixed:
        qs.fix_ranges(qmodel)
    qmodel.save_pretrained(tmp_path)
    found = load(tmp_path, attn_implementation="eager")
    assert_reloaded(found, qmodel)
    assert {each.learns for each in qs.quantizers(found).values()} == {not fixed}


def test_quantizers_are_prepared_outside_of_the_modes_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers builds a model within one, which would be told of each look at a tensor: half the time of a load."""
    calibrated().save_pretrained(tmp_path)
    told: list[Any] = []
    meanwhile: list[int] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            told.append(func)
            return func(*args, **(kwargs or {}))

    def watched(*args: Any, **kwargs: Any) -> Any:
        before = len(told)
        made = prepare(*args, **kwargs)
        meanwhile.append(len(told) - before)
        return made

    monkeypatch.setattr(plugin, "prepare", watched)
    with Mode():
        load(tmp_path)
    assert told
    assert meanwhile == [0]


@pytest.mark.usefixtures("default_descriptors")
def test_a_fixed_range_that_was_forgotten(tmp_path: Path) -> None:
    quant_nn.QuantLinear.set_default_quant_desc_input(QuantDescriptor(num_bits=8, amax=3.0))
    qmodel = qs.convert(build("bert", CLASSIFIER))
    qs.quantizers(qmodel)[QUERY].reset_amax()
    qmodel.save_pretrained(tmp_path)
    found = load(tmp_path)
    assert qs.quantizers(found)[QUERY].amax is None
    assert_reloaded(found, qmodel)


def four_bits(qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[QUERY]._num_bits = 4


def unsigned(qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[QUERY]._unsigned = True


def per_channel(qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[QUERY]._axis = (0,)


def integers(qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[QUERY]._fake_quant = False


def removed(qmodel: PreTrainedModel) -> None:
    del qmodel.bert.encoder.layer[0].attention.self.query._input_quantizer


def replaced(qmodel: PreTrainedModel) -> None:
    qmodel.bert.encoder.layer[0].attention.self.query = nn.Linear(32, 32)


def added(qmodel: PreTrainedModel) -> None:
    qmodel.bert.pooler.my_quantizer = copy.deepcopy(qs.quantizers(qmodel)[QUERY])


def clipped(qmodel: PreTrainedModel) -> None:
    qs.quantizers(qmodel)[QUERY].clip = Clip(-1.0, 1.0, learn_min=True, learn_max=True)


HANDS = {
    four_bits: rf"{QUERY} was changed by hand: .* are \(4, None, False, False, True\), and its rule 'encoder-linear'",
    unsigned: rf"{QUERY} was changed by hand",
    per_channel: rf"{QUERY} was changed by hand",
    integers: rf"{QUERY} was changed by hand",
    removed: rf"the model lacks the quantizer {QUERY}, which a rule of its own \(qdqbert\) puts there \(1 such",
    replaced: rf"the model lacks the quantizer {QUERY}, which a rule of its own \(qdqbert\) puts there \(2 such",
    added: r"the model has the quantizer bert\.pooler\.my_quantizer, which no rule of its own \(qdqbert\) puts there",
    clipped: rf"{QUERY} has the clip of a descriptor with learn_amax",
}


@pytest.mark.parametrize("change", HANDS, ids=lambda change: change.__name__)
def test_changes_by_hand_are_no_rules(change: Callable[[PreTrainedModel], None], tmp_path: Path) -> None:
    qmodel = calibrated()
    change(qmodel)
    with pytest.raises(qs.ModelError, match=HANDS[change]):
        qmodel.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


# Other classes and configs -------------------------------------------------------------------------------------------


def test_the_base_of_a_head(folder: Path) -> None:
    found, qmodel = BertModel.from_pretrained(folder), calibrated()
    batch = batch_for(qmodel, (2, 6))
    assert torch.equal(found(**batch).pooler_output, qmodel.bert(**batch).pooler_output)
    assert list(qs.quantizers(found)) == list(qs.quantizers(qmodel.bert))
    assert_equal(ranges(found), ranges(qmodel.bert))


def test_a_head_on_a_base(tmp_path: Path) -> None:
    qmodel = calibrated("bert", "BertModel")
    list(qs.quantizers(qmodel).values())[3].disable()
    qmodel.save_pretrained(tmp_path)
    torch.manual_seed(0)
    found = load(tmp_path)
    assert_equal(ranges(found.bert), ranges(qmodel))
    assert [each.enabled for each in qs.quantizers(found).values()].index(False) == 3
    found.save_pretrained(tmp_path / "head")
    assert_reloaded(load(tmp_path / "head"), found)
    # What is new in it starts as in a float model.
    floats = build("bert", "BertModel")
    floats.save_pretrained(tmp_path / "float")
    torch.manual_seed(0)
    assert torch.equal(load(tmp_path / "float").classifier.weight, found.classifier.weight)


def test_a_part_is_not_saved_by_itself(tmp_path: Path) -> None:
    """Its config has the names of the whole, as they were when that was saved last."""
    for qmodel in (calibrated(), pickle.loads(pickle.dumps(calibrated()))):
        with pytest.raises(qs.ModelError, match=r"BertModel is a part of a converted model.*save the whole"):
            qmodel.bert.save_pretrained(tmp_path)
        with pytest.raises(qs.ModelError, match="a part of a converted model"):
            qmodel.bert.dequantize()
        qmodel.dequantize()
        qmodel.bert.save_pretrained(tmp_path)
        assert not qs.quantizers(BertModel.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "options", [{"num_labels": 5}, {"hidden_dropout_prob": 0.3}, {"output_hidden_states": True}], ids=str
)
def test_other_options(options: dict[str, Any], folder: Path) -> None:
    found = load(folder, ignore_mismatched_sizes=True, **options)
    assert_equal(ranges(found), ranges(calibrated()))
    for name, value in options.items():
        assert getattr(found.config, name) == value


def told(error: pytest.ExceptionInfo[qs.MatchError]) -> str:
    """The message without the versions."""
    made = ", ".join(f"{name} {version}" for name, version in sorted(plan_versions().items()))
    text = str(error.value)
    assert made in text
    return text.replace(made, "VERSIONS")


def plan_versions() -> dict[str, str]:
    record = calibrated().hf_quantizer.quantization_config.record
    return dict(record.versions)


REMEDY = (
    "Load it with the versions that saved it and the config.json that was saved, or convert the float model again and "
    "calibrate it"
)


def test_fewer_layers(folder: Path) -> None:
    with pytest.raises(qs.MatchError) as error:
        load(folder, num_hidden_layers=1)
    assert told(error) == (
        "the checkpoint's rules 'qdqbert' no longer fit BertForSequenceClassification: of the 40 quantizers that it "
        "was saved with (by VERSIONS) they do not find 20 of them: "
        "bert.encoder.layer.*.attention.output.add_local_input_quantizer (layers 1), "
        "bert.encoder.layer.*.attention.output.add_residual_input_quantizer (layers 1), "
        "bert.encoder.layer.*.attention.output.dense._input_quantizer (layers 1), "
        "bert.encoder.layer.*.attention.output.dense._weight_quantizer (layers 1), "
        "bert.encoder.layer.*.attention.self.key._input_quantizer (layers 1), "
        f"bert.encoder.layer.*.attention.self.key._weight_quantizer (layers 1), and 14 more kinds. {REMEDY}"
    )


def test_more_layers(folder: Path) -> None:
    with pytest.raises(qs.MatchError, match=r"they find 20 beyond them: .*\(layers 2\), and 14 more kinds"):
        load(folder, num_hidden_layers=3)


def test_other_rules_are_not_those_that_were_saved(folder: Path) -> None:
    """transformers says so, and takes the folder's."""
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        found = load(folder, quantization_config=qs.QDQConfig("linear-only"))
    assert_reloaded(found, calibrated())


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("cls", [BertForSequenceClassification, BertModel])
def test_sites_that_differ(locked: bool, cls: Any, folder: Path) -> None:
    if not locked:
        change_lock(folder, lambda _: None)

    def change(config: Any) -> None:
        sites = config["sites"]
        sites["bert.encoder.layer.*.output.mul_q_input_quantizer"] = "0-1"
        del sites["bert.encoder.layer.*.output.dense._input_quantizer"]

    change_config(folder, change)
    prefix = "bert." if cls is BertForSequenceClassification else ""
    # A class that is not the one that was saved may have sites that that one had not.
    new = f"; and they find 2 beyond them: {prefix}encoder.layer.*.output.dense._input_quantizer (layers 0-1)"
    with pytest.raises(qs.MatchError) as error:
        cls.from_pretrained(folder)
    assert told(error) == (
        f"the checkpoint's rules 'qdqbert' no longer fit {cls.__name__}: of the 40 quantizers that it was saved with "
        f"(by VERSIONS) they do not find 2 of them: {prefix}encoder.layer.*.output.mul_q_input_quantizer (layers 0-1)"
        f"{new if prefix else ''}. {REMEDY}"
    )


# Attention -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("locked", "auto"), [(True, BertForSequenceClassification), (False, AutoModelForSequenceClassification)]
)
def test_another_attention_would_go_past_the_quantizers(locked: bool, auto: Any, folder: Path) -> None:
    if not locked:
        change_lock(folder, lambda _: None)
    with pytest.raises(qs.AttentionBypassError, match=r"attn_implementation='sdpa' was asked for.*'linear-only'"):
        auto.from_pretrained(folder, attn_implementation="sdpa")
    for name in ("eager", "qdq_eager", None):
        assert_reloaded(auto.from_pretrained(folder, attn_implementation=name), calibrated())


def test_another_attention_where_none_is_quantized(tmp_path: Path) -> None:
    qmodel = calibrated(rules="linear-only")
    qmodel.save_pretrained(tmp_path)
    assert load(tmp_path).config._attn_implementation == "sdpa"  # as it is in a float model
    assert load(tmp_path, attn_implementation="sdpa").config._attn_implementation == "sdpa"
    assert_reloaded(load(tmp_path, attn_implementation="eager"), qmodel)


# Float again ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "saved"), [(torch.float32, False), (torch.bfloat16, True)])
def test_dequantized(dtype: torch.dtype, saved: bool, tmp_path: Path) -> None:
    model = build("bert", CLASSIFIER).to(dtype)
    qmodel = qs.convert(model)
    qs.calibrate(qmodel, [batch_for(qmodel, (4, 8))])
    qmodel.save_pretrained(tmp_path)  # which leaves the dtype in the config as a text
    found = load(tmp_path) if saved else qmodel
    found.dequantize()
    assert torch.equal(logits(found), logits(model))
    assert_equal(state(found), state(model))
    assert not hasattr(found, "hf_quantizer")
    assert found.dtype == dtype
    assert found.config._attn_implementation == "eager"
    assert [type(module) for module in found.modules()] == [type(module) for module in model.modules()]
    found.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float" / "config.json").read_text())
    with pytest.raises(qs.ModelError, match="not converted"):
        plan_of(found)
    assert len(qs.quantizers(qs.convert(found))) == 40


def test_dequantized_to_another_dtype() -> None:
    qmodel = calibrated()
    qmodel.dequantize(torch.float16)
    assert qmodel.dtype == torch.float16


# Beside other things -------------------------------------------------------------------------------------------------


def test_a_model_of_another_method_is_refused() -> None:
    model = build("bert", CLASSIFIER)
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
    for call in (qs.convert, qs.plan):
        with pytest.raises(qs.ModelError, match="quantized by the method 'bitsandbytes' already; load its float"):
            call(model)
    with pytest.raises(qs.AlreadyConvertedError):
        qs.convert(calibrated())


@pytest.mark.slow
def test_without_the_package() -> None:
    """transformers warns, and gives the float model."""
    told = fresh_import()
    assert told.alone == ["Linear", len(build("bert", CLASSIFIER).state_dict()), False]
    assert "Unknown quantization type, got qdq_surgery" in told.logged


@pytest.mark.slow
def test_two_processes(folder: Path, tmp_path: Path) -> None:
    code = (
        "import qdq_surgery, torch; torch.set_num_threads(1); "
        "from transformers import AutoModelForSequenceClassification as A; "
        f"m = A.from_pretrained({str(folder)!r}); print(len(qdq_surgery.quantizers(m)), "
        "float(m(torch.tensor([[3, 4, 5]])).logits.detach().double().sum()))"
    )
    printed = [tmp_path / "first", tmp_path / "second"]
    runs = [forked.start(code, folder=each) for each in printed]
    said = [forked.ended(run, each).split() for run, each in zip(runs, printed, strict=True)]
    with torch.no_grad():
        total = calibrated()(torch.tensor([[3, 4, 5]])).logits.double().sum()
    assert said == [["40", str(float(total))]] * 2


@pytest.mark.parametrize("way", ["locked", "matched", "converted"])
def test_nothing_holds_a_loaded_model(way: str, folder: Path, tmp_path: Path) -> None:
    build("bert", CLASSIFIER).save_pretrained(tmp_path / "float")
    options = {"quantization_config": qs.QDQConfig()} if way == "converted" else {}
    if way == "matched":
        change_lock(folder, lambda _: None)
    gc.collect()
    gc.disable()
    try:
        model = load(tmp_path / "float" if way == "converted" else folder, **options)
        watch = weakref.ref(model)
        del model
        assert watch() is None
    finally:
        gc.enable()


def test_what_failed_leaves_no_trace(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal in the middle of loading: the next load is as if it had not been."""
    with pytest.raises(qs.MatchError):
        load(folder, num_hidden_layers=1)
    with pytest.raises(qs.AttentionBypassError):
        load(folder, attn_implementation="sdpa")
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(0).device.type == "cpu"
    made = count_matches(monkeypatch)
    assert_reloaded(load(folder), calibrated())
    assert made == []


def test_an_adapter_of_a_loaded_model(folder: Path, tmp_path: Path) -> None:
    """Its folder names the base's, from which the ranges come."""
    model = load(folder)
    model.add_adapter(LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"]))
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    found = load(tmp_path / "adapter")
    assert_equal(ranges(found), ranges(model))
    assert torch.equal(logits(found), logits(calibrated()))
    with pytest.raises(qs.AlreadyConvertedError):
        qs.convert(found)


def test_random_numbers_are_those_of_a_float_load(folder: Path, tmp_path: Path) -> None:
    build("bert", "BertModel").save_pretrained(tmp_path / "base")
    heads = []
    for options in ({}, {"quantization_config": qs.QDQConfig()}):
        torch.manual_seed(3)
        heads.append(load(tmp_path / "base", **options).classifier.weight)
    assert torch.equal(*heads)
    before = torch.get_rng_state()
    load(folder)
    assert torch.equal(torch.get_rng_state(), before)
