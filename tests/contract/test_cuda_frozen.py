"""Frozen models on an NVIDIA GPU. Skipped without one: ``pytest tests/contract/test_cuda_frozen.py`` on one.

What needs no GPU of it is tested on a CPU, by tests/integers/test_int_mm.py and tests/freeze/test_as_on_cuda.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import ARCHITECTURES, batch_for
from frozen_models import apart, calibrated, frozen, outputs
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.freeze.linear import IntegerLinear
from qdq_surgery.integers.choice import PRODUCTS, product_on, unsupported
from qdq_surgery.integers.int_mm import IntMMProduct
from qdq_surgery.integers.onednn import OneDNNProduct
from qdq_surgery.integers.product import Product
from qdq_surgery.integers.triton_product import TritonProduct, to_integers

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    # Said by torch of float32 products, which are not to be rounded here.
    pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores:UserWarning"),
    pytest.mark.filterwarnings("ignore:Not enough SMs:UserWarning"),
]

#: Each value at a tie is off by one step of its grid, so by less than rounding itself costs.
NEAR = 0.05


@pytest.fixture(autouse=True)
def float32_products_in_float32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in batch.items()}


def here(model: PreTrainedModel, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What it gives on the GPU, on the CPU and in float32."""
    return {name: value.float().cpu() for name, value in outputs(model, on_gpu(batch)).items()}


def kinds(model: torch.nn.Module) -> set[type]:
    return {
        OneDNNProduct if isinstance(each.product, OneDNNProduct) else type(each.product)
        for each in model.modules()
        if isinstance(each, IntegerLinear)
    }


def devices(model: torch.nn.Module) -> set[str]:
    return {each.device.type for each in (*model.parameters(), *model.buffers())}


def on_cuda() -> type[Product]:
    """The kind of product that models have here."""
    return product_on(torch.device("cuda"))


#: Each kind of product that runs here; Triton's on Hopper GPUs.
BOTH: list[type[Product]] = [IntMMProduct, TritonProduct]


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> type[Product]:
    found: type[Product] = request.param
    if not found.suits(torch.device("cuda")):
        pytest.skip(f"{found.kernel} is not for this GPU")
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_kernel_is_right(dtype: torch.dtype) -> None:
    assert unsupported(torch.device("cuda"), dtype) is None
    assert on_cuda() is (TritonProduct if TritonProduct.suits(torch.device("cuda")) else IntMMProduct)


@pytest.mark.parametrize("kind", BOTH, indirect=True)
@pytest.mark.parametrize("zero_point", [0, 32, 128])
@pytest.mark.parametrize(
    ("inner", "outer"), [(768, 768), (768, 2), (3072, 768), (768, 3072), (48, 24), (13, 9), (1, 1)]
)
def test_sums_are_those_of_the_cpu_to_the_integer(inner: int, outer: int, zero_point: int, kind: type[Product]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (outer, inner), generator=generator).to(torch.int8)
    one = torch.ones(outer), torch.tensor(1.0)
    product = kind(weight.cuda(), *(each.cuda() for each in one), zero_point)
    for rows in (0, *range(1, 41), 128, 513, 1000):
        stored = torch.randint(0, 256, (rows, inner), generator=generator)
        wanted = ((stored.int() - zero_point) @ weight.int().t()).float()
        found = product((stored - 128).to(torch.int8).cuda(), None, torch.float32, "")
        assert torch.equal(found.cpu(), wanted), rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("activation", ["", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("zero_point", [32, 128])
@pytest.mark.parametrize("kind", BOTH, indirect=True)
def test_scales_bias_and_activations_are_those_of_the_cpu(
    kind: type[Product], zero_point: int, activation: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (24, 48), generator=generator).to(torch.int8)
    given = torch.randint(-128, 128, (40, 48), generator=generator).to(torch.int8)
    scale, step, bias = (
        torch.rand(24, generator=generator) + 0.5,
        torch.tensor(0.0005),
        torch.randn(24, generator=generator),
    )
    product = kind(*(each.cuda() for each in (weight, scale, step)), zero_point)
    for added in (bias.to(dtype), None):
        wanted = IntMMProduct(weight, scale, step, zero_point)(given, added, dtype, activation)
        found = product(given.cuda(), None if added is None else added.cuda(), dtype, activation)
        assert found.dtype == dtype
        # The last bit in front of the activation, of which a GELU of negative values makes several.
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(found.cpu(), wanted, rtol=2 * eps, atol=0.2 * eps + 2e-6)


@pytest.mark.parametrize("activation", ["", "relu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("channels", [False, True])
def test_a_product_rounds_for_the_next(channels: bool, activation: str) -> None:
    """Integers are one apart at most, and few are: a value may lie between two to the last bit."""
    if on_cuda() is not TritonProduct:
        pytest.skip("torch._int_mm does not round")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-128, 128, (200, 768), generator=generator).to(torch.int8)
    given = torch.randint(-128, 128, (600, 768), generator=generator).to(torch.int8)
    scale, step, bias = torch.rand(200, generator=generator) + 0.5, torch.tensor(2e-5), torch.randn(200)
    product = TritonProduct(*(each.cuda() for each in (weight, scale, step)), 128)
    values = IntMMProduct(weight, scale, step, 128)(given, bias, torch.float32, activation)
    factor = torch.rand(200, generator=generator) * 40 if channels else torch.tensor(20.0)
    for zero_point in (32, 128, 0):
        wanted = ((values * factor).round() + zero_point).clamp(0, 255) - 128
        off = product.rounded(given.cuda(), bias.cuda(), activation, factor.cuda(), zero_point).cpu().float() - wanted
        assert off.abs().max() <= 1
        assert (off != 0).float().mean() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (7, 3, 5), (600, 768)])
def test_rounding_in_one_pass_is_that_of_the_cpu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if on_cuda() is not TritonProduct:
        pytest.skip("torch's own operators round")
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 40).to(dtype)
    values.view(-1)[:3] = torch.tensor([0.5, -1.5, 2.5])[: values.numel()]
    for factor in (torch.tensor(1.0), torch.rand(shape[-1], generator=torch.Generator().manual_seed(1)) + 0.5):
        for turned in (values, values.transpose(0, -1).contiguous().transpose(0, -1)):
            wanted = ((turned.float() * factor).round().clamp(-32, 95) - 5).to(torch.int8)
            assert torch.equal(to_integers(turned.cuda(), factor.cuda(), -32, 95, -5).cpu(), wanted)


@pytest.mark.parametrize("rules", ["pytorch", "openvino", "qdqbert", "qdqbert-scaled"])
def test_activations_become_the_integers_of_the_cpu(rules: str) -> None:
    model = frozen("bert", rules)
    values = torch.randn(7, 5, 48, generator=torch.Generator().manual_seed(0)) * 3
    for linear in (each for each in model.modules() if isinstance(each, IntegerLinear)):
        grid, there = linear.input_grid, copy.deepcopy(linear.input_grid).cuda()
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = values[..., : linear.in_features].to(dtype)
            given = given.abs() if grid.never_negative else given
            assert torch.equal(there(given.cuda()).cpu(), grid(given))
            there.stored = torch.int8
            for there.in_one_pass in (None, on_cuda().rounding()):
                assert torch.equal(there(given.cuda()).cpu().int() + 128, grid(given).int())
            there.stored, there.in_one_pass = torch.uint8, None


#: Every architecture with the fullest rules, and the other rule sets where code differs.
CASES = [
    *(("qdqbert", each.model_type) for each in ARCHITECTURES),
    *(("openvino", each) for each in ("bert", "modernbert")),
    *(("pytorch", each) for each in ("bert", "electra", "deberta-v2")),
]


@pytest.mark.parametrize(("rules", "model_type"), CASES)
def test_it_computes_what_fake_quantization_does(rules: str, model_type: str) -> None:
    qmodel = calibrated(model_type, rules).cuda()
    model = qs.freeze(qmodel)
    assert kinds(model) == {on_cuda()}
    assert devices(model) == {"cuda"}
    for shape in ((3, 8), (1, 3), (4, 20)):
        batch = batch_for(qmodel, shape)
        assert apart(here(model, batch), here(qmodel, batch)) < NEAR
    receipt = qs.frozen_receipt(model, shape=(1, 8))
    assert receipt.linear == 1.0
    assert all(each.executed.startswith(f"{on_cuda().kernel}, int8 -> ") for each in receipt.gemms if each.int8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rest_in_half_precision(dtype: torch.dtype) -> None:
    qmodel = calibrated("bert", "pytorch").cuda()
    batch = batch_for(qmodel, (3, 8))
    wanted = here(qmodel, batch)
    for model in (qs.freeze(copy.deepcopy(qmodel).to(dtype)), qs.freeze(qmodel).to(dtype)):
        assert outputs(model, on_gpu(batch))["last_hidden_state"].dtype == dtype
        assert apart(here(model, batch), wanted) < NEAR


def test_a_product_hands_integers_to_the_next() -> None:
    """In every layer of a BERT that of the feed-forward network's first linear, where Triton rounds."""
    model = qs.freeze(calibrated("bert", "pytorch").cuda())
    receipt = qs.frozen_receipt(model, shape=(2, 8))
    handed = [each.name for each in receipt.gemms if "int8 -> int8" in each.executed]
    assert len(handed) == (model.config.num_hidden_layers if on_cuda() is TritonProduct else 0)


def test_it_moves_there_and_back() -> None:
    model = frozen("bert", "pytorch", vocab_size=1100)
    batch = batch_for(model, (3, 8))
    wanted = outputs(model, batch)
    model.cuda()
    assert kinds(model) == {on_cuda()}
    assert devices(model) == {"cuda"}
    assert apart(here(model, batch), wanted) < NEAR
    model.cpu()
    assert kinds(model) == {OneDNNProduct}
    assert devices(model) == {"cpu"}
    assert all(torch.equal(wanted[name], value) for name, value in outputs(model, batch).items())
    with pytest.raises(qs.ModelError, match="their results are float32 or bfloat16, not float16"):
        model.to("cuda", torch.float16).cpu()


def test_files_and_pickles_of_one_load_on_the_other(tmp_path: Path) -> None:
    model = frozen("bert", "pytorch", vocab_size=1100)
    batch = batch_for(model, (3, 8))
    wanted = outputs(model, batch)
    model.save_pretrained(tmp_path / "cpu")
    file = io.BytesIO()
    torch.save(model, file)
    there = copy.deepcopy(model).cuda()
    there.save_pretrained(tmp_path / "cuda")
    from_gpu = io.BytesIO()
    torch.save(there, from_gpu)
    for each in (file, from_gpu):
        for place, kind in (("cuda", on_cuda()), ("cpu", OneDNNProduct)):
            each.seek(0)
            again: Any = torch.load(each, weights_only=False, map_location=place)
            assert kinds(again) == {kind}
            assert devices(again) == {place}
            found = here(again, batch) if place == "cuda" else outputs(again, batch)
            assert apart(found, wanted) < NEAR
    assert kinds(pickle.loads(pickle.dumps(there))) == {on_cuda()}
    for folder in ("cpu", "cuda"):
        placed = AutoModel.from_pretrained(tmp_path / folder, attn_implementation="eager", device_map="cuda")
        assert kinds(placed) == {on_cuda()}
        assert devices(placed) == {"cuda"}
        assert apart(here(placed, batch), wanted) < NEAR
        half = AutoModel.from_pretrained(tmp_path / folder, device_map="cuda", dtype=torch.float16)
        assert apart(here(half, batch), wanted) < NEAR


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("taken", BOTH, ids=["_int_mm", "Triton"])
@torch.no_grad()
def test_compiled(taken: type[Product], dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRODUCTS, "cuda", (taken,))
    model = qs.freeze(calibrated("bert", "pytorch").to("cuda", dtype))
    batch = batch_for(model, (3, 8))
    wanted = here(model, batch)
    torch._dynamo.reset()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    for _ in range(3):
        found = {name: value.float().cpu() for name, value in dict(compiled(**on_gpu(batch))).items()}
    assert apart(found, wanted) < NEAR


@pytest.mark.parametrize("taken", BOTH, ids=["_int_mm", "Triton"])
def test_a_forward_can_be_a_cuda_graph(taken: type[Product], monkeypatch: pytest.MonkeyPatch) -> None:
    """So nothing in it waits for the GPU."""
    monkeypatch.setitem(PRODUCTS, "cuda", (taken,))
    model = qs.freeze(calibrated("bert", "openvino").cuda())
    assert kinds(model) == {taken}
    # The encoder: what transformers does with a mask before it copies from the CPU, which no graph can hold.
    encoder: Any = model.encoder
    states = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0)).cuda()
    stream = torch.cuda.Stream()
    with torch.no_grad():
        wanted = encoder(states).last_hidden_state
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                encoder(states)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = encoder(states).last_hidden_state
        graph.replay()
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)


def test_weights_take_a_quarter_of_float32() -> None:
    qmodel = calibrated("bert", "linear-only", hidden_size=256, intermediate_size=1024, num_hidden_layers=2)
    model = qs.freeze(qmodel.cuda())
    integers = sum(each.product.nbytes for each in model.modules() if isinstance(each, IntegerLinear))
    whole = sum(each.numel() * each.element_size() for name, each in model.named_buffers() if "encoder" in name)
    assert integers == 2 * (4 * 256 * 256 + 2 * 256 * 1024)
    assert whole < 1.05 * integers
