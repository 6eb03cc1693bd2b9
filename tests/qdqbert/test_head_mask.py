"""``head_mask``, against the real QDQBERT to the bit, and what it refuses."""

from __future__ import annotations

import copy
import functools
import threading
from pathlib import Path

import pytest
import torch
from golden_case import Golden, assert_equal, flat, target_of
from torch import Tensor
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.qdqbert.head_mask import head_factors, masked_heads
from reference_cases import HEAD_MASKS


class Masked(Golden):
    """What the real one computes of calls with a ``head_mask``, for QDQBERT's class under its own name."""

    @functools.cached_property
    def first(self) -> PreTrainedModel:
        model = getattr(qs, f"QDQ{self.meta['head']}")(qs.QDQBertConfig(**self.config())).eval()
        missing, unexpected = model.load_state_dict(self.group("weights"), strict=False)
        assert not missing
        assert not unexpected
        return model

    def converted(self) -> PreTrainedModel:
        return copy.deepcopy(self.first)

    def arguments(self) -> dict[str, Tensor]:
        return {**super().arguments(), "head_mask": self.group("head_mask")["head_mask"]}


@pytest.fixture(scope="module", params=[case.name for case in HEAD_MASKS])
def golden(request: pytest.FixtureRequest, reference: Path) -> Masked:
    return Masked(reference / "head_mask" / f"{request.param}.safetensors")


@pytest.fixture(scope="module")
def by_layer(reference: Path) -> Masked:
    return Masked(reference / "head_mask" / "classification-layers.safetensors")


@pytest.mark.usefixtures("threads_of_the_reference")
def test_outputs_are_bit_equal(golden: Masked) -> None:
    output = golden.calibrated()(**golden.arguments(), output_hidden_states=True, output_attentions=True)
    found, wanted = flat(output), golden.group("legacy")
    assert any(name.startswith("attentions.") for name in wanted)
    if "loss" in wanted:
        found["loss"] = target_of(golden, output).detach()
    assert_equal(found, wanted, tolerance=0.0)


@pytest.mark.usefixtures("threads_of_the_reference")
def test_gradients_are_bit_equal_that_of_the_mask_too(golden: Masked) -> None:
    qmodel = golden.calibrated()
    mask = golden.arguments()["head_mask"].requires_grad_()
    target_of(golden, qmodel(**{**golden.arguments(), "head_mask": mask})).backward()
    gradients = {name: p.grad for name, p in qmodel.named_parameters() if p.grad is not None}
    assert_equal(gradients, golden.group("gradients"), tolerance=0.0)
    assert mask.grad is not None
    assert_equal({"gradient": mask.grad}, {"gradient": golden.group("head_mask")["gradient"]}, tolerance=0.0)


def test_without_quantization(golden: Masked) -> None:
    qmodel = golden.calibrated()
    with torch.no_grad(), qs.quantization_disabled(qmodel):
        assert_equal(flat(qmodel(**golden.arguments())), golden.group("float"), tolerance=1e-6)


@pytest.mark.usefixtures("threads_of_the_reference")
def test_cached_step(golden: Masked) -> None:
    wanted = golden.group("cached")
    if not wanted:
        return
    qmodel, given = golden.calibrated(), golden.arguments()
    batch = {name: given.pop(name) for name in ("input_ids", "token_type_ids")}
    rest = {name: value for name, value in given.items() if name not in ("labels", "attention_mask")}
    with torch.no_grad():
        start = {name: value[:, :-1] for name, value in batch.items()}
        cache = qmodel(**start, **rest, use_cache=True).past_key_values
        last = {name: value[:, -1:] for name, value in batch.items()}
        step = qmodel(**last, **rest, past_key_values=cache, use_cache=True)
    assert_equal({"logits": step.logits}, wanted, tolerance=0.0)


def test_the_mask_is_gone_after_the_call_and_after_an_error(by_layer: Masked) -> None:
    qmodel, given = by_layer.calibrated(), by_layer.arguments()
    mask = given.pop("head_mask")
    before = qmodel(**given)[0]
    masked = qmodel(**given, head_mask=mask)[0]
    assert not torch.equal(masked, before)
    assert torch.equal(qmodel(**given)[0], before)
    assert torch.equal(qmodel(**given, head_mask=torch.ones(2))[0], before)
    with pytest.raises(ValueError, match="exactly one of input_ids"):
        qmodel(head_mask=mask)
    assert torch.equal(qmodel(**given)[0], before)
    assert not any(module._forward_pre_hooks for module in qmodel.modules())


def test_the_mask_is_the_calling_thread_s_own(by_layer: Masked) -> None:
    qmodel, given = by_layer.calibrated(), by_layer.arguments()
    mask = given.pop("head_mask")
    before, found = qmodel(**given)[0], []
    encoder = qmodel.base_model.encoder
    with masked_heads(encoder.layer, head_factors(mask, 2, 2, torch.float32)):
        other = threading.Thread(target=lambda: found.append(qmodel(**given)[0]))
        other.start()
        other.join()
        assert not torch.equal(qmodel(**given)[0], before)
    assert torch.equal(found[0], before)


def small(**config: int | str) -> qs.QDQBertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    return qs.QDQBertConfig(**{"vocab_size": 16, "max_position_embeddings": 16, **sizes, **config})


IDS = torch.tensor([[3, 4, 5, 6]])


@pytest.mark.parametrize(
    ("mask", "said"),
    [
        (torch.ones(3), r"shape \(3,\); this model takes \(2,\), .* or \(3, 2\)"),
        (torch.ones(2, 2), r"shape \(2, 2\)"),
        (torch.ones(2, 3), r"shape \(2, 3\)"),
        (torch.ones(()), r"shape \(\)"),
        ([1.0, 0.0], "head_mask is a list; pass a tensor"),
    ],
)
def test_a_wrong_shape_is_said(mask: object, said: str) -> None:
    with pytest.raises(qs.ModelError, match=said):
        qs.QDQBertModel(small())(IDS, head_mask=mask)


def test_rules_without_the_quantizer_are_said() -> None:
    config = small()
    config.quantization_config = {"quant_method": "qdq_surgery", "rules": "linear-only"}
    qmodel = qs.QDQBertModel(config)
    assert not any("matmul" in name for name in qs.quantizers(qmodel))
    qmodel(IDS)
    with pytest.raises(qs.ModelError, match=r"needs the quantizer matmul_a_input_quantizer, .* layer 0's attention"):
        qmodel(IDS, head_mask=torch.ones(2))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
def test_gradient_checkpointing_is_said() -> None:
    qmodel = qs.QDQBertForTokenClassification(small())
    qmodel.gradient_checkpointing_enable()
    qmodel.train()
    with pytest.raises(qs.ModelError, match="turn checkpointing off"):
        qmodel(IDS, head_mask=torch.ones(2))
    qmodel(IDS, labels=IDS % 2).loss.backward()
    qmodel.eval()
    qmodel(IDS, head_mask=torch.ones(2))


def test_a_masked_head_has_no_gradient_in_training() -> None:
    torch.manual_seed(0)
    qmodel = qs.QDQBertModel(small())
    qmodel(IDS, head_mask=torch.tensor([[1.0, 0.0]] * 3)).last_hidden_state.sum().backward()
    weight = qmodel.encoder.layer[1].attention.self.value.weight
    assert weight.grad is not None
    assert float(weight.grad[16:].abs().max()) == 0.0
    assert float(weight.grad[:16].abs().max()) > 0.0


def test_calibration_sees_masked_probabilities() -> None:
    torch.manual_seed(0)
    qmodel = qs.QDQBertModel(small())
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    qs.calibrate(qmodel, [{**batch, "head_mask": torch.tensor([0.25, 0.0])}], method="max")
    quarter = {n: q.amax for n, q in qs.quantizers(qmodel).items() if n.endswith("matmul_a_input_quantizer")}
    assert len(quarter) == 3
    assert all(amax is not None and 0.0 < float(amax) <= 0.25 for amax in quarter.values())


def test_half_precision() -> None:
    qmodel = qs.QDQBertModel(small()).eval().bfloat16()
    output = qmodel(IDS, head_mask=torch.tensor([0.0, 1.0]), output_attentions=True)
    assert output.last_hidden_state.dtype == torch.bfloat16
    assert output.attentions[0].dtype == torch.bfloat16
