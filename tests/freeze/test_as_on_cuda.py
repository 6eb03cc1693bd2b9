"""What a frozen model is on an NVIDIA GPU, on a CPU: its kernel, its types, and its way from one to the other."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for
from frozen_models import apart, calibrated, frozen, outputs
from gpu_kernels import take_kernel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.freeze.linear import IntegerLinear
from qdq_surgery.integers.int_mm import IntMMProduct
from qdq_surgery.integers.onednn import OneDNNProduct
from qdq_surgery.integers.product import Product

#: Sums are exact; their scales are multiplied in another order. A value that then lies on the other side of a half is a
#: step away.
NEAR = 0.05

WARNINGS = "ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning"


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    take_kernel("_int_mm", monkeypatch)
    return monkeypatch


def kinds(model: torch.nn.Module) -> set[type[Product]]:
    return {
        OneDNNProduct if isinstance(each.product, OneDNNProduct) else type(each.product)
        for each in model.modules()
        if isinstance(each, IntegerLinear)
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def in_float(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in found.items()}


def test_it_goes_from_one_kernel_to_the_other_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``to("cuda")`` and ``cpu()`` do: whatever is done to tensors takes the product of where these then are."""
    model = frozen("bert", "openvino", vocab_size=1100)
    batch = batch_for(model, (3, 9))
    wanted, integers = outputs(model, batch), model.state_dict()
    assert kinds(model) == {OneDNNProduct}
    take_kernel("_int_mm", monkeypatch)
    model.to(torch.float32)
    assert kinds(model) == {IntMMProduct}
    assert apart(outputs(model, batch), wanted) < NEAR
    assert same(dict(model.state_dict()), dict(integers))
    monkeypatch.undo()
    model.cpu()
    assert kinds(model) == {OneDNNProduct}
    assert same(outputs(model, batch), wanted)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("first", ["oneDNN", "_int_mm"])
def test_a_pickle_of_one_loads_on_the_other(
    first: str, again: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        take_kernel(first, patch)
        model = frozen(num_hidden_layers=1)
        batch = batch_for(model, (3, 9))
        wanted, before = outputs(model, batch), kinds(model)
        assert same(outputs(again(model), batch), wanted)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
    take_kernel("_int_mm" if first == "oneDNN" else "oneDNN", monkeypatch)
    for other in (again(model), torch.load(file, weights_only=False)):
        assert kinds(other) == {OneDNNProduct, IntMMProduct} - before
        assert apart(outputs(other, batch), wanted) < NEAR


@pytest.mark.usefixtures("as_on_cuda")
def test_copies_share_their_integers_and_go_on_alone() -> None:
    model = frozen(num_hidden_layers=1)
    again = copy.deepcopy(model)
    one, other = (each.get_submodule("encoder.layer.0.output.dense") for each in (model, again))
    assert one.product is other.product
    batch = batch_for(model, (3, 9))
    wanted = outputs(model, batch)
    again.to(torch.float16)
    assert (one.dtype, other.dtype) == (torch.float32, torch.float16)
    assert one.scale.dtype == other.scale.dtype == torch.float32
    assert same(outputs(model, batch), wanted)


@pytest.mark.parametrize("first", ["oneDNN", "_int_mm"])
def test_a_folder_of_one_loads_on_the_other(first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = [tmp_path / "one", tmp_path / "other"]
    with monkeypatch.context() as patch:
        take_kernel(first, patch)
        model = frozen("bert", "openvino", vocab_size=1100, num_hidden_layers=1)
        batch = batch_for(model, (3, 9))
        wanted, before = outputs(model, batch), kinds(model)
        model.save_pretrained(folders[0])
    take_kernel("_int_mm" if first == "oneDNN" else "oneDNN", monkeypatch)
    again: PreTrainedModel = AutoModel.from_pretrained(folders[0], attn_implementation="eager")
    assert kinds(again) == {OneDNNProduct, IntMMProduct} - before
    assert apart(outputs(again, batch), wanted) < NEAR
    again.save_pretrained(folders[1])
    assert same(*(load_file(folder / "model.safetensors") for folder in folders))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("as_on_cuda")
def test_the_rest_in_half_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    """All but the integer products is rounded to 8 bits, or to 11: the two agree as far as that goes."""
    qmodel = calibrated("bert", "pytorch", vocab_size=1100)
    batch = batch_for(qmodel, (3, 8))
    wanted = outputs(qmodel, batch)
    model = qs.freeze(qmodel.to(dtype))
    found = outputs(model, batch)
    assert found["last_hidden_state"].dtype == dtype
    assert apart(in_float(found), wanted) < NEAR
    later = qs.freeze(qmodel.float()).to(dtype)
    assert apart(in_float(outputs(later, batch)), wanted) < NEAR
    model.save_pretrained(tmp_path)
    again: PreTrainedModel = AutoModel.from_pretrained(tmp_path, attn_implementation="eager")
    assert again.dtype == dtype
    assert same(outputs(again, batch), found)


def test_half_precision_of_a_gpu_is_not_for_a_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patch:
        take_kernel("_int_mm", patch)
        model = frozen(num_hidden_layers=1).to(torch.float16)
        model.save_pretrained(tmp_path)
    with pytest.raises(qs.ModelError, match=r"to be torch.float16 on cpu: their results are float32 or bfloat16, not"):
        model.cpu()
    with pytest.raises(
        qs.ModelError, match=r"does not run here: .* not float16; load it on another device or in anoth"
    ):
        AutoModel.from_pretrained(tmp_path)
    assert kinds(model.to(torch.float32)) == {OneDNNProduct}
    assert kinds(AutoModel.from_pretrained(tmp_path, dtype=torch.float32)) == {OneDNNProduct}


def test_the_receipt_names_the_kernel_and_counts_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that the kernel is filled up with are no work of the model's."""
    shape = 1, 5
    wanted = qs.frozen_receipt(frozen("bert", "pytorch"), shape=shape)
    take_kernel("_int_mm", monkeypatch)
    found = qs.frozen_receipt(frozen("bert", "pytorch"), shape=shape)
    assert [(each.name, each.macs, each.int8) for each in found.gemms] == [
        (each.name, each.macs, each.int8) for each in wanted.gemms
    ]
    assert found.linear == 1.0
    assert {each.executed for each in found.gemms if each.int8} == {
        "torch._int_mm, int8 -> float32",
        "torch._int_mm, int8 -> float32, gelu",
    }
    assert {each.executed for each in wanted.gemms if each.int8} == {
        "oneDNN int8, uint8 -> float32",
        "oneDNN int8, uint8 -> uint8, gelu",
    }
    assert len(found.steps) == len(wanted.steps) + 2  # of two layers


@pytest.mark.filterwarnings(*WARNINGS)
@pytest.mark.usefixtures("as_on_cuda")
@torch.no_grad()
def test_compiled_it_is_one_graph_of_torch_s_operators() -> None:
    model = frozen("bert", "qdqbert", num_hidden_layers=1)
    batch = batch_for(model, (3, 9))
    wanted = outputs(model, batch)
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, examples: Any) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        made: Callable[..., Any] = torch._dynamo.lookup_backend("aot_eager")(graph, examples)
        return made

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=look, fullgraph=True)
    assert apart(dict(compiled(**batch)), wanted) < NEAR
    assert sum("int_mm" in name for name in seen) == 6
    assert not [name for name in seen if "qdq_surgery" in name]
    # CUDA graphs leave in its place what is known not to change.
    linear: Any = model.get_submodule("encoder.layer.0.output.dense")
    assert all(hasattr(each, "_dynamo_static_input_type") for each in linear.product.buffers().values())


@pytest.mark.usefixtures("as_on_cuda")
def test_on_no_other_device() -> None:
    model = frozen(num_hidden_layers=1)
    with pytest.raises(
        qs.ModelError, match="on meta: integer products run on a CPU or an NVIDIA GPU, not on meta; use"
    ):
        model.to("meta")
    assert kinds(model) == {IntMMProduct}
