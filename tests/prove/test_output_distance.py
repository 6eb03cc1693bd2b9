"""How far a runtime's outputs may be: chance is not refused, however few numbers there are, and a worse runtime is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.errors import ParityError
from qdq_surgery.prove.output_distance import Distances, Texts, distances, joined, other_texts, together

pytest.importorskip("onnxruntime")

from exported import exported

from qdq_surgery.prove import parity
from qdq_surgery.serve.intermediates import Runtime, probe
from qdq_surgery.surgery.model_state import quantization_disabled


def of_errors(theirs: NDArray[Any], ours: NDArray[Any]) -> Distances:
    """Of what a runtime and PyTorch are off the float model by, (rows, outputs)."""
    floating = np.zeros_like(ours)
    return distances({"a": theirs}, {"a": ours}, {"a": floating}, np.ones(len(ours), dtype=bool))["a"]


# --- the verdict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3, 200])
def test_equally_large_errors_are_chance(outputs: int) -> None:
    """Of a thousand files that are as good as PyTorch, but wrong elsewhere, less than one in two hundred is refused."""
    random = np.random.default_rng(outputs)
    refused = 0
    for _ in range(1000):
        theirs, ours = random.standard_normal((2, 64, outputs)) * random.lognormal(0, 1, (1, 64, 1))
        found = of_errors(theirs, ours)
        refused += not (found.near or found.explained)
    assert refused < 5


@pytest.mark.parametrize(("outputs", "times"), [(1, 4.0), (3, 2.0), (200, 1.3)])
def test_larger_errors_are_not(outputs: int, times: float) -> None:
    """The more numbers, the less it takes; more than 95 of 100 are refused."""
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(200):
        theirs, ours = random.standard_normal((2, 64, outputs))
        found = of_errors(times * theirs, ours)
        refused += not (found.near or found.explained)
    assert refused > 190


@pytest.mark.parametrize(("times", "explained"), [(10.0, True), (30.0, False), (1e7, False)])
def test_one_text_that_is_off(times: float, explained: bool) -> None:
    """A tie that turns a logit round is chance, while the others agree; what is beyond any tie is not."""
    ours = np.ones((32, 3))
    theirs = ours.copy()
    theirs[5] = times
    found = of_errors(theirs, ours)
    assert not found.near
    assert found.explained is explained


@pytest.mark.parametrize("rows", [1, 2, 15, 64])
@pytest.mark.parametrize("few", [1, 9])
def test_garbage_of_few_texts_is_no_chance(rows: int, few: int) -> None:
    """So few standard errors as there are texts that are off, at most: that alone would let any of them pass."""
    ours = np.random.default_rng(0).standard_normal((rows, 3))
    theirs = ours.copy()
    theirs[:few] += 100.0
    found = of_errors(theirs, ours)
    assert [found.near, found.explained] == [False, False]


@pytest.mark.parametrize(("times", "explained"), [(2.0, True), (4.0, False)])
def test_of_few_texts_much_is_chance(times: float, explained: bool) -> None:
    ours = np.ones((2, 3))
    assert of_errors(times * ours, ours).explained is explained


@pytest.mark.parametrize("rows", [2, 32])
@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_no_number_is_no_chance(what: float, rows: int) -> None:
    ours = np.ones((rows, 3))
    theirs = ours.copy()
    theirs[0, 0] = what
    with np.errstate(invalid="ignore"):
        found = of_errors(theirs, ours)
        assert not found.near
        assert not found.explained


def test_where_quantization_changes_nothing() -> None:
    nothing = np.zeros((32, 3))
    same, off = of_errors(nothing, nothing), of_errors(nothing + 1e-3, nothing)
    assert (same.near, same.share, same.nearness) == (True, 0.0, 1.0)
    assert not off.near
    assert not off.explained


def test_each_text_has_its_own_distance() -> None:
    """Of each output; one that has no entry for each text has one."""
    found = {"tokens": np.full((2, 3, 1), 2.0), "all": np.array(5.0)}
    wanted = {"tokens": np.ones((2, 3, 1)), "all": np.array(3.0)}
    zero = {"tokens": np.zeros((2, 3, 1)), "all": np.array(0.0)}
    made = distances(found, wanted, zero, np.array([True, True]))
    assert [made["tokens"].apart.tolist(), made["all"].apart.tolist()] == [[3, 3], [4]]
    assert [made["tokens"].change.tolist(), made["all"].change.tolist()] == [[3, 3], [9]]
    assert [made["tokens"].error.tolist(), made["all"].error.tolist()] == [[12, 12], [25]]
    assert joined([made["tokens"], made["tokens"]]).error.tolist() == [12] * 4
    assert joined([made["tokens"]] * 2).nearness == made["tokens"].nearness == 2.0
    some = distances(found, wanted, zero, np.array([True, False]))
    assert [some["tokens"].error.tolist(), some["all"].error.tolist()] == [[12], [25]]


# --- other texts ----------------------------------------------------------------------------------------------------


@given(rows=st.integers(1, 70), tokens=st.integers(1, 9), seed=st.integers(0, 5), choices=st.sampled_from([0, 2]))
def test_they_are_the_same_tokens(rows: int, tokens: int, seed: int, choices: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (rows, choices, tokens) if choices else (rows, tokens)
    ids, mask = (torch.randint(low, high, size, generator=generator) for low, high in ((3, 60), (0, 2)))
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    first, *found = other_texts(inputs)
    assert first.inputs is inputs
    assert (len(found) + 1) * rows >= 64
    assert len(found) * rows < 64
    for each in found:
        assert each.inputs.keys() == inputs.keys()
        assert each.inputs["attention_mask"] is mask
        assert torch.equal(each.inputs["input_ids"].sort(-1).values, ids.sort(-1).values)
        assert torch.equal(each.inputs["input_ids"][mask == 0], ids[mask == 0])
    rows_seen = [
        (tuple(ids.flatten().tolist()), tuple(own.flatten().tolist()))
        for each in (first, *found)
        for ids, own, new in zip(each.inputs["input_ids"], mask, each.new, strict=True)
        if new
    ]
    assert len(set(rows_seen)) == len(rows_seen)


def test_they_are_others_and_the_same_each_time() -> None:
    inputs = {"input_ids": torch.arange(60).reshape(2, 30)}
    found = [each.inputs["input_ids"] for each in other_texts(inputs)]
    assert len({tuple(each.flatten().tolist()) for each in found}) == 32
    again = other_texts(inputs)
    assert all(torch.equal(one, two.inputs["input_ids"]) for one, two in zip(found, again, strict=True))


@pytest.mark.parametrize(("ids", "count"), [([[7] * 9], 1), ([[7] * 9] * 2, 1), ([[1, 2]], 2), ([[1, 2, 3]], 6)])
def test_a_text_counts_once(ids: list[list[int]], count: int) -> None:
    """Of one token again and again there is one order."""
    found = list(other_texts({"input_ids": torch.tensor(ids)}))
    assert sum(int(each.new.sum()) for each in found) == count


def test_numbers_for_each_text_are_part_of_it() -> None:
    """One for each row, in whatever type; and an empty axis."""
    ids, own = torch.tensor([[7, 7], [7, 7]]), torch.tensor([0, 1])
    more = {"own": own, "flags": own.bool(), "half": own.bfloat16(), "none": torch.zeros(2, 0)}
    first, *others = other_texts({"input_ids": ids, **more})
    assert first.new.tolist() == [True, True]
    assert not any(each.new.any() for each in others)


@pytest.mark.parametrize(("tokens", "texts"), [(8, 64), (512, 64), (1024, 32), (8192, 16)])
def test_of_long_texts_there_are_fewer(tokens: int, texts: int) -> None:
    found = list(other_texts({"input_ids": torch.arange(tokens)[None]}))
    assert len(found) == texts
    runs = list(together(found[1:]))
    assert sum(len(each.new) for each in runs) == texts - 1
    assert all(each.inputs["input_ids"].numel() <= max(4096, tokens) for each in runs)


def test_states_are_texts_and_images_are_not() -> None:
    states = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_() * 2
    _, first, *_ = other_texts({"inputs_embeds": states})
    assert not torch.equal(first.inputs["inputs_embeds"], states)
    assert torch.equal(first.inputs["inputs_embeds"].sort(1).values, states.sort(1).values)
    assert len(list(other_texts({"pixel_values": torch.zeros(2, 3, 4, 4)}))) == 1


def test_both_texts_of_an_encoder_decoder_are_others() -> None:
    inputs = {"input_ids": torch.arange(60).reshape(2, 30), "decoder_input_ids": torch.arange(40).reshape(2, 20)}
    _, first, *_ = other_texts(inputs)
    assert not any(torch.equal(first.inputs[name], inputs[name]) for name in inputs)


def test_batches_become_one() -> None:
    batch: dict[str, Any] = {"input_ids": torch.zeros(2, 3), "position_ids": torch.zeros(1, 3), "use_cache": False}
    parts = [
        Texts(batch, np.array([True, False])),
        Texts({**batch, "input_ids": torch.ones(2, 3)}, np.array([True] * 2)),
    ]
    [made] = together(parts)
    assert made.inputs["input_ids"].tolist() == [[0] * 3] * 2 + [[1] * 3] * 2
    assert made.inputs["position_ids"] is batch["position_ids"]
    assert made.inputs["use_cache"] is False
    assert made.new.tolist() == [True, False, True, True]
    assert list(together([])) == []


# --- files ----------------------------------------------------------------------------------------------------------


#: Files of two logits that other tests use, too, by whether batch and sequence are open.
FILES: dict[bool, tuple[str, dict[str, Any]]] = {
    True: ("BertForSequenceClassification", {"rules": "qdqbert"}),
    False: ("BertForNextSentencePrediction", {"dynamic": False}),
}


@pytest.fixture
def written(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, Path]:
    head, options = FILES[getattr(request, "param", True)]
    qmodel, file = exported("bert", head, num_hidden_layers=1, **options)
    return qmodel, file.path


def pair(seed: int) -> dict[str, torch.Tensor]:
    """Texts of the sizes that a file with fixed shapes is made with."""
    ids = torch.randint(3, 60, (2, 21), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}


def off_by(model: PreTrainedModel, times: float, asked: list[int]) -> Any:
    """A runtime whose optimized outputs are off by so many times what quantization changes, at other texts."""

    def probed(file: Any, inputs: Mapping[str, Any], values: Any, runtime: Runtime) -> dict[str, NDArray[Any]]:
        found = probe(file, inputs, values, runtime)
        if not runtime.optimized or values:
            return found
        asked.append(len(inputs["input_ids"]))
        with torch.no_grad():
            given = {name: torch.from_numpy(value) for name, value in inputs.items()}
            wanted = model(**given).logits
            with quantization_disabled(model):
                floating = model(**given).logits
        return {"logits": (floating + times * (floating - wanted).flip(0)).numpy()}

    return probed


@pytest.mark.parametrize(("written", "asked_for"), [(True, [2, 62]), (False, [2] * 32)], indirect=["written"])
def test_no_pair_of_texts_refuses_a_good_classifier(
    written: tuple[PreTrainedModel, Path], asked_for: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of its few logits: more texts are asked for, at once where the file takes them."""
    classifier, path = written
    for seed in range(2):
        asked: list[int] = []
        monkeypatch.setattr(parity, "probe", off_by(classifier, 1.2, asked))
        found = [check for check in qs.certify(classifier, path, pair(seed)).checks if not check.sites]
        assert [check.words() for check in found] == ["agrees"]
        assert [check.error for check in found] == [pytest.approx(1.2, rel=1e-3)]
        assert asked == asked_for


def test_a_worse_runtime_is_refused(written: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    classifier, path = written
    monkeypatch.setattr(parity, "probe", off_by(classifier, 3.0, []))
    for seed in range(3):
        with pytest.raises(ParityError, match="from the float model by"):
            qs.certify(classifier, path, pair(seed)).require()


def test_an_output_is_judged_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small one with its sign turned round, beside a large one that agrees."""
    qmodel, file = exported("bert", "BertForPreTraining", rules="qdqbert", num_hidden_layers=1)
    assert qs.certify(qmodel, file.path, pair(0)).agrees

    def turned(file: Any, inputs: Mapping[str, Any], values: Any, runtime: Runtime) -> dict[str, NDArray[Any]]:
        found = probe(file, inputs, values, runtime)
        if runtime.optimized and not values:
            found["seq_relationship_logits"] = -found["seq_relationship_logits"]
        return found

    monkeypatch.setattr(parity, "probe", turned)
    assert not qs.certify(qmodel, file.path, pair(0)).agrees


def test_garbage_in_a_padded_text_is_refused(
    written: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, path = written
    inputs = {name: torch.cat([value] * 4) for name, value in pair(0).items()}
    inputs["attention_mask"][3, 5:] = 0

    def broken(file: Any, given: Mapping[str, Any], values: Any, runtime: Runtime) -> dict[str, NDArray[Any]]:
        found = probe(file, given, values, runtime)
        if runtime.optimized and not values:
            found["logits"] = found["logits"] + 100 * (given["attention_mask"].min(1, keepdims=True) == 0)
        return found

    monkeypatch.setattr(parity, "probe", broken)
    assert not qs.certify(classifier, path, inputs).agrees


@pytest.mark.parametrize("what", [np.nan, np.inf])
def test_outputs_that_are_no_numbers_are_refused(
    what: float, written: tuple[PreTrainedModel, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    classifier, path = written

    def broken(file: Any, given: Mapping[str, Any], values: Any, runtime: Runtime) -> dict[str, NDArray[Any]]:
        found = probe(file, given, values, runtime)
        if runtime.optimized and not values:
            found["logits"] = np.full_like(found["logits"], what)
        return found

    monkeypatch.setattr(parity, "probe", broken)
    with np.errstate(invalid="ignore"):
        assert not qs.certify(classifier, path, pair(0)).agrees
