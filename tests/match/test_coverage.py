"""What each architecture has and what of it is quantized; an independent count says the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from architectures import BASE, BY_TYPE, EXPECTED, batch_for, build
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import qdq_surgery as qs


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_everything_in_the_encoder_is_quantized(model_type: str) -> None:
    made = qs.plan(build(model_type, BASE[model_type]))
    linears, matmuls, adds, quantizers = (count * made.layers for count in EXPECTED[model_type])
    assert {kind: (c.found, c.quantized, c.refused) for kind, c in made.coverage.items()} == {
        "linear": (linears, linears, 0),
        "matmul": (matmuls, matmuls, 0),
        "residual add": (adds, adds, 0),
    }
    assert len(made.sites) == quantizers
    assert not [refusal for refusal in made.refusals if refusal.layer is not None]


class Counting(TorchFunctionMode):
    """Counts matrix products inside encoder layers, and those with an operand that no quantizer returned."""

    PRODUCTS = (
        "linear",
        "matmul",
        "bmm",
        "mm",
        "baddbmm",
        "addmm",
        "einsum",
        "__matmul__",
        "scaled_dot_product_attention",
    )

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.depth = 0
        self.counts: Counter[str] = Counter()
        self.bare: list[str] = []
        self.returned: list[Tensor] = []  # kept, so that ids stay identities
        for module in model.modules():
            if isinstance(module, qs.TensorQuantizer):
                module.register_forward_hook(self._note)
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    layer.register_forward_pre_hook(lambda *_: self._step(1))
                    layer.register_forward_hook(lambda *_: self._step(-1))

    def _note(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.returned.append(output)

    def _step(self, by: int) -> None:
        self.depth += by

    def __torch_function__(
        self, func: Callable[..., Any], _types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        if self.depth and name in self.PRODUCTS:
            self.counts["linear" if name == "linear" else "matmul"] += 1
            known = {id(tensor) for tensor in self.returned}
            if not all(id(operand) in known for operand in args[:2]):
                self.bare.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model_type", BY_TYPE)
def test_an_independent_count_agrees(model_type: str) -> None:
    model = build(model_type, BASE[model_type])
    made = qs.plan(model)
    qmodel = qs.convert(model)
    calls = model.config.num_hidden_layers // made.layers  # ALBERT calls its layer again and again
    counting = Counting(qmodel)
    with torch.no_grad(), counting:
        qmodel(**batch_for(model, (2, 6)))
    assert counting.bare == []
    assert counting.counts["linear"] == made.coverage["linear"].quantized * calls
    assert counting.counts["matmul"] == made.coverage["matmul"].quantized * calls


def test_the_independent_count_sees_what_is_bare() -> None:
    model = build("bert", "BertModel")
    qmodel = qs.convert(model, "linear-only")
    counting = Counting(qmodel)
    with torch.no_grad(), counting:
        qmodel(**batch_for(model, (2, 6)))
    assert counting.bare == ["matmul"] * 4
    refused = [refusal for refusal in qs.plan(model, "linear-only").refusals if refusal.operator == "matmul"]
    assert len(refused) == 4


def test_what_lies_outside_the_layers_is_listed() -> None:
    made = qs.plan(build("mobilebert", "MobileBertForMaskedLM"))
    listed = {(refusal.path, refusal.operator) for refusal in made.refusals}
    assert ("mobilebert.embeddings.embedding_transformation", "linear") in listed
    assert ("cls.predictions", "matmul") in listed
    assert all("outside the encoder layers" in refusal.reason for refusal in made.refusals)
