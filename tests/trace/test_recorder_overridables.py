"""Everything that torch lets be overridden: what is recorded computes the same, or it is refused when recorded.

Values, what is changed in place, and gradients are compared, on other values and another batch size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import pytest
import torch
from overridables import CALLS, FORMS, NOT_MET
from torch import Tensor, nn
from torch.overrides import get_overridable_functions, resolve_name

from qdq_surgery.errors import TraceError
from qdq_surgery.graph.compiled_graph import compile_graph
from qdq_surgery.graph.replay import check_replay
from qdq_surgery.graph.shell_copy import shadow
from qdq_surgery.surgery.quantized_forward import CompiledGraphs, QuantizedForward
from qdq_surgery.trace.recorder import record

Call = Callable[[Tensor, Tensor, Tensor, Tensor], Any]

#: Give whatever lies in memory.
_UNWRITTEN = ("empty", "new_empty", "resize")
#: Round differently from call to call, the float model's too.
_UNSTEADY = ("lstsq",)


def overridables() -> dict[str, Any]:
    found = {}
    for namespace, functions in get_overridable_functions().items():
        for function in functions:
            found[resolve_name(function) or f"{namespace}.{function}"] = function
    return found


OVERRIDABLES = overridables()


class Probe(nn.Module):
    """A linear, and one call of a function beside it."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), (call,)

    def forward(self, x: Tensor, i: Tensor, m: Tensor) -> Any:
        y, z = self.linear(x), torch.sigmoid(self.linear(x))
        return self.calls[0](y, z, i, m), y, z, i, m


def inputs(rows: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    size = (rows, 4, 4)
    x = torch.randn(size, generator=made)
    return x, torch.randint(0, 4, size, generator=made), torch.rand(size, generator=made) > 0.5


@functools.cache
def _compiled(source: str) -> CodeType:
    return compile(f"lambda y,z,i,m: {source}", "<a sample call>", "eval")


def calls(name: str) -> Iterator[Call]:
    function = OVERRIDABLES[name]
    if name in CALLS:
        sources = [CALLS[name]]
    elif name.endswith(".__get__"):
        sources = [f"y.{name.split('.')[-2]}"]
    else:
        sources = [f"f{form}" for form in FORMS]
    for source in sources:
        yield eval(_compiled(source), {"f": function, "torch": torch})


@functools.cache
def given() -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What a float block hands to the call, with three rows and with two: one for all that are tried, most in vain."""
    block = Probe(lambda *_: None)
    return [block(*inputs(rows, rows))[1:] for rows in (3, 2)]


def runs(call: Call) -> bool:
    """Whether a float block runs on this call."""
    try:
        for y, z, i, m in given():
            # (What a linear gives is a view.)
            if call(y.clone().view(y.shape), z.clone(), i.clone(), m.clone()) is NotImplemented:
                return False
    except Exception:
        return False
    return True


def leaves(value: Any) -> list[Any]:
    if isinstance(value, (tuple, list)):
        return [leaf for item in value for leaf in leaves(item)]
    if isinstance(value, dict):
        return leaves(list(value.values()))
    return [value]


def gradients(block: nn.Module, x: Tensor, output: Any) -> list[Any]:
    block.zero_grad()
    x.grad = None
    parts = [part for part in leaves(output) if isinstance(part, Tensor) and part.requires_grad and part.numel()]
    real = [part for part in parts if part.is_floating_point()]
    if real:
        try:
            torch.stack([((part.to_dense().double() - 0.3) ** 2).sum() for part in real]).sum().backward()
        except (RuntimeError, NotImplementedError) as error:
            return [str(error).splitlines()[0][:40]]
    return [None if each.grad is None else each.grad.clone() for each in (x, *block.parameters())]


def assert_alike(name: str, found: list[Any], wanted: list[Any]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert type(a) is type(b)
        if not isinstance(b, Tensor):
            assert a == b or isinstance(b, float)
            continue
        assert (a.shape, a.dtype, a.layout) == (b.shape, b.dtype, b.layout)
        if a.layout is not torch.strided:
            a, b = a.to_dense(), b.to_dense()
        tolerance = 1e-3 if any(part in name for part in _UNSTEADY) else 0.0
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def check(name: str, call: Call) -> str:
    """``kept`` or ``refused``; anything else fails."""
    torch.manual_seed(0)
    block = Probe(call)
    try:
        routine = record(shadow(block), Probe.forward, inputs(3, 1), {})[0]
        variant = compile_graph(routine)
        check_replay(routine)
    except TraceError:
        return "refused"
    rewritten = QuantizedForward("forward", Probe.forward, (), frozenset(), CompiledGraphs([variant]))
    outputs, grads = [], []
    for run in (block, lambda *args: rewritten(block, args, {})):
        x, i, m = inputs(2, 6)  # other values than those that were recorded, and fewer rows
        x.requires_grad_()
        torch.manual_seed(4)
        output = run(x, i, m)
        outputs.append([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves(output)])
        grads.append(gradients(block, x, output))
    if not any(part in name for part in _UNWRITTEN):
        assert_alike(name, outputs[1], outputs[0])
        assert_alike(name, grads[1], grads[0])
    return "kept"


@functools.cache
def verdict(name: str) -> str:
    for call in calls(name):
        if runs(call):
            return check(name, call)
    return "not met"


GROUPS = [(prefix, sorted(OVERRIDABLES)[prefix::8]) for prefix in range(8)]

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # deprecated functions, and features in beta: what they say of themselves


@pytest.mark.parametrize("names", [names for _, names in GROUPS], ids=[f"part-{number}" for number, _ in GROUPS])
def test_every_overridable_is_kept_or_refused(names: list[str]) -> None:
    wrong = {}
    for name in names:
        try:
            problem = "no sample call, and no reason why a forward cannot meet it" if verdict(name) == "not met" else ""
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
        if problem and not any(part in name for part in NOT_MET):
            wrong[name] = problem
    assert not wrong, "\n".join(f"{name}: {why[:200]}" for name, why in wrong.items())


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("torch.Tensor.__pow__", "kept"),
        ("torch.Tensor.__rpow__", "kept"),
        ("torch.Tensor.__ipow__", "kept"),
        ("torch.Tensor.__setitem__", "kept"),
        ("torch.Tensor.add_", "kept"),
        ("torch.Tensor.detach_", "kept"),
        ("torch.nn.functional.scaled_dot_product_attention", "kept"),
        ("torch.Tensor.register_hook", "refused"),
        ("torch.Tensor.requires_grad.__get__", "refused"),
        ("torch.Tensor.item", "refused"),
        ("torch.Tensor.backward", "refused"),
        ("torch.Tensor.q_scale", "not met"),
    ],
)
def test_the_walk_tells_them_apart(name: str, wanted: str) -> None:
    assert verdict(name) == wanted
