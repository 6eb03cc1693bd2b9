from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import kept
import pytest
import reference_run
import torch
from pytorch_quantization import nn as quant_nn

from reference_cases import THREADS


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each worker: the models are tiny, and threads would only wait for one another.

    MobileBERT's embeddings hold each token's neighbours: calibrated on padding it says so, wherever it is used.
    """
    torch.set_num_threads(1)
    if not hasattr(config, "workerinput"):
        kept.begin()
    config.addinivalue_line("filterwarnings", r"ignore:MobileBert\w* lets padding into real tokens:UserWarning")


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        kept.end()


@pytest.fixture
def default_descriptors() -> Iterator[None]:
    """pytorch-quantization's default descriptors are global: put them back afterwards."""
    before = quant_nn.QuantLinear.default_quant_desc_input, quant_nn.QuantLinear.default_quant_desc_weight
    yield
    quant_nn.QuantLinear.default_quant_desc_input, quant_nn.QuantLinear.default_quant_desc_weight = before


@pytest.fixture
def threads_of_the_reference() -> Iterator[None]:
    """One thread alone sums a layer norm's gradients in another order than the reference's two."""
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what the real QDQBERT computes here: scripts/make_reference.py says what lies in it."""
    kept = pytestconfig.pluginmanager.hasplugin("cacheprovider")
    cache = pytestconfig.cache.mkdir("reference") if kept else tmp_path_factory.mktemp("reference")
    return reference_run.reference_in(cache)
