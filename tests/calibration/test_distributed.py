"""Two processes, each with its own data: the same ranges in both, to the bit those of one process with all data."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
from architectures import build
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import qdq_surgery as qs
from qdq_surgery.calibration.distributed import agree, gather_histograms, gather_maxima, gather_moments, gather_sums
from qdq_surgery.numerics.histogram import Histogram
from qdq_surgery.numerics.range_choice import method_names
from qdq_surgery.rules.quant_spec import CalibratorSpec, QuantSpec
from qdq_surgery.rules.spec import Place

Batch = dict[str, Any]

#: Seconds after which two processes are said to hang. They take five on a quiet machine, most of it for imports.
PATIENCE = 150.0

MASK = torch.tensor([[1] * 8, [1] * 5 + [0] * 3, [1] * 8, [1] * 3 + [0] * 5])
BATCHES: list[Batch] = [
    {
        "input_ids": torch.randint(3, 60, (4, 8), generator=torch.Generator().manual_seed(seed)),
        "attention_mask": MASK,
    }
    for seed in range(3)
]

#: How the batches are dealt out, by rank.
SHARES = {"two-and-one": ([0, 2], [1]), "one-and-two": ([1], [0, 2])}


@functools.cache
def _model_of(head: str, **options: Any) -> PreTrainedModel:
    rules = qs.load_rules("qdqbert")
    spec = QuantSpec(calibrator=CalibratorSpec("histogram", num_bins=128))
    values = next(rule for rule in qs.load_rules("qdqbert-scaled").rules if rule.name == "attention-output")
    values = dataclasses.replace(values, quantize={"x": Place("hardly-negative")})
    low = dataclasses.replace(spec, unsigned=True, zero_point=100)
    specs = {**rules.specs, "activation": spec, "hardly-negative": low}
    return qs.convert(
        build("bert", head, num_hidden_layers=1, **options),
        dataclasses.replace(rules, specs=specs, rules=(values, *rules.rules)),
        inplace=True,
    )


def model_of(head: str = "BertModel", **options: Any) -> PreTrainedModel:
    """With 256 bins, so that entropy and mse take no time; a copy, as conversion takes longer."""
    return copy.deepcopy(_model_of(head, **options))


def ranges(qmodel: torch.nn.Module) -> dict[str, Tensor]:
    return {name: each.amax.detach().clone() for name, each in qs.quantizers(qmodel).items() if each.amax is not None}


# What runs in each process: a name for each, as spawned processes import this file ------------------------------------


def all_methods(rank: int, world: int) -> dict[str, Any]:
    """Ranges by every method, for both ways to deal the batches out."""
    del world
    qmodel = model_of()
    found: dict[str, Any] = {}
    for name, shares in SHARES.items():
        seen = qs.collect(qmodel, [BATCHES[index] for index in shares[rank]])
        found[name] = (seen.batches, seen.rows, seen.tokens)
        for method in method_names():
            qs.calibrate(qmodel, seen, method)
            found[f"{name} {method}"] = ranges(qmodel)
    # From batches, not from statistics: max, without histograms.
    qs.calibrate(qmodel, [BATCHES[index] for index in SHARES["two-and-one"][rank]], "max")
    found["batches max"] = ranges(qmodel)
    return found


def none_in_one(rank: int, world: int) -> str:
    """The second process has no batches."""
    del world
    qmodel = model_of()
    return message(lambda: qs.calibrate(qmodel, BATCHES if rank == 0 else [], "max"), qmodel)


def nan_in_one(rank: int, world: int) -> str:
    """A NaN in the second process's second batch."""
    del world
    qmodel = model_of()
    embeds = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(rank))
    bad = embeds.clone()
    if rank == 1:
        bad[0, 0, 0] = math.nan
    return message(lambda: qs.calibrate(qmodel, [{"inputs_embeds": embeds}, {"inputs_embeds": bad}], "best"), qmodel)


def cross_attention_in_one(rank: int, world: int) -> str:
    """Only the first process brings what the cross-attention attends to: that is enough for all."""
    del world
    qmodel = model_of("BertLMHeadModel", is_decoder=True, add_cross_attention=True)
    batch = dict(BATCHES[rank])
    if rank == 0:
        batch["encoder_hidden_states"] = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(0))
    words = message(lambda: qs.calibrate(qmodel, [batch], "best"), qmodel)
    return f"{words} {sum(float(amax.double().sum()) for amax in ranges(qmodel).values())!r}"


def message(call: Callable[[], Any], qmodel: torch.nn.Module) -> str:
    """The kind and text of the error, and how many ranges there are."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error} [{len(ranges(qmodel))} ranges]"
    return f"fine [{len(ranges(qmodel))} ranges]"


def train_a_step(rank: int, world: int) -> dict[str, Any]:
    """Two steps of DistributedDataParallel on different data, with fixed and with learned ranges."""
    del world
    found: dict[str, Any] = {}
    for kind in ("fixed", "learned"):
        qmodel = model_of("BertForSequenceClassification", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        wrapped = DistributedDataParallel(qmodel)
        qs.calibrate(wrapped, [BATCHES[rank]], "max")
        qs.round_weights(wrapped, [BATCHES[rank]])
        wrapped = DistributedDataParallel(qmodel)  # what weights are moved by are buffers that it does not know
        if kind == "learned":
            qs.learn_ranges(wrapped, weights=True)
            wrapped = DistributedDataParallel(qmodel)  # the ranges are parameters that the first one does not know
        before = ranges(qmodel)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01)
        wrapped.train()
        for _ in range(2):
            wrapped(**BATCHES[rank], labels=torch.tensor([0, 1, 1, rank])).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = [name for name, amax in ranges(qmodel).items() if not torch.equal(amax, before[name])]
        found[kind] = (before, ranges(qmodel), len(moved), {k: v.clone() for k, v in qmodel.state_dict().items()})
    return found


def reduce(rank: int, world: int) -> dict[str, Any]:
    """The functions themselves."""
    cpu = torch.device("cpu")
    values = [torch.tensor([0.1, 3.0, 0.7]), torch.tensor([100.0, 0.25])][rank]
    histograms = {
        "both": Histogram.of(values),
        "first": Histogram.of(values) if rank == 0 else None,
        "second": Histogram.of(values) if rank == 1 else None,
        "neither": None,
    }
    maxima = {
        "both": torch.tensor([[1.0 + rank, 5.0 - rank]]),
        "second": torch.tensor(2.0) if rank == 1 else None,
        "neither": None,
    }
    gathered = gather_histograms(histograms, cpu)
    return {
        "world": world,
        "sums": gather_sums([rank, 10, 3 - rank], cpu),
        "maxima": gather_maxima(maxima, cpu),
        "moments": gather_moments(
            {"both": torch.eye(2) * (1 + rank), "first": torch.ones(1, 1) if rank == 0 else None, "none": None},
            {"both": 2, "first": 1, "none": 3},
            cpu,
        ),
        "histograms": {name: (each.counts, int(each.exponent), float(each.amax)) for name, each in gathered.items()},
        "none": gather_histograms({}, cpu),
        "agreed": agree(None),
    }


def _worker(rank: int, job: Callable[[int, int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    try:
        distributed.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
        result = job(rank, 2)
    except BaseException:
        result = traceback.format_exc()
    torch.save(result, os.path.join(folder, f"{rank}.part"))
    os.replace(os.path.join(folder, f"{rank}.part"), os.path.join(folder, f"{rank}.pt"))
    distributed.destroy_process_group()


def run(job: Callable[[int, int], Any], folder: Path) -> list[Any]:
    """What ``job`` returns in each of two processes; fails if one of them hangs."""
    processes = [forked.CONTEXT.Process(target=_worker, args=(rank, job, str(folder))) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(PATIENCE)
        assert not any(process.is_alive() for process in processes), "a process waits for the other"
        assert [process.exitcode for process in processes] == [0, 0]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
                process.join()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def several(rank: int, world: int) -> dict[str, Any]:
    """All jobs in one start of two processes, as imports take longer than the jobs."""
    jobs = (all_methods, none_in_one, nan_in_one, cross_attention_in_one, train_a_step, reduce)
    return {job.__name__: job(rank, world) for job in jobs}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """By rank: what each job returned."""
    found = run(several, tmp_path_factory.mktemp("gloo"))
    for each in found:
        assert isinstance(each, dict), each  # otherwise a traceback
    return found


# ---------------------------------------------------------------------------------------------------------------------


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert wanted
    for name, amax in wanted.items():
        assert torch.equal(found[name], amax), name


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("method", method_names())
def test_two_processes_find_what_one_finds(results: list[dict[str, Any]], name: str, method: str) -> None:
    first, second = (each["all_methods"] for each in results)
    assert_equal(first[f"{name} {method}"], second[f"{name} {method}"])
    assert first[name] == second[name] == (3, 12, 72)
    qmodel = model_of()
    qs.calibrate(qmodel, BATCHES, method)
    assert_equal(first[f"{name} {method}"], ranges(qmodel))
    if method == "max":
        assert_equal(first["batches max"], ranges(qmodel))
        assert_equal(second["batches max"], ranges(qmodel))


def test_the_shares_alone_would_give_other_ranges() -> None:
    qmodel = model_of()
    qs.calibrate(qmodel, BATCHES, "max")
    wanted = ranges(qmodel)
    for share in SHARES["two-and-one"]:
        qs.calibrate(qmodel, [BATCHES[index] for index in share], "max")
        assert any(not torch.equal(amax, wanted[name]) for name, amax in ranges(qmodel).items())


def test_a_process_without_batches_fails_everywhere(results: list[dict[str, Any]]) -> None:
    first, second = (each["none_in_one"] for each in results)
    assert second.startswith("CalibrationError: there are no batches;")
    assert first.startswith("CalibrationError: process 1 failed: CalibrationError: there are no batches;")
    assert all(words.endswith("[0 ranges]") for words in (first, second))


def test_a_nan_in_one_process_fails_everywhere(results: list[dict[str, Any]]) -> None:
    first, second = (each["nan_in_one"] for each in results)
    where = "batch 1 gives a NaN at encoder.layer.0.attention.self.query._input_quantizer;"
    assert second.startswith(f"CalibrationError: {where}")
    assert first.startswith(f"CalibrationError: process 1 failed: CalibrationError: {where}")
    assert all(words.endswith("[0 ranges]") for words in (first, second))


def test_what_one_process_saw_is_seen_by_all(results: list[dict[str, Any]]) -> None:
    first, second = (each["cross_attention_in_one"] for each in results)
    assert first.startswith("fine [34 ranges]")
    assert first == second


@pytest.mark.parametrize("kind", ["fixed", "learned"])
def test_training_keeps_both_processes_equal(results: list[dict[str, Any]], kind: str) -> None:
    (first, after, moved, state), (second, other, _, twin) = (each["train_a_step"][kind] for each in results)
    assert_equal(first, second)
    assert_equal(after, other)
    assert_equal(state, twin)
    assert any(name.endswith("_rounding") for name in state)
    if kind == "fixed":
        assert moved == 0
    else:
        assert moved > len(first) / 2


def test_sums_and_maxima(results: list[dict[str, Any]]) -> None:
    for each in (found["reduce"] for found in results):
        assert each["world"] == 2
        assert each["sums"] == [1, 20, 5]
        assert each["maxima"].keys() == {"both", "second"}
        assert each["maxima"]["both"].tolist() == [[2.0, 5.0]]
        assert each["maxima"]["second"].tolist() == 2.0
        assert {name: value.tolist() for name, value in each["moments"].items()} == {
            "both": [[3.0, 0.0], [0.0, 3.0]],
            "first": [[1.0]],
            "none": [[0.0] * 3] * 3,
        }
        assert each["none"] == {}
        assert each["agreed"] is None


def test_histograms(results: list[dict[str, Any]]) -> None:
    first, second = torch.tensor([0.1, 3.0, 0.7]), torch.tensor([100.0, 0.25])
    wanted = {"both": torch.cat([first, second]), "first": first, "second": second}
    for each in (found["reduce"]["histograms"] for found in results):
        assert each.keys() == wanted.keys()
        for name, values in wanted.items():
            made = Histogram.of(values)
            counts, exponent, amax = each[name]
            assert torch.equal(counts, made.counts)
            assert (exponent, amax) == (int(made.exponent), float(made.amax))


def test_alone_everything_is_given_back() -> None:
    cpu = torch.device("cpu")
    histogram = Histogram.of(torch.ones(3))
    assert gather_sums([1, 2], cpu) == [1, 2]
    assert gather_histograms({"a": histogram, "b": None}, cpu) == {"a": histogram}
    found = gather_maxima({"a": torch.tensor(2.0), "b": None}, cpu)
    assert found == {"a": torch.tensor(2.0)}
    assert gather_moments({"a": torch.ones(1, 1), "b": None}, {"a": 1, "b": 1}, cpu) == {"a": torch.ones(1, 1)}
    agree(None)
    error = OSError("the disk is gone")
    with pytest.raises(OSError, match="the disk is gone") as caught:
        agree(error)
    assert caught.value is error
