"""The recorder on blocks that are made to be hard: each does one thing that trips up tracers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import BlockGraph, DecisionChangedError, flatten_call
from qdq_surgery.graph.compiled_graph import compile_graph
from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.surgery.quantized_forward import CompiledGraphs, QuantizedForward
from qdq_surgery.trace.recorder import record


def run_graph(routine: BlockGraph, block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Run the recorded graph on other arguments."""
    values, _ = flatten_call(args, kwargs)
    return compile_graph(routine).run(block, values)


def recorded(block: nn.Module, *args: Any, **kwargs: Any) -> BlockGraph:
    return record(shadow(block), type(block).forward, args, kwargs)[0]


class Heads(nn.Module):
    """Hugging Face's idiom: star-unpacked sizes, tuple concatenation, size(-2), a negative axis."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.head_dim = nn.Linear(8, 8), 4

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], -1, self.head_dim)
        y = self.proj(x).view(shape).transpose(1, 2)
        y = y / torch.sqrt(torch.tensor(y.size(-1), dtype=torch.float))
        y = y.permute(0, 2, 1, 3).contiguous()
        return y.view(y.size()[:-2] + (self.head_dim * y.size(-2),))  # noqa: RUF005 (the idiom itself)


class NamedSelf(nn.Module):
    """BERT's attention has a child called ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.self = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.self(x) + self.self.bias


class Positions(nn.Module):
    """Factories that are given sizes: arange, full, zeros."""

    def forward(self, x: Tensor) -> Tensor:
        steps = torch.arange(x.size(1), device=x.device)[None, :, None]
        return x + steps + torch.full((x.shape[0], 1, 1), 2.0) + torch.zeros(x.shape[0], x.shape[1], 1)


class Named(nn.Module):
    """Returns a dictionary, as SqueezeBERT's layers do, and takes one apart that a child returned."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.proj, self.inner = nn.Linear(8, 8), inner

    def forward(self, x: Tensor) -> dict[str, Any]:
        if self.inner is not None:
            x = self.inner(x)["states"][0]
        return {"states": (self.proj(x), x), "nothing": None}


class Optional(nn.Module):
    """None decides, and so does a keyword."""

    def forward(self, x: Tensor, mask: Tensor | None = None, *, double: bool = False) -> tuple[Tensor, Tensor | None]:
        if mask is not None:
            x = x + mask
        return (x * 2 if double else x), mask


class InPlace(nn.Module):
    """Changes tensors in place: +=, a trailing underscore, item assignment."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.clone()
        y += 1
        y.mul_(2)
        z = y
        z[:, 0] = 0
        return y + z


class Passing(nn.Module):
    """In eval mode a dropout returns its very input: the residual must not be taken for the dropout's output."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.norm = nn.Dropout(0.5), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(x) + self.norm(x) + x


class Nested(nn.Module):
    """Tuples in, tuples out, a list of children, chunks, keyword operands."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])

    def forward(self, pair: tuple[Tensor, Tensor], *, scale: float = 1.0) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        x, y = pair
        for step in self.steps:
            x = step(x)
        left, right = torch.chunk(input=x, chunks=2, dim=-1)
        values, _ = torch.max(y, dim=-1, keepdim=True)
        return x * scale, (left + right, values)


class OwnWeights(nn.Module):
    """Computes with parameters of its own and of a child, and with a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(8)), nn.Linear(8, 8)
        self.register_buffer("offset", torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.cat([self.inner.weight.t(), self.inner.weight], dim=0)[:8] * self.weight + self.offset


CASES: list[tuple[type[nn.Module], Callable[[int, int], tuple[tuple[Any, ...], dict[str, Any]]]]] = [
    (Heads, lambda b, t: ((torch.randn(b, t, 8),), {})),
    (NamedSelf, lambda b, t: ((torch.randn(b, t, 8),), {})),
    (Positions, lambda b, t: ((torch.randn(b, t, 8),), {})),
    (Optional, lambda b, t: ((torch.randn(b, t, 8), torch.randn(b, t, 1)), {"double": True})),
    (Optional, lambda b, t: ((torch.randn(b, t, 8),), {"mask": None})),
    (InPlace, lambda b, t: ((torch.randn(b, t, 8),), {})),
    (Passing, lambda b, t: ((torch.randn(b, t, 8),), {})),
    (Nested, lambda b, t: (((torch.randn(b, t, 8), torch.randn(b, t, 8)),), {"scale": float(b)})),
    (OwnWeights, lambda b, t: ((torch.randn(b, t, 8),), {})),
]


@pytest.mark.parametrize(("kind", "make"), CASES, ids=[kind.__name__ for kind, _ in CASES])
def test_a_graph_holds_for_other_shapes(kind: type[nn.Module], make: Callable[[int, int], Any]) -> None:
    torch.manual_seed(0)
    block = kind().eval()
    args, kwargs = make(2, 5)
    routine = recorded(block, *args, **kwargs)
    for shape in ((2, 5), (1, 3), (7, 9)):
        args, kwargs = make(*shape)
        copies = [a.clone() if isinstance(a, Tensor) else a for a in args]
        wanted = flatten_call((block(*copies, **kwargs),), {})[0]
        found = flatten_call((run_graph(routine, block, *args, **kwargs),), {})[0]
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert a is b is None or torch.equal(a, b)


def test_what_passes_through_is_told_apart_in_training() -> None:
    block = Passing().eval()
    routine = recorded(block, torch.randn(2, 5, 8))
    block.train()
    x = torch.randn(3, 4, 8)
    torch.manual_seed(0)
    wanted = block(x)
    torch.manual_seed(0)
    assert torch.equal(run_graph(routine, block, x), wanted)


def test_the_same_tensor_under_two_names() -> None:
    class Sub(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    x = torch.randn(2, 3)
    routine = recorded(Sub(), x, x)
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    assert torch.equal(run_graph(routine, Sub(), a, b), a - 2 * b)


def test_gradients_flow_through_a_graph() -> None:
    block = OwnWeights()
    x = torch.randn(2, 5, 8, requires_grad=True)
    run_graph(recorded(block, torch.randn(1, 3, 8)), block, x).sum().backward()
    found = [p.grad.clone() for p in (x, *block.parameters()) if p.grad is not None]
    x.grad = None
    block.zero_grad()
    block(x).sum().backward()
    wanted = [p.grad for p in (x, *block.parameters()) if p.grad is not None]
    assert len(found) == len(wanted) == 3
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


# --- decisions


class Branches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.shape[1] > 4 else x + 1


class Length(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(x)


class Whole(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * int(x.shape[1])


@pytest.mark.parametrize("kind", [Branches, Length, Whole])
def test_a_decision_that_changes_is_noticed(kind: type[nn.Module]) -> None:
    block = kind()
    routine = recorded(block, torch.randn(6, 6))
    x = torch.randn(6, 6)
    assert torch.equal(run_graph(routine, block, x), block(x))
    with pytest.raises(
        DecisionChangedError, match=f"{kind.__name__}.forward, test_recorder.py:\\d+: a comparison of sizes"
    ):
        run_graph(routine, block, torch.randn(3, 3))


@pytest.mark.parametrize("kind", [Branches, Length, Whole])
def test_a_rewritten_block_records_again_when_a_decision_changes(kind: type[nn.Module]) -> None:
    block = kind()
    rewritten = QuantizedForward("forward", kind.forward, (), frozenset(), CompiledGraphs())
    with torch.no_grad():
        for size in (6, 3, 6, 3):
            x = torch.randn(size, size)
            assert torch.equal(rewritten(block, (x,), {}), block(x))
    assert len(rewritten.variants.found) == 2


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor, self.inner, self.seen = 3.0, nn.Dropout(0.25), 0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor * (2.0 if self.training else 1.0) + self.inner.p


def test_attributes_that_were_read_are_guarded() -> None:
    block = Reads().eval()
    routine = recorded(block, torch.randn(2, 3))
    assert routine.reads == {("", "factor"): 3.0, ("", "training"): False, ("inner", "p"): 0.25}
    rewritten = QuantizedForward("forward", Reads.forward, (), frozenset(), CompiledGraphs())
    x = torch.randn(2, 3)
    for change in (
        lambda: None,
        block.train,
        lambda: setattr(block, "factor", 5.0),
        lambda: setattr(block.inner, "p", 0.5),
    ):
        change()
        assert torch.equal(rewritten(block, (x,), {}), block(x))
    assert len(rewritten.variants.found) == 4


class ReadsMore(nn.Module):
    """Sequences of plain values, which may be changed in place, and a function."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes, self.factors, self.act = [2, 3], (1.0, 2.0), torch.relu

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * sum(self.factors) + self.sizes[0]  # type: ignore[no-any-return]


def test_sequences_and_functions_that_were_read_are_guarded() -> None:
    block = ReadsMore().eval()
    found = recorded(block, torch.randn(2, 3)).reads
    assert found == {("", "sizes"): [2, 3], ("", "factors"): (1.0, 2.0), ("", "act"): torch.relu}
    rewritten = QuantizedForward("forward", ReadsMore.forward, (), frozenset(), CompiledGraphs())
    x = torch.randn(2, 3)
    for change in (
        lambda: None,
        lambda: block.sizes.__setitem__(0, 7),
        lambda: setattr(block, "factors", (1.0, 4.0)),
        lambda: setattr(block, "act", torch.tanh),
    ):
        change()
        assert torch.equal(rewritten(block, (x,), {}), block(x))
    assert len(rewritten.variants.found) == 4


# --- refusals

OUTSIDE = torch.ones(3)


class UsesValues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class UsesItem(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.max().item()


class UsesOutside(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + OUTSIDE


class SetsItself(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        return x


class ReturnsObject(nn.Module):
    def forward(self, x: Tensor) -> object:
        return {x.sum(): 1}, object()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (UsesValues, r"UsesValues.forward: test_recorder.py:\d+ decides by the values of a tensor .__bool__."),
        (UsesItem, r"UsesItem.forward: test_recorder.py:\d+ decides by the values of a tensor .item."),
        (UsesOutside, r"UsesOutside.forward: test_recorder.py:\d+ uses a tensor from outside the block"),
        (SetsItself, r"SetsItself.forward sets its own attribute 'last'"),
        (ReturnsObject, r"ReturnsObject.forward: .* uses a object, which a graph cannot hold"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_no_graph_can_hold_is_refused(kind: type[nn.Module], message: str) -> None:
    block = kind()
    with pytest.raises(TraceError, match=message):
        recorded(block, torch.randn(2, 3))
    assert vars(block).keys() == vars(kind()).keys()


def test_an_object_as_argument_is_refused() -> None:
    with pytest.raises(TraceError, match=r"Optional.forward is handed a list_iterator as argument 'mask'"):
        recorded(Optional(), torch.randn(2, 3), mask=iter([]))


def test_recording_leaves_no_trace() -> None:
    block = Nested()
    before = {name: dict(vars(module)) for name, module in block.named_modules()}
    fired: list[int] = []
    block.steps[0].register_forward_hook(lambda *_: fired.append(1))
    x = torch.randn(2, 5, 8)
    kept = x.clone()
    recorded(block, (x, x))
    assert fired == []
    assert torch.equal(x, kept)
    assert {name: vars(module).keys() for name, module in block.named_modules()} == {
        k: v.keys() for k, v in before.items()
    }
    assert type(block) is Nested


def test_children_are_recorded_with_links() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads, self.named = Heads(), NamedSelf()

        def forward(self, x: Tensor) -> Tensor:
            return self.named(self.heads(x))

    routine = recorded(Outer(), torch.randn(2, 5, 8))
    assert [(child.path, child.kind) for child in routine.walk()] == [
        ("", "forward"),
        ("heads", "forward"),
        ("named", "forward"),
    ]
    named = routine.children[1]
    assert named.caller is routine
    assert named.call is not None
    assert named.call.meta["callee"] is named
    operators = [node.meta.get("op") for node in named.graph.nodes if node.op != "output"]
    assert operators == ["input", "parameter", "linear", "bias_add"]


def test_a_child_without_a_graph_does_not_stop_its_parent() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values = UsesValues()

        def forward(self, x: Tensor) -> Tensor:
            return self.values(x) + 1

    block = Outer()
    routine = recorded(block, torch.ones(2, 3))
    [failed] = routine.opaque()
    assert failed.path == "values"
    assert failed.failure is not None
    x = -torch.ones(2, 3)
    assert torch.equal(run_graph(routine, block, x), block(x))


def test_dictionaries_go_out_and_in() -> None:
    block = Named(Named())
    x = torch.randn(2, 3, 8)
    graph = recorded(block, x)
    other = torch.randn(4, 5, 8)
    found, wanted = run_graph(graph, block, other), block(other)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(left, right) for left, right in zip(found["states"], wanted["states"], strict=True))
    assert found["nothing"] is None


def test_a_dictionary_with_other_keys_than_names_is_refused() -> None:
    class Numbered(nn.Module):
        def forward(self, x: Tensor) -> dict[int, Tensor]:
            return {0: x}

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Numbered()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)[0]

    with pytest.raises(TraceError, match=r"returns a dict, which a graph cannot hold"):
        recorded(Outer(), torch.randn(2, 3, 8))
