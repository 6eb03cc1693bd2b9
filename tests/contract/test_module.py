"""Contract 6 in depth: a converted model lives like any module."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import torch._inductor.config
from architectures import BASE, batch_for, build
from repository import PACKAGE, SCRIPTS, TESTS
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs

#: One of each kind: through the attention interface; inline; add and attention in one block; pre-norm.
KINDS = ("bert", "deberta-v2", "albert", "modernbert")


def calibrated(model_type: str, **options: Any) -> PreTrainedModel:
    model = build(model_type, BASE[model_type], **options)
    qmodel = qs.convert(model, inplace=True)
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.enable_calib()
        quantizer.disable_quant()
    with torch.no_grad():
        qmodel(**batch_for(qmodel, (4, 8)))
    for quantizer in qs.quantizers(qmodel).values():
        quantizer.load_calib_amax()
        quantizer.disable_calib()
        quantizer.enable_quant()
    return qmodel


def states(model: PreTrainedModel, batch: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**batch).last_hidden_state


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_copies_are_equal_and_independent(model_type: str, duplicate: Any) -> None:
    qmodel = calibrated(model_type)
    batch = batch_for(qmodel, (2, 5))
    wanted = states(qmodel, batch)
    twin = duplicate(qmodel)
    assert torch.equal(states(twin, batch), wanted)
    for quantizer in qs.quantizers(twin).values():
        quantizer.amax = torch.full_like(quantizer.amax, 0.1)
    assert not torch.equal(states(twin, batch), wanted)
    assert torch.equal(states(qmodel, batch), wanted)
    assert type(twin.get_submodule("")) is type(qmodel)


PATHS = [str(each) for each in (Path(__file__).parent, TESTS, SCRIPTS, PACKAGE.parent)]


def save_models(path: str) -> None:
    """Models, each with a batch and what it makes of it."""
    saved = []
    for model_type in KINDS:
        qmodel = calibrated(model_type)
        batch = batch_for(qmodel, (2, 5))
        saved.append((qmodel, batch, states(qmodel, batch)))
    torch.save(saved, path)


@pytest.mark.slow
def test_pickles_open_in_another_process(tmp_path: Path) -> None:
    """From one new process to another: other libraries in this one may have set how numbers are rounded."""
    write = "import sys, test_module\ntest_module.save_models(sys.argv[1])"
    read = (
        "import sys, torch\n"
        "for q, batch, wanted in torch.load(sys.argv[1], weights_only=False):\n"
        "    with torch.no_grad(): assert torch.equal(q(**batch).last_hidden_state, wanted)"
    )
    for code in (write, read):
        forked.run(f"import sys\nsys.path[:0] = {PATHS!r}\n{code}", tmp_path / "models.pt", folder=tmp_path / "printed")


@pytest.mark.parametrize("model_type", KINDS)
def test_state_dict_round_trip_on_a_cpu(model_type: str) -> None:
    qmodel = calibrated(model_type)
    batch = batch_for(qmodel, (2, 5))
    fresh = qs.convert(build(model_type, BASE[model_type], seed=3))
    result = fresh.load_state_dict(copy.deepcopy(qmodel.state_dict()))
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert torch.equal(states(fresh, batch), states(qmodel, batch))


@pytest.mark.parametrize("model_type", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(model_type: str, dtype: torch.dtype) -> None:
    qmodel = calibrated(model_type).to(dtype)
    plain = build(model_type, BASE[model_type]).to(dtype)
    batch = batch_for(qmodel, (2, 5))
    found = states(qmodel, batch)
    assert found.dtype == dtype
    assert all(quantizer.amax.dtype == torch.float32 for quantizer in qs.quantizers(qmodel).values())
    with qs.quantization_disabled(qmodel):
        assert torch.equal(states(qmodel, batch), states(plain, batch))
    # Far from exact, but the same network: the direction of the hidden states survives.
    cosine = torch.cosine_similarity(found.float().flatten(), states(plain, batch).float().flatten(), dim=0)
    assert cosine > 0.97


def test_autocast_gets_graphs_of_its_own() -> None:
    model = build("deberta-v2", "DebertaV2Model")
    qmodel = qs.convert(model)
    batch = batch_for(model, (2, 5))
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), qs.quantization_disabled(qmodel):
            assert torch.equal(states(qmodel, batch), states(model, batch))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("model_type", ["bert", "distilbert", "deberta-v2", "modernbert"])
def test_gradient_checkpointing(model_type: str) -> None:
    qmodel = calibrated(model_type).train()
    batch = batch_for(qmodel, (3, 6))

    def gradients() -> list[Tensor]:
        qmodel.zero_grad()
        torch.manual_seed(5)
        qmodel(**batch).last_hidden_state.pow(2).sum().backward()
        return [p.grad.clone() for p in qmodel.parameters() if p.grad is not None]

    wanted = gradients()
    qmodel.gradient_checkpointing_enable()
    found = gradients()
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_torch_export_with_dynamic_shapes() -> None:
    """Others are exported so in tests/test_onnx_export.py; strictly, in tests/ecosystem/test_loaded_life.py."""
    qmodel = calibrated("deberta-v2", num_hidden_layers=1)
    example = batch_for(qmodel, (3, 9))
    dynamic = {name: {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens", max=32)} for name in example}
    program = torch.export.export(qmodel, (), example, dynamic_shapes=dynamic).module()
    for shape in ((2, 5), (5, 12)):
        batch = batch_for(qmodel, shape)
        with torch.no_grad():
            assert torch.equal(program(**batch).last_hidden_state, states(qmodel, batch))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_torch_compile_without_graph_breaks() -> None:
    """One graph for all shapes, of the architecture that looks at them most. BERT: test_loaded_life.py."""
    qmodel = calibrated("deberta-v2", num_hidden_layers=1)
    torch._dynamo.reset()
    # The eager backend runs the same kernels, so what dynamo captured can be compared to the bit.
    compiled = torch.compile(qmodel, fullgraph=True, dynamic=True, backend="eager")
    for shape in ((2, 5), (4, 9)):
        batch = batch_for(qmodel, shape)
        assert torch.equal(states(compiled, batch), states(qmodel, batch))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_torch_compile_with_inductor() -> None:
    """Of a block with a linear and a residual add: the compiler of C++ takes seconds for each kernel."""
    qmodel = calibrated("bert", num_hidden_layers=1)
    plain = copy.deepcopy(qmodel)
    torch._dynamo.reset()
    batch = batch_for(qmodel, (2, 5))
    qmodel.encoder.layer[0].attention.output.compile(fullgraph=True)
    # What it would try first, of the machine's vectors and with headers, takes longer than two kernels.
    with torch._inductor.config.patch({"cpp.vec_isa_ok": False, "cpp_cache_precompile_headers": False}):
        found = states(qmodel, batch)
    # Fused kernels round float32 otherwise; with these ranges no value lies on the edge of a step.
    assert torch.allclose(found, states(plain, batch), rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_distributed_data_parallel(tmp_path: Path) -> None:
    qmodel = calibrated("bert").train()
    batch = batch_for(qmodel, (3, 6))
    torch.manual_seed(5)
    qmodel(**batch).last_hidden_state.pow(2).sum().backward()
    wanted = {name: p.grad.clone() for name, p in qmodel.named_parameters() if p.grad is not None}
    qmodel.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(qmodel, find_unused_parameters=True)
        torch.manual_seed(5)
        parallel(**batch).last_hidden_state.pow(2).sum().backward()
        assert {name: p.grad for name, p in qmodel.named_parameters() if p.grad is not None}.keys() == wanted.keys()
        assert all(torch.equal(p.grad, wanted[name]) for name, p in qmodel.named_parameters() if name in wanted)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("model_type", ["bert", "mpnet"])
def test_threads_may_share_a_model(model_type: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    qmodel = calibrated(model_type)
    shapes = [(b, t) for b in (1, 2, 3) for t in (3, 5, 7, 9)]
    wanted = [states(qmodel, batch_for(qmodel, shape)) for shape in shapes]
    # A pickle leaves behind what was recorded, so threads record every kind of call at the same time.
    qmodel = pickle.loads(pickle.dumps(qmodel))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda shape: states(qmodel, batch_for(qmodel, shape)), shapes))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_quantization_disabled_restores_what_was() -> None:
    qmodel = calibrated("bert")
    names = list(qs.quantizers(qmodel))
    qs.quantizers(qmodel)[names[0]].disable()
    with pytest.raises(RuntimeError, match="inside"), qs.quantization_disabled(qmodel):  # noqa: PT012
        assert not any(quantizer.enabled for quantizer in qs.quantizers(qmodel).values())
        raise RuntimeError("inside")
    assert [name for name, quantizer in qs.quantizers(qmodel).items() if quantizer._disabled] == names[:1]
    with pytest.raises(qs.ModelError, match="no quantizers"), qs.quantization_disabled(build("bert", "BertModel")):
        pass
