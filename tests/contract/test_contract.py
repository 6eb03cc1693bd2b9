"""The contract of the project, a test per line. The same lines are tested in depth in the files named here."""

from __future__ import annotations

import copy
import inspect
import io
import json
import pickle
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from architectures import BY_TYPE, batch_for, build, kind_of, tensors_of
from golden_case import Golden, assert_equal, flat
from repository import PACKAGE
from saved import change_config
from transformers import BertModel

import qdq_surgery as qs


def test_1_float_exact() -> None:
    """In depth: test_float_exact.py."""
    model = build("bert", "BertForSequenceClassification")
    qmodel = qs.convert(model)
    batch = batch_for(model, (3, 6), labels=True)
    with qs.quantization_disabled(qmodel):
        found, wanted = tensors_of(qmodel(**batch)), tensors_of(model(**batch))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    # And enabled they do something.
    assert not torch.equal(qmodel(**batch).logits, wanted["logits"])


@pytest.mark.usefixtures("threads_of_the_reference")
def test_2_reference_exact(reference: Path) -> None:
    """In depth: test_reference.py."""
    golden = Golden(reference / "model.safetensors")
    output = golden.calibrated()(**golden.arguments(), output_hidden_states=True)
    wanted = {k: v for k, v in golden.group("legacy").items() if not k.startswith("attentions")}
    assert_equal(flat(output), wanted, tolerance=0.0)


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_3_same_class(model_type: str) -> None:
    head = next(head for head in BY_TYPE[model_type].heads() if kind_of(head) == "sequence")
    model = build(model_type, head)
    qmodel = qs.convert(model)
    assert type(qmodel) is getattr(transformers, head)
    assert qmodel.config.to_dict() == model.config.to_dict()
    assert inspect.signature(qmodel.forward) == inspect.signature(model.forward)
    assert qmodel.forward.__func__ is type(model).forward
    before, after = model.state_dict(), qmodel.state_dict()
    assert list(before) == list(after)
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.amax = 1.0
    added = set(qmodel.state_dict()) - set(before)
    assert model_type != "bert" or "bert.encoder.layer.0.attention.self.matmul_q_input_quantizer._amax" in added
    assert len(added) == len(qs.quantizers(qmodel)) > 0
    assert all(name.endswith("_quantizer._amax") for name in added)
    assert set(before) < set(qmodel.state_dict())


def test_4_no_global_effects() -> None:
    """In depth: test_convert.py."""
    model, other = build("bert", "BertModel"), build("bert", "BertModel", seed=1)
    state = copy.deepcopy(model.state_dict())
    structure, forward = repr(model), type(model.encoder.layer[0].output).forward
    batch = batch_for(model, (2, 5))
    wanted, of_other = model(**batch).last_hidden_state, other(**batch).last_hidden_state
    qs.convert(model)
    assert repr(model) == structure
    assert type(model.encoder.layer[0].output).forward is forward
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.config._attn_implementation == "eager"
    assert torch.equal(model(**batch).last_hidden_state, wanted)
    assert torch.equal(other(**batch).last_hidden_state, of_other)


def test_4_nothing_is_patched() -> None:
    """No function of torch or transformers, and none of their classes' methods, is this package's."""
    model = build("bert", "BertForSequenceClassification")
    qmodel = qs.convert(model)
    qs.calibrate(qmodel, [batch_for(model, (2, 5))])
    qmodel(**batch_for(model, (3, 6), labels=True)).loss.backward()
    assert [*patches()] == []
    # The search finds one.
    own = BertModel.forward
    try:
        BertModel.forward = vars(qs)["convert"]
        assert [*patches()] == ["transformers.models.bert.modeling_bert.BertModel.forward"]
    finally:
        BertModel.forward = own


def patches() -> Iterator[str]:
    """Names in torch and transformers behind which there is code of the package."""
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] not in ("torch", "transformers") or type(module) is not types.ModuleType:
            continue
        for owner in [module, *(each for each in vars(module).values() if issubclass(type(each), type))]:
            if owner is not module and owner.__module__ != name:
                continue  # of another module
            for attribute, value in [*vars(owner).items()]:
                kind = type(value)  # some are proxies that fail when they are asked for anything
                inner = value.fget if kind is property else value
                function = value.__func__ if kind in (classmethod, staticmethod, types.MethodType) else inner
                file = function.__code__.co_filename if type(function) is types.FunctionType else ""
                if file.startswith(str(PACKAGE)):
                    yield ".".join((name, *([] if owner is module else [owner.__qualname__]), attribute))


def test_5_nothing_silent(tmp_path: Path) -> None:
    """In depth: test_matching.py, test_convert.py, test_onnx.py."""
    rules = tmp_path / "typo.yaml"
    rules.write_text(
        "schema: 1\nname: typo\nextends: qdqbert\nrules:\n"
        '  - {name: more, why: w, match: {within: "*.atention.*", pattern: "linear(x, w)"}, quantize: {x: default}}\n'
    )
    model = build("bert", "BertModel")
    with pytest.raises(qs.MatchError, match=r"typo\.yaml:5: rule 'more' matches nothing"):
        qs.convert(model, rules)
    qmodel = qs.convert(model)
    qmodel.set_attn_implementation("sdpa")
    with pytest.raises(qs.AttentionBypassError, match="'sdpa', which would bypass"):
        qmodel(**batch_for(model, (2, 5)))
    assert [refusal.path for refusal in qs.plan(model).refusals] == ["pooler.dense"]
    without = next(iter(qs.quantizers(qmodel)))
    qs.calibrate(qs.convert(model, inplace=True), [batch_for(model, (2, 5))])
    qs.quantizers(model)[without].reset_amax()
    with pytest.raises(qs.CalibrationError, match=re.escape(without)):
        qs.export_onnx(model, tmp_path / "model.onnx", batch_for(model, (2, 5)), target="onnxruntime")
    assert not (tmp_path / "model.onnx").exists()


def test_6_it_is_a_module() -> None:
    """In depth: test_module.py."""
    model = build("bert", "BertModel")
    qmodel = qs.convert(model)
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.amax = 2.0
    batch = batch_for(model, (2, 5))
    wanted = qmodel(**batch).last_hidden_state
    copied, pickled = copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))
    for twin in (copied, pickled):
        assert torch.equal(twin(**batch).last_hidden_state, wanted)
        assert not set(map(id, qs.quantizers(twin).values())) & set(map(id, qs.quantizers(qmodel).values()))
    buffer = io.BytesIO()
    torch.save(qmodel.state_dict(), buffer)
    buffer.seek(0)
    fresh = qs.convert(model)
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(fresh(**batch).last_hidden_state, wanted)


def test_7_data_is_data(tmp_path: Path) -> None:
    """In depth: tests/attacks, tests/safety/test_untrusted.py, tests/onnx_file/test_writer.py."""
    told = tmp_path / "told"
    hostile = f"x_quantizer=__import__('pathlib').Path({str(told)!r}).touch()#_quantizer"
    rules = tmp_path / "hostile.yaml"
    rules.write_text(
        "schema: 1\nname: hostile\nrules:\n"
        '  - {name: r, why: w, match: {layers: all, pattern: "matmul(a, b)"}, quantize: {a: {spec: default, as: '
        f'"{hostile}"}}}}}}\n'
    )
    with pytest.raises(qs.RuleFileError, match="is no quantizer name"):
        qs.load_rules(rules)
    model = build("bert", "BertModel")
    qmodel = qs.convert(model)
    qs.calibrate(qmodel, [batch_for(model, (2, 5))])
    qmodel.save_pretrained(tmp_path / "model")
    change_config(tmp_path / "model", lambda own: own["rules"]["rules"][2]["quantize"][0].update({"as": hostile}))
    with pytest.raises(qs.QdqSurgeryError, match="is no quantizer name"):
        BertModel.from_pretrained(tmp_path / "model")
    assert not told.exists()
    # Writing replaces whole files or nothing.
    tuned = qs.tune(model, [batch_for(model, (2, 5))], "linear-only")
    before = rules.read_text()
    with pytest.raises(qs.ExportError, match="exists"):
        tuned.save(rules)
    assert rules.read_text() == before


def test_8_all_or_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """In depth: tests/attacks/test_interruptions.py."""
    model = build("bert", "BertModel")
    before, structure = copy.deepcopy(model.state_dict()), repr(model)
    batch = batch_for(model, (2, 5))
    wanted = model(**batch).last_hidden_state

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("qdq_surgery.surgery.apply.implant", interrupted)  # the last step of a conversion
        with pytest.raises(KeyboardInterrupt):
            qs.convert(model, inplace=True)
    assert repr(model) == structure
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(model(**batch).last_hidden_state, wanted)
    qmodel = qs.convert(model, inplace=True)
    with monkeypatch.context() as patched:
        patched.setattr("qdq_surgery.calibration.ranges.set_state", interrupted)  # all ranges are set by then
        with pytest.raises(KeyboardInterrupt):
            qs.calibrate(qmodel, [batch])
    assert all(each.amax is None for each in qs.quantizers(qmodel).values())


@pytest.mark.usefixtures("threads_of_the_reference")
def test_9_on_every_machine(reference: Path) -> None:
    """What is compared was computed by the kernels that compute here. In depth: test_portable.py."""
    ran = json.loads((reference / "run.json").read_text())
    assert ran["torch"] == torch.__config__.show()
    assert ran["threads"] == torch.__config__.parallel_info()
