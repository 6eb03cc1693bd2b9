from __future__ import annotations

from collections.abc import Iterator

import pytest
from pytorch_quantization import nn as quant_nn


@pytest.fixture
def default_descriptors() -> Iterator[None]:
    """pytorch-quantization's default descriptors are global: put them back afterwards."""
    before = quant_nn.QuantLinear.default_quant_desc_input, quant_nn.QuantLinear.default_quant_desc_weight
    yield
    quant_nn.QuantLinear.default_quant_desc_input, quant_nn.QuantLinear.default_quant_desc_weight = before
