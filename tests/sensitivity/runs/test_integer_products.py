"""Linears that multiply integers while a model is measured: what they compute stays, and who may do it."""

from __future__ import annotations

import pytest
import torch
from exported import calibrated, inputs_for
from torch import nn

import qdq_surgery as qs
from qdq_surgery.integers.choice import unsupported
from qdq_surgery.quantize.linear import QuantLinear
from qdq_surgery.sensitivity.runs import integer_products as subject
from qdq_surgery.sensitivity.runs.integer_products import integer_products

LINEAR = "encoder.layer.0.output.dense"

pytestmark = pytest.mark.skipif(
    unsupported(torch.device("cpu"), torch.float32) is not None, reason="no integer products on this machine"
)


def replaced(qmodel: nn.Module) -> list[str]:
    with integer_products(qmodel):
        return [name for name, each in qmodel.named_modules() if "forward" in vars(each)]


@pytest.mark.parametrize(
    ("model_type", "rules"),
    [
        *(("bert", each) for each in ("qdqbert-scaled", "onnxruntime", "openvino")),
        ("modernbert", "qdqbert"),  # without biases
    ],
)
def test_a_linear_computes_what_it_did(model_type: str, rules: str) -> None:
    """Signed and asymmetric grids, with scales and without, to the rounding of float32 sums."""
    qmodel = calibrated(model_type, rules=rules)
    seen = {}
    for name, each in qmodel.named_modules():
        if isinstance(each, QuantLinear):
            each.register_forward_hook(lambda *args, name=name: seen.update({name: args[1:]}))
    inputs = inputs_for(qmodel, (4, 10))
    with torch.no_grad():
        qmodel(**inputs)
        with integer_products(qmodel):
            names = [name for name, each in qmodel.named_modules() if "forward" in vars(each)]
            assert len(names) >= 4 * qmodel.config.num_hidden_layers
            for name in names:
                (given,), wanted = seen[name]
                found = vars(qmodel.get_submodule(name))["forward"](given)
                torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_integers_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = subject.make_product

    def counted(*given: object) -> object:
        made.append(given)
        return real(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(subject, "make_product", counted)
    qmodel = calibrated(num_hidden_layers=1)
    qs.sensitivity(qmodel, [inputs_for(qmodel, (4, 10))], kinds=False, layers=False)
    assert len(made) == 6
    assert not any("forward" in vars(each) for each in qmodel.modules())


def test_the_figures_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for ties, each of which is one rounding of thousands."""
    qmodel = calibrated(num_hidden_layers=1)
    inputs = inputs_for(qmodel, (4, 10))
    found = qs.sensitivity(qmodel, [inputs], sites=False)
    monkeypatch.setattr(subject, "_fits", lambda _: False)
    wanted = qs.sensitivity(qmodel, [inputs], sites=False)
    assert found.int8 == pytest.approx(wanted.int8, rel=0.05)
    costs = {(each.what, each.name): each for each in wanted.costs}
    for each in found.costs:
        assert each.left == pytest.approx(costs[each.what, each.name].left, rel=0.05)


@pytest.mark.parametrize("side", ["_input_quantizer", "_weight_quantizer"])
@pytest.mark.parametrize("why", ["held off", "collecting"])
def test_a_linear_in_float_stays_in_float(side: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qmodel = calibrated(num_hidden_layers=1)
    linear = qmodel.get_submodule(LINEAR)
    monkeypatch.setattr(subject, "make_product", lambda *_: pytest.fail("integers were multiplied"))
    values = torch.randn(4, linear.in_features)  # type: ignore[arg-type]
    quantizer = getattr(linear, side)
    with integer_products(qmodel), torch.no_grad():
        if why == "held off":
            quantizer.hold_off(-1)
        else:
            quantizer._calibrator, quantizer._if_calib = type("Seen", (), {"collect": lambda *_: None})(), True
        linear(values)


def test_half_precision_and_autocast_stay_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "make_product", lambda *_: pytest.fail("integers were multiplied"))
    qmodel = calibrated(num_hidden_layers=1)
    values = torch.randn(4, qmodel.get_submodule(LINEAR).in_features)  # type: ignore[arg-type]
    with integer_products(qmodel), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        qmodel.get_submodule(LINEAR)(values)
    assert replaced(qmodel.to(torch.bfloat16)) == []


def test_who_is_looked_at_stays() -> None:
    qmodel = calibrated(num_hidden_layers=1)
    linear = qmodel.get_submodule(LINEAR)
    assert LINEAR in replaced(qmodel)
    handle = linear.get_submodule("_input_quantizer").register_forward_hook(lambda *_: None)
    assert LINEAR not in replaced(qmodel)
    handle.remove()
    linear.get_submodule("_weight_quantizer")._num_bits = 4  # type: ignore[assignment]
    assert LINEAR not in replaced(qmodel)


def test_without_a_kernel_everything_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "unsupported", lambda *_: "no kernel")
    assert replaced(calibrated(num_hidden_layers=1)) == []


def test_what_is_compiled_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "_fits", lambda _: False)  # a tie could go the other way
    qmodel = calibrated(num_hidden_layers=1)
    inputs = inputs_for(qmodel, (4, 10))
    wanted = qs.sensitivity(qmodel, [inputs], sites=False, kinds=False)
    torch._dynamo.reset()
    qmodel.get_submodule(LINEAR).compile(backend="eager")
    found = qs.sensitivity(qmodel, [inputs], sites=False, kinds=False)
    assert found.int8 == pytest.approx(wanted.int8, rel=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("where", ["", "encoder.layer.0", LINEAR], ids=["model", "layer", "linear"])
def test_nothing_of_it_is_exchanged(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a compiler made would be made anew for each run; here it makes what it is given."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    qmodel = calibrated(num_hidden_layers=2)
    qmodel.get_submodule(where).compile()
    part, seen = qmodel.get_submodule(where), list[bool]()
    stay = [part, *(each for each in qmodel.modules() if isinstance(each, QuantLinear))]
    qmodel.get_submodule("embeddings").register_forward_pre_hook(
        lambda *_: seen.append(any("forward" in vars(each) for each in stay))
    )
    qs.sensitivity(qmodel, [inputs_for(qmodel, (2, 5))], sites=False, kinds=False)
    assert seen
    assert not any(seen)


def test_the_default_device_does_not_count() -> None:
    qmodel = calibrated(num_hidden_layers=1)
    inputs = inputs_for(qmodel, (4, 10))
    wanted = qs.sensitivity(qmodel, [inputs], sites=False, layers=False)
    values = torch.randn(4, 48)
    with integer_products(qmodel), torch.no_grad():
        linear = vars(qmodel.get_submodule(LINEAR))["forward"](values)
    with integer_products(qmodel), torch.no_grad(), torch.device("meta"):
        assert torch.equal(vars(qmodel.get_submodule(LINEAR))["forward"](values), linear)
    assert qs.sensitivity(qmodel, [inputs], sites=False, layers=False).to_json() == wanted.to_json()


@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_what_is_no_number_stays_none(what: float) -> None:
    qmodel = calibrated(num_hidden_layers=1)
    linear = qmodel.get_submodule(LINEAR)
    values = torch.randn(4, 48)
    values[1, 2] = what
    with torch.no_grad():
        wanted = linear(values)
        with integer_products(qmodel):
            assert torch.equal(linear(values).isnan(), wanted.isnan())


def test_one_tensor_is_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For queries, keys and values; and anew when it was written to, or for another grid."""
    qmodel = calibrated(num_hidden_layers=1)
    calls = []
    real = subject.InputGrid.forward
    monkeypatch.setattr(subject.InputGrid, "forward", lambda self, values: calls.append(1) or real(self, values))
    attention = qmodel.get_submodule("encoder.layer.0.attention.self")
    linears = [attention.get_submodule(name) for name in ("query", "key", "value")]
    values = torch.randn(4, 32)
    with integer_products(qmodel), torch.no_grad():
        found = [linear(values) for linear in linears]
        assert len(calls) == 1
        values *= 2
        assert not torch.equal(linears[2](values), found[2])
        assert len(calls) == 2
        quantizer = linears[0].get_submodule("_input_quantizer")
    quantizer._amax *= 2  # type: ignore[operator]
    with integer_products(qmodel), torch.no_grad():
        for linear in linears:
            linear(values)
    assert len(calls) == 4
