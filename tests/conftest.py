from __future__ import annotations

import gc
import importlib.util
import itertools
import logging
import os
import sys
import types
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import forked
import hypothesis
import kept
import pytest
from hearing import Heard

# The same examples in every run; the first of them imports what the others have, and takes as long as that.
hypothesis.settings.register_profile("tests", deadline=None, derandomize=True)
hypothesis.settings.load_profile("tests")

HAS_EXPORTER = all(importlib.util.find_spec(name) for name in ("onnx", "onnx_ir", "onnxscript"))

#: Folders and modules of tests that always record: their subject is how a model is looked at, or what that leaves.
RECORDED_ANEW = frozenset(
    "attacks graph match padding safety surgery trace test_contract test_convert test_stored_recordings "
    "test_untouched".split()
)


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each worker: the models are tiny, and threads would only wait for one another.

    MobileBERT's embeddings hold each token's neighbours: calibrated on padding it says so, wherever it is used.
    """
    config.addinivalue_line("filterwarnings", r"ignore:MobileBert\w* lets padding into real tokens:UserWarning")
    # MKL's products may differ in their last bit with where in memory a weight lies (seen on AMD), and tensors that are
    # loaded lie elsewhere than those that are made; so they do not. MKL reads this at its first product; the processes
    # that tests start, the real QDQBERT's among them, have it from here.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    if not hasattr(config, "workerinput"):
        kept.begin()
        if _runs_no_test(config):  # its workers need not wait for its imports
            return
    import reference_run  # noqa: F401 - before other libraries set variables
    import torch

    gc.disable()  # until all tests are collected
    torch.set_num_threads(1)
    # torch says what it does at every step of a trace, to pytest, which keeps it: a third of an export's time.
    logging.getLogger("torch.__trace").disabled = True
    # torch.manual_seed notes where it was called, for each kind of device that is not in use: pytest's stacks are deep.
    for devices in (torch.cuda, torch.xpu, torch.mtia):
        if hasattr(devices, "traceback"):
            devices.traceback = types.SimpleNamespace(format_stack=lambda: ["(tests do not format it)\n"])


def _runs_no_test(config: pytest.Config) -> bool:
    """Whether this process starts workers for that."""
    return not hasattr(config, "workerinput") and bool(config.getoption("numprocesses", None))


def pytest_unconfigure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):
        kept.end()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """What has been imported stays: Python is not to look through it for garbage, again and again.

    torch, transformers and the list of tests are half a million objects, a sixth of the time of all tests.
    """
    try:
        return (yield)
    finally:
        _let_threads_sleep()
        _freeze()
        if not (session.config.option.collectonly or _runs_no_test(session.config)):
            forked.prepare(pytest.MonkeyPatch())
        gc.set_threshold(700, 10, 100)
        gc.enable()


def _let_threads_sleep() -> None:
    """ONNX Runtime's threads wait for work in a loop, on a core that another test needs: half of a tiny file's time."""
    runtime: Any = sys.modules.get("onnxruntime")
    if runtime is not None:

        class SessionOptions(runtime.SessionOptions):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.add_session_config_entry("session.intra_op.allow_spinning", "0")

        runtime.SessionOptions = SessionOptions


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """What is left of a file of tests stays, too: models and recordings that are kept for others, millions of objects.

    Python would look through them again and again, and Trainer, torch's compilers and others ask it to, at every turn.
    """
    import torch

    try:
        return (yield)
    finally:
        torch.set_num_threads(1)  # a script that was tested may have taken more, for all that comes after it
        if nextitem is not None and nextitem.path != item.path:
            if next(_FILES) % _ANEW == 0:  # what was kept and is no longer is garbage now
                gc.unfreeze()
            _freeze()


_FILES = itertools.count(1)

#: After so many files all that lives is looked through again.
_ANEW = 40


def _freeze() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module", autouse=True)
def stores(request: pytest.FixtureRequest) -> Iterator[None]:
    """Equal traces are made once, and equal models recorded once in a process, but for tests of what looks at a model.

    For whole files, so that what their fixtures make for all of their tests comes from the stores, too.
    """
    with pytest.MonkeyPatch.context() as patch:
        if HAS_EXPORTER:
            import stored_traces

            stored_traces.install(patch)
        if not RECORDED_ANEW.intersection(request.path.parts) and request.path.stem not in RECORDED_ANEW:
            import stored_recordings

            stored_recordings.install(patch)
        yield


@pytest.fixture(autouse=True)
def traces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests whose subject is the trace make their own: those are marked ``traces``."""
    if HAS_EXPORTER and request.node.get_closest_marker("traces") is not None:
        import stored_traces

        stored_traces.uninstall(monkeypatch)


@pytest.fixture
def heard() -> Iterator[Heard]:
    """What every logger says during a test: transformers' and absl's hand nothing on to the root."""
    listening = Heard()
    known = logging.root.manager.loggerDict.values()
    loggers = [logging.root, *(each for each in known if isinstance(each, logging.Logger) and not each.propagate)]
    for logger in loggers:
        logger.addHandler(listening)
    yield listening
    for logger in loggers:
        logger.removeHandler(listening)


@pytest.fixture
def default_descriptors() -> Iterator[None]:
    """pytorch-quantization's default descriptors are global: put them back afterwards."""
    from pytorch_quantization import nn as quant_nn

    before = quant_nn.QuantLinear.default_quant_desc_input, quant_nn.QuantLinear.default_quant_desc_weight
    yield
    quant_nn.QuantLinear.default_quant_desc_input, quant_nn.QuantLinear.default_quant_desc_weight = before


@pytest.fixture
def threads_of_the_reference() -> Iterator[None]:
    """One thread alone sums a layer norm's gradients in another order than the reference's two."""
    import torch

    from reference_cases import THREADS

    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def reference(pytestconfig: pytest.Config) -> Path:
    """The folder with what the real QDQBERT computes here: scripts/make_reference.py says what lies in it.

    Without pytest's cache it is made once in a run, for all workers.
    """
    import reference_run

    if pytestconfig.pluginmanager.hasplugin("cacheprovider"):
        return reference_run.reference_in(pytestconfig.cache.mkdir("reference"))
    return kept.kept(reference_run.reference_in, "reference")
