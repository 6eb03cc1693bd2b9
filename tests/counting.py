"""An independent count of what runs in a model's encoder layers: torch tells of each product, and of its operands."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

import qdq_surgery as qs

__all__ = ["Counting"]


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
        "conv1d",
        "multi_head_attention_forward",
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
        for module in model.modules():
            if isinstance(module, nn.ModuleList):
                for layer in module:
                    if any(layer.children()) and not isinstance(layer, nn.ModuleList):
                        self._watch(layer)

    def _watch(self, layer: nn.Module) -> None:
        """(No hook: SqueezeBERT calls its layers' ``forward``.)"""
        forward = layer.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            try:
                return forward(*args, **kwargs)
            finally:
                self.depth -= 1

        layer.forward = watched

    def _note(self, _module: nn.Module, _args: Any, output: Tensor) -> None:
        self.returned.append(output)

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
