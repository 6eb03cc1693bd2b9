from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from pytorch_quantization import nn as quant_nn


def pytest_configure(config: pytest.Config) -> None:
    """MobileBERT's embeddings hold each token's neighbours: calibrated on padding it says so, wherever it is used."""
    config.addinivalue_line("filterwarnings", r"ignore:MobileBert\w* lets padding into real tokens:UserWarning")


@pytest.fixture
def default_descriptors() -> Iterator[None]:
    """pytorch-quantization's default descriptors are global: put them back afterwards."""
    before = quant_nn.QuantLinear.default_quant_desc_input, quant_nn.QuantLinear.default_quant_desc_weight
    yield
    quant_nn.QuantLinear.default_quant_desc_input, quant_nn.QuantLinear.default_quant_desc_weight = before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The models are tiny: on a shared machine threads would only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def threads_of_the_reference() -> Iterator[None]:
    """The golden files were made with two threads: one thread alone sums a layer norm's gradients in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
