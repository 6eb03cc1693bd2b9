"""A product that rounds for the next: where, to what, and that nobody else reads integers."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, batch_for, build, layers
from frozen_models import apart, calibrated, frozen, outputs
from gpu_kernels import take_kernel
from torch import Tensor, nn
from torch.fx import Graph
from transformers import AutoModel, PreTrainedModel
from transformers.models.bert.modeling_bert import BertIntermediate

import qdq_surgery as qs
from qdq_surgery.errors import ModelError
from qdq_surgery.freeze.frozen_state import frozen_state
from qdq_surgery.freeze.handovers import Handover, Step, _can_round, _way, find_handovers, in_one_role
from qdq_surgery.freeze.linear import IntegerLinear
from qdq_surgery.integers.arranged import ArrangedProduct
from qdq_surgery.integers.input_grid import InputGrid
from qdq_surgery.integers.onednn import integer_linear
from qdq_surgery.integers.weight import to_integers
from qdq_surgery.trace.units import survey

#: A value at a tie may become the integer beside it, one step of 255.
NEAR = 0.05

FIRST, SECOND = "encoder.layer.0.intermediate.dense", "encoder.layer.0.output.dense"

#: Of one layer: MobileBERT has four networks in one. RoBERTa-PreLayerNorm normalizes inside the block that holds the
#: first linear, so that nothing can be handed to it as integers; ModernBERT multiplies by a gate in between.
HANDOVERS = {"mobilebert": 4, "roberta-prelayernorm": 0, "modernbert": 0}


def in_float(model: PreTrainedModel) -> PreTrainedModel:
    """The same without: each linear rounds what it is given."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, IntegerLinear):
            module.next_grid = None
    return other


def roundings(model: PreTrainedModel, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> int:
    """How often floats are rounded in a call."""
    calls: list[InputGrid] = []
    before = InputGrid._rounded

    def counted(self: InputGrid, inputs: Tensor) -> Tensor:
        calls.append(self)
        return before(self, inputs)

    with monkeypatch.context() as patch:
        patch.setattr(InputGrid, "_rounded", counted)
        outputs(model, batch)
    return len(calls)


#: RoBERTa's code, in transformers, to the names of its classes.
TWINS = ("xlm-roberta", "camembert")

#: Every architecture with the fewest quantizers, and with the most where layers are another's.
CASES = [
    *((each.model_type, "pytorch") for each in ARCHITECTURES if each.model_type not in TWINS),
    *((each, "qdqbert") for each in ("bert", "albert", "mobilebert")),
]


@pytest.mark.parametrize(("model_type", "rules"), CASES)
def test_where_one_linear_alone_reads_another(model_type: str, rules: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen(model_type, rules, **layers(model_type, 1))
    state = frozen_state(model)
    assert len(state.handovers) == HANDOVERS.get(model_type, 1)
    other, batch = in_float(model), batch_for(model, (3, 8))
    for wanted in (other, calibrated(model_type, rules, **layers(model_type, 1))):
        assert apart(outputs(model, batch), outputs(wanted, batch)) < NEAR
    assert roundings(other, batch, monkeypatch) - roundings(model, batch, monkeypatch) == len(state.handovers)


@pytest.mark.parametrize("rules", ["linear-only", "pytorch"])
def test_the_integers_are_those_that_the_next_one_would_make(rules: str) -> None:
    model = frozen("bert", rules)
    first, second = model.get_submodule(FIRST), model.get_submodule(SECOND)
    assert isinstance(first.product, ArrangedProduct) is isinstance(second.product, ArrangedProduct)
    assert isinstance(first.product, ArrangedProduct) is (rules == "pytorch")
    values = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)) * 2
    with torch.no_grad():
        handed = first(first.handed(values))
        wanted = second.input_grid(first(values))
        assert handed.dtype == wanted.dtype == torch.uint8
        assert int((handed.int() - wanted.int()).abs().max()) <= 1
        assert float((handed != wanted).float().mean()) < 0.01  # ties
        assert len(wanted.unique()) > 50
        assert torch.equal(second(wanted), second(first(values)))


def test_weights_are_what_they_were() -> None:
    """Sorting is the product's own matter."""
    qmodel = calibrated("bert", "pytorch")
    model = qs.freeze(qmodel)
    for name in (FIRST, SECOND):
        wanted, scale = to_integers(qmodel.get_submodule(name))
        linear = model.get_submodule(name)
        assert torch.equal(linear.product.integers(), wanted)
        assert torch.equal(linear.scale, scale)
        assert torch.equal(model.state_dict()[f"{name}._weight_quantizer._integers"], wanted)


def test_who_calls_from_outside_gives_and_gets_floats() -> None:
    model, qmodel = frozen("bert", "pytorch"), calibrated("bert", "pytorch")
    values = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, wanted = (each.encoder.layer[0].intermediate(values) for each in (model, qmodel))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        found, wanted = (each.encoder.layer[0].output(wanted, values) for each in (model, qmodel))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize(
    "place", ["intermediate", "intermediate.dense", "intermediate.intermediate_act_fn", "output", "output.dropout"]
)
def test_a_hook_on_the_way_sees_floats_whenever_it_comes(place: str, pre: bool) -> None:
    model = frozen("bert", "pytorch")
    batch = batch_for(model, (3, 8))
    wanted = outputs(model, batch)
    seen: list[torch.dtype] = []

    def look(_: nn.Module, given: tuple[Tensor, ...], *_result: Any) -> None:
        seen.append(given[0].dtype)

    module = model.encoder.layer[0].get_submodule(place)
    handle = module.register_forward_pre_hook(look) if pre else module.register_forward_hook(look)
    found = outputs(model, batch)
    assert seen == [torch.float32]
    assert apart(found, wanted) < NEAR
    handle.remove()
    assert all(torch.equal(wanted[name], value) for name, value in outputs(model, batch).items())


class _Around(nn.Module):
    """What an adapter, say, puts in the place of a module."""

    def __init__(self, inner: nn.Module, seen: list[torch.dtype]) -> None:
        super().__init__()
        self.inner, self.seen = inner, seen

    def forward(self, values: Tensor, *others: Tensor) -> Tensor:
        self.seen.append(values.dtype)
        result: Tensor = self.inner(values, *others)
        return result


@pytest.mark.parametrize("place", ["intermediate", "intermediate.dense", "output", "output.dense", "output.dropout"])
def test_what_is_put_in_the_place_of_a_module_sees_floats(place: str) -> None:
    model = frozen("bert", "pytorch")
    batch, seen = batch_for(model, (3, 8)), list[torch.dtype]()
    wanted = outputs(model, batch)
    layer = model.encoder.layer[0]
    layer.set_submodule(place, _Around(layer.get_submodule(place), seen))
    assert apart(outputs(model, batch), wanted) < NEAR
    assert seen == [torch.float32]


def test_what_is_put_in_the_place_of_a_forward_sees_floats() -> None:
    model = frozen("bert", "pytorch")
    batch, seen = batch_for(model, (3, 8)), list[torch.dtype]()
    wanted = outputs(model, batch)
    output = model.encoder.layer[0].output
    output.forward = _Around(type(output).forward.__get__(output), seen).forward
    assert apart(outputs(model, batch), wanted) < NEAR
    assert seen == [torch.float32]


def test_a_hook_on_all_modules_sees_floats_between_blocks() -> None:
    model = frozen("bert", "pytorch")
    batch, seen = batch_for(model, (3, 8)), set[torch.dtype]()
    blocks = {type(model.encoder.layer[0].get_submodule(name)) for name in ("intermediate", "output")}

    def look(module: nn.Module, given: tuple[Tensor, ...], result: Tensor) -> None:
        if type(module) in blocks:
            seen.update((given[0].dtype, result.dtype))

    handle = nn.modules.module.register_module_forward_hook(look)
    try:
        outputs(model, batch)
    finally:
        handle.remove()
    assert seen == {torch.float32}


def test_gradients_are_refused_where_integers_are_handed_on() -> None:
    model = frozen("bert", "pytorch")
    values = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with pytest.raises(ModelError, match="its input wants gradients"):
        model(inputs_embeds=values)
    with pytest.raises(ModelError, match="its input wants gradients"):  # whose queries, keys and values share integers
        model.encoder.layer[0].attention(values)


def test_no_linear_gives_integers_that_nobody_asked_for() -> None:
    """It would if it read some: those of the linear before it, or those that it shares with others."""

    def handover(linear: str, reader: str) -> Handover:
        return Handover("", linear, reader, linear, "0", reader, "0")

    chain = tuple(handover(*names) for names in ("ab", "bc", "cd"))
    assert in_one_role(chain, ()) == (chain[0], chain[2])
    assert in_one_role(chain[::-1], ()) == (chain[2], chain[0])
    assert in_one_role(chain, ("a",)) == (chain[1],)
    assert in_one_role(chain, ("c",)) == (chain[0],)


@torch.no_grad()
def test_compiled_it_is_one_graph() -> None:
    model = frozen("bert", "pytorch", num_hidden_layers=1)
    batch = batch_for(model, (3, 8))
    wanted, graphs = outputs(model, batch), []

    def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    torch._dynamo.reset()
    found = torch.compile(model, backend=backend, fullgraph=True)(**batch)
    assert apart(dict(found), wanted) < NEAR
    (module,) = graphs
    products = [node for node in module.graph.nodes if node.target == integer_linear]
    rounded = [node for node in products if torch.uint8 in node.args]
    assert len(rounded) == len(model.get_submodule(FIRST).product.parts) > 1
    assert len(products) == 4 + len(rounded) + 1


def test_copies_and_pickles_hand_on_integers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen("bert", "pytorch")
    batch = batch_for(model, (3, 8))
    wanted, times = outputs(model, batch), roundings(model, batch, monkeypatch)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(wanted[name], value) for name, value in outputs(again, batch).items())
        assert roundings(again, batch, monkeypatch) == times
        # It is linked to its own layers, not to those that it was copied from.
        assert again.get_submodule(FIRST).next_grid is again.get_submodule(SECOND).input_grid
        assert again.encoder.layer[0].output.dropout in again.get_submodule(FIRST).between


def test_folders_hand_on_integers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = frozen("bert", "pytorch")
    batch = batch_for(model, (3, 8))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert frozen_state(again).handovers == frozen_state(model).handovers != ()
    assert again.get_submodule(SECOND).product.parts[0]._packed is None  # not read before it is needed
    found = outputs(again, batch)
    assert all(torch.equal(value, found[name]) for name, value in outputs(model, batch).items())
    assert roundings(again, batch, monkeypatch) == roundings(model, batch, monkeypatch)


def test_to_another_kernel_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one on GPUs does not round, and takes weights as they are."""
    model = frozen("bert", "pytorch")
    batch = batch_for(model, (3, 8))
    wanted = outputs(model, batch)
    with monkeypatch.context() as patch:
        take_kernel("_int_mm", patch)
        model.to(torch.float32)
        assert not isinstance(model.get_submodule(SECOND).product, ArrangedProduct)
        assert model.get_submodule(SECOND).input_grid.order is None
        assert apart(outputs(model, batch), wanted) < NEAR
    model.to(torch.float32)
    assert isinstance(model.get_submodule(SECOND).product, ArrangedProduct)
    assert all(torch.equal(wanted[name], value) for name, value in outputs(model, batch).items())


#: A GELU does not reach the lower end of a narrow grid.
GRIDS: list[dict[str, Any]] = [{"narrow_range": False}, {"narrow_range": True}, {"unsigned": True, "zero_point": 32}]


@pytest.mark.parametrize("spec", GRIDS, ids=str)
def test_grids_on_which_cutting_off_is_the_same(spec: dict[str, Any], tmp_path: Path) -> None:
    words = ", ".join(f"{name}: {str(value).lower()}" for name, value in spec.items())
    file = tmp_path / "rules.yaml"
    file.write_text(
        "schema: 1\nname: own\nextends: linear-only\nspecs:\n  own: {" + words + "}\nrules:\n  - name: behind\n"
        '    why: a test\n    match: {layers: all, pattern: "linear(x=gelu(_), _)"}\n    quantize: {x: own}\n'
    )
    qmodel = qs.convert(build("bert", "BertModel", num_hidden_layers=1), file)
    batch = batch_for(qmodel, (4, 9))
    qs.calibrate(qmodel, [batch])
    model = qs.freeze(qmodel)
    assert frozen_state(model).handovers
    assert apart(outputs(model, batch), outputs(qmodel, batch)) < NEAR


def test_a_range_that_a_gelu_leaves_below_is_not_handed() -> None:
    """A grid of so few steps below zero that the product's own lower end is another one."""
    model = frozen("bert", "linear-only", num_hidden_layers=1)
    linear, reader = model.get_submodule(FIRST), model.get_submodule(SECOND)
    assert _can_round(linear, "gelu", reader)
    grid = reader.input_grid
    grid.lowest = -127  # narrow
    assert _can_round(linear, "gelu", reader)
    assert not _can_round(linear, "", reader)
    grid.factor.fill_(1000.0)
    assert not _can_round(linear, "gelu", reader)
    grid.lowest = -128
    assert _can_round(linear, "", reader)
    grid.never_negative = True  # so it refuses what is, which a product would cut off
    assert not _can_round(linear, "gelu", reader)
    assert _can_round(linear, "relu", reader)
    grid.never_negative = False
    grid.factor.fill_(0.0)
    assert not _can_round(linear, "gelu", reader)
    grid.factor = torch.arange(1.0, reader.in_features + 1)
    assert not _can_round(linear, "gelu", reader)  # as many parts as channels


def test_only_the_argument_that_the_next_linear_reads() -> None:
    """A graph of a kind of call that comes later may have the two blocks otherwise."""
    block = nn.ModuleDict({name: nn.Identity() for name in ("first", "drop", "second")})
    step = Step("first.dense", "first", "0", "second", "0")

    def way(*given: str, kwargs: dict[str, str] | None = None, again: bool = False) -> list[str] | None:
        graph = Graph()
        values = {"x": graph.placeholder("x")}
        values["first"] = graph.call_module("first", (values["x"],))
        values["drop"] = graph.call_module("drop", (values["first"],))
        values["drop"].meta["op"] = "dropout"
        named = {name: values[each] for name, each in (kwargs or {}).items()}
        last = graph.call_module("second", tuple(values[each] for each in given), named)
        graph.output((last, values["first"]) if again else last)
        return _way(block, values["first"].graph.find_nodes(op="call_module", target="first")[0], step)

    assert way("drop", "x") == ["first", "drop", "second"]
    assert way("x", "drop") is None
    assert way("drop", "drop") is None
    assert way("x", kwargs={"other": "drop"}) is None
    assert way("drop", "x", again=True) is None


class Reading(BertIntermediate):
    """Looks at what it is given besides, where it is told to."""

    also: bool

    def forward(self, hidden_states: Tensor) -> Tensor:
        found: Tensor = super().forward(hidden_states)
        if self.also:
            hidden_states.float().mean()
        return found


def test_every_call_of_both_must_be_that_place() -> None:
    plain = build("bert", "BertModel", num_hidden_layers=1)
    plain.encoder.layer[0].intermediate.__class__ = Reading
    found = []
    for also in (False, True):
        plain.encoder.layer[0].intermediate.also = also
        qmodel = qs.convert(plain, "linear-only")
        qs.calibrate(qmodel, [batch_for(qmodel, (3, 8))])
        model = qs.freeze(qmodel)
        found.append(frozen_state(model).handovers)
        assert apart(outputs(model, batch_for(model, (2, 5))), outputs(qmodel, batch_for(model, (2, 5)))) < NEAR
    (handover,), nothing = found
    assert nothing == ()  # what it looks at would be integers
    model, units = frozen("bert", "linear-only", num_hidden_layers=1), []
    again = copy.deepcopy(model)
    again.encoder.layer[0].intermediate.__class__ = Reading
    for also in (False, True):
        again.encoder.layer[0].intermediate.also = also
        seen = survey(again, batch_for(again, (2, 5)))
        units.append([(unit.path, unit.tree) for unit in seen.units if unit.tree is not None])
    assert [each.linear for each in find_handovers(again, units[0], (), ())] == [handover.linear]
    assert find_handovers(again, units[0] + units[1], (), ()) == ()


def test_a_linear_that_hangs_in_two_places_does_not_hand_on() -> None:
    qmodel = calibrated("bert", "linear-only")
    for layer, name in ((0, "intermediate"), (1, "output")):
        qmodel.encoder.layer[layer].also = qmodel.encoder.layer[layer].get_submodule(name).dense
    assert frozen_state(qs.freeze(qmodel)).handovers == ()
