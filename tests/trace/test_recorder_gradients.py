"""Blocks whose gradients are their own business: what is recorded has the same ones, or it is refused."""

from __future__ import annotations

import cProfile
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.block_graph import BlockGraph
from qdq_surgery.graph.compiled_graph import compile_graph
from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.surgery.quantized_forward import CompiledGraphs, QuantizedForward
from qdq_surgery.trace import autograd_watch
from qdq_surgery.trace.recorder import record


def recorded(block: nn.Module, *args: Any) -> BlockGraph:
    return record(shadow(block), type(block).forward, args, {})[0]


def run(call: Callable[[Tensor], Any], block: nn.Module, shape: tuple[int, ...]) -> list[Tensor | None]:
    """Outputs, then gradients of the input and of all parameters."""
    torch.manual_seed(3)
    x = torch.randn(shape, requires_grad=True)
    block.zero_grad()
    outputs = call(x)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [output for output in outputs if output.requires_grad]
    if wanted:
        torch.stack([(output.float() ** 2).sum() for output in wanted]).sum().backward()
    grads = [None if each.grad is None else each.grad.clone() for each in (x, *block.parameters())]
    return [*(output.detach() for output in outputs), *grads]


def assert_same(block: nn.Module) -> None:
    """What was recorded on one shape computes the same on others; tolerance 0."""
    rewritten = QuantizedForward("forward", type(block).forward, (), frozenset(), CompiledGraphs())
    rewritten.variants.add(compile_graph(recorded(block, torch.randn(2, 5, 8))))
    for shape in ((2, 5, 8), (3, 4, 8)):
        wanted = run(block, block, shape)
        found = run(lambda x: rewritten(block, (x,), {}), block, shape)
        assert torch.is_grad_enabled()
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            assert (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
    assert len(rewritten.variants.found) == 1


class Tenth(torch.autograd.Function):
    """A backward that is not its forward's derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.save_for_backward(x)
        return torch.tanh(x) * factor

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grads[0] * 0.1 + x * 0, None


class SetUp(torch.autograd.Function):
    """The newer form, with keywords and defaults."""

    @staticmethod
    def forward(x: Tensor, factor: float = 2.0) -> Tensor:
        return x * factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _: Tensor) -> None:
        ctx.factor = inputs[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * 7 * ctx.factor, None


class Several(torch.autograd.Function):
    """Several outputs: one without a gradient, one the very input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = x.argmax(-1)
        ctx.mark_non_differentiable(places)
        return x.sigmoid(), places, x

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 3 - grads[2]


class Dirty(torch.autograd.Function):
    """Changes its input in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 5


class Quiet(torch.autograd.Function):
    """A forward without any torch call."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return grads[0] * -1


class Outer(torch.autograd.Function):
    """One that calls another."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return Tenth.apply(x, 2.0) + 1

    @staticmethod
    def backward(_: Any, *grads: Tensor) -> Tensor:
        return grads[0] * 11


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)


class UsesTenth(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(Tenth.apply(self.first(x), 3.0)) + x


class UsesSetUp(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(SetUp.apply(self.first(x), factor=3.0)) + SetUp.apply(x)


class UsesSeveral(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, b, c = Several.apply(self.first(x))
        return self.second(a) + c, b, c * 2


class UsesDirty(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = Dirty.apply(y)
        return self.second(z) + y


class UsesQuiet(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(Quiet.apply(self.first(x))) + Quiet.apply(x)


class UsesOuter(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(Outer.apply(self.first(x)))


class OfWeights(Block):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, Tenth.apply(self.first.weight, 1.0), self.first.bias)


class Inner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Tenth.apply(x, 2.0) * 2


class InChildren(Block):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.inner(self.first(x)))


def scale(x: Tensor) -> Tensor:
    return x * 2 + x.mean()


class NoGrad(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.first(x)
        return self.second(x) * y


class Switches(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(False):
            y = self.first(x)
            with torch.enable_grad():
                z = self.second(x)
            y = y * self.first(y)
        return y * z + x


class Decorated(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.no_grad()(scale)(self.first(x)) * self.second(x)


class Detaches(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return y + (self.second(y) - y).detach()


class InPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) * 1
        y += x
        y *= 2
        y -= 1
        y /= 3
        y[:, 0] = 0
        y.view(-1)[:2].mul_(4)
        y.transpose(1, 2)[:, 1:].add_(1)
        z = torch.empty_like(y)
        z.copy_(y)
        y.data.clamp_(-2, 2)
        return self.second(z) * y


class Powers(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x) ** 2 + 2**x + (x * x + 1) ** torch.tanh(self.second(x))
        y = y * 1.0
        y **= 2
        z = x.detach()
        return y % 3 + 7 // (z * z + 1) + z // 2 + 3 % (z * z + 1)


class Out(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = torch.empty_like(x)
            torch.mul(x, 2, out=y)
        return self.first(x) * y


class WantsGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).detach().requires_grad_()
        return self.second(y)


class Iterates(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.first(row) for row in x[:2]])


@torch.library.custom_op("qdq_surgery_tests::triple", mutates_args=())
def triple(x: Tensor) -> Tensor:
    return x * 3


torch.library.register_autograd("qdq_surgery_tests::triple", lambda _, grad: grad * 4)


class CustomOp(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(triple(self.first(x))) + torch.ops.qdq_surgery_tests.triple(x)


KEPT = [
    UsesTenth, UsesSetUp, UsesSeveral, UsesDirty, UsesQuiet, UsesOuter, OfWeights, InChildren, NoGrad, Switches,
    Decorated, Detaches, InPlace, Powers, Out, WantsGradients, Iterates, CustomOp,
]  # fmt: skip


@pytest.mark.parametrize("kind", KEPT, ids=lambda kind: kind.__name__)
def test_gradients_are_the_original_ones(kind: type[Block]) -> None:
    torch.manual_seed(0)
    assert_same(kind())


@pytest.fixture
def apply_of_c(monkeypatch: pytest.MonkeyPatch) -> None:
    """As from torch 2.15 on, where ``Function.apply`` is no Python function any more."""
    monkeypatch.setattr(autograd_watch, "APPLY", None)


apply_tenth = Tenth.apply


class UsesApply(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.second(apply_tenth(self.first(x), 3.0)) + x


OF_C = [UsesTenth, UsesSetUp, UsesSeveral, UsesDirty, UsesQuiet, UsesOuter, OfWeights, InChildren, UsesApply]


@pytest.mark.usefixtures("apply_of_c")
@pytest.mark.parametrize("kind", OF_C, ids=lambda kind: kind.__name__)
def test_gradients_are_the_original_ones_where_apply_is_a_function_of_c(kind: type[Block]) -> None:
    torch.manual_seed(0)
    assert_same(kind())
    assert isinstance(Tenth, type)  # what stood for it in the recording is in no module


@pytest.mark.parametrize("of_c", [False, True], ids=["of Python", "of C"])
def test_an_autograd_function_is_one_node(of_c: bool, request: pytest.FixtureRequest) -> None:
    if of_c:
        request.getfixturevalue("apply_of_c")
    nodes = [node.meta["op"] for node in recorded(UsesTenth(), torch.randn(2, 5, 8)).graph.nodes if node.op != "output"]
    assert nodes == ["input", "linear", "autograd_function", "linear", "add"]


class InputInPlace(Block):
    def forward(self, x: Tensor) -> Tensor:
        x += 1
        x[:, 0].mul_(2)
        return self.first(x)


def test_what_is_done_to_the_input_in_place_is_done() -> None:
    block = InputInPlace()
    variant = compile_graph(recorded(block, torch.randn(2, 5, 8)))
    a = torch.randn(3, 4, 8)
    b = a.clone()
    assert torch.equal(variant.run(block, [a]), block(b))
    assert torch.equal(a, b)


class Decides(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.first(x) * (2 if x.shape[0] > 1 else 3)


def test_a_run_that_ends_early_leaves_gradients_on() -> None:
    block = Decides()
    rewritten = QuantizedForward("forward", Decides.forward, (), frozenset(), CompiledGraphs())
    for rows in (2, 1, 3):
        x = torch.randn(rows, 5, 8)
        assert torch.equal(rewritten(block, (x,), {}), block(x))
        assert torch.is_grad_enabled()
        with torch.no_grad():
            rewritten(block, (x,), {})
            assert not torch.is_grad_enabled()


# --- refusals


class Inference(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode():
            y = x * 2
        return self.first(x) + y.clone()


class Autocast(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return self.first(x)


class Hooks(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.register_hook(lambda grad: grad * 2)
        return y


class SavedHooks(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t * 2):
            return self.first(x).tanh()


class Checkpoints(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.first, x, use_reentrant=False)


class CheckpointsReentrant(Block):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.first, x, use_reentrant=True)


class Differentiates(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = x.detach().requires_grad_()
            return self.first(torch.autograd.grad(y.tanh().sum(), y)[0])


class Backward(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            self.first(x).sum().backward()
        return self.second(x)


class Maps(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.first)(x)


class Derives(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.func.grad(lambda y: self.first(y).sum())(x)


class Seeds(Block):
    def forward(self, x: Tensor) -> Tensor:
        torch.manual_seed(5)
        return self.first(x) + torch.rand_like(x)


class Forks(Block):
    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            return self.first(x) + torch.rand_like(x)


class Generators(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + torch.rand(x.shape, generator=torch.Generator().manual_seed(1))


class AsksForGradients(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if x.requires_grad else self.second(x)


class AsksForGradMode(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) if torch.is_grad_enabled() else self.second(x)


class SetsData(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y.data = x.data
        return y


class FunctionOfObject(Block):
    def forward(self, x: Tensor) -> Tensor:
        return Tenth.apply(self.first(x), object())


class Swallows(Block):
    def forward(self, x: Tensor) -> Tensor:
        try:
            torch.manual_seed(5)
        except Exception:
            return self.first(x)
        return self.second(x) + torch.rand_like(x)


class Compiles(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.compile(scale, backend="eager")(self.first(x))


class CallsInC(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super(torch.autograd.Function, Tenth).apply(self.first(x), 3.0)


REFUSED = [
    (Inference, r"enters torch\.inference_mode, which a graph would lose; move that out of the block, or exclude"),
    (Autocast, r"enters torch\.autocast"),
    (Hooks, r"changes how a tensor is stored or differentiated \(register_hook\)"),
    (SavedHooks, r"enters saved_tensors_hooks"),
    (Checkpoints, r"calls torch\.utils\.checkpoint"),
    (CheckpointsReentrant, r"calls torch\.utils\.checkpoint"),
    (Differentiates, r"runs a backward pass"),
    (Backward, r"differentiated \(backward\)"),
    (Maps, r"torch\.vmap"),
    (Derives, r"torch\.func"),
    (Seeds, r"sets the state of a random number generator"),
    (Forks, r"sets the state of a random number generator"),
    (Generators, r"uses a Generator, which a graph cannot hold"),
    (AsksForGradients, r"asks how gradients are recorded \(requires_grad\)"),
    (AsksForGradMode, r"asks whether gradients are wanted \(is_grad_enabled\)"),
    (SetsData, r"sets data of a tensor"),
    (FunctionOfObject, r"uses a object, which a graph cannot hold"),
    (Swallows, r"sets the state of a random number generator"),
    (Compiles, r"calls a function made by torch\.compile"),
    (CallsInC, r"calls the autograd function Tenth where only C knows of it; call it by its name in the module"),
]


@pytest.mark.parametrize(("kind", "message"), REFUSED, ids=[kind.__name__ for kind, _ in REFUSED])
def test_what_a_graph_would_lose_is_refused(kind: type[Block], message: str) -> None:
    block = kind()
    with pytest.raises(TraceError, match=rf"{kind.__name__}\.forward: test_recorder_gradients\.py:\d+ .*{message}"):
        recorded(block, torch.randn(2, 5, 8))
    assert sys.getprofile() is None
    assert torch.is_grad_enabled()


def test_another_profile_function_is_put_back() -> None:
    def other(*_: object) -> None:
        return None

    sys.setprofile(other)
    try:
        recorded(UsesTenth(), torch.randn(2, 5, 8))
        assert sys.getprofile() is other
    finally:
        sys.setprofile(None)


def test_a_profiler_goes_on_after_a_recording() -> None:
    profiler = cProfile.Profile()
    profiler.enable()
    try:
        routine = recorded(UsesTenth(), torch.randn(2, 5, 8))
        scale(torch.ones(2))
    finally:
        profiler.disable()
    assert "autograd_function" in {node.meta.get("op") for node in routine.graph.nodes}
    assert any(getattr(entry.code, "co_name", "") == "scale" for entry in profiler.getstats())
