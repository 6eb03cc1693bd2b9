"""The contract of the project, a test per line. The same lines are tested in depth in the files named here."""

from __future__ import annotations

import copy
import io
import json
import pickle
from pathlib import Path

import pytest
import torch
from architectures import batch_for, build, tensors_of
from golden_case import Golden, assert_equal, flat
from saved import change_config
from transformers import BertForSequenceClassification, BertModel

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


def test_3_same_class() -> None:
    model = build("bert", "BertForSequenceClassification")
    qmodel = qs.convert(model)
    assert type(qmodel) is BertForSequenceClassification
    assert qmodel.config.to_dict() == model.config.to_dict()
    assert type(qmodel).forward is type(model).forward
    before, after = model.state_dict(), qmodel.state_dict()
    assert list(before) == list(after)
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.amax = 1.0
    added = set(qmodel.state_dict()) - set(before)
    assert "bert.encoder.layer.0.attention.self.matmul_q_input_quantizer._amax" in added
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
