"""Targets: what each asks for, and that each has its rule file."""

from __future__ import annotations

import platform

import pytest

import qdq_surgery as qs
from qdq_surgery.targets.onnxruntime import profile
from qdq_surgery.targets.registry import TARGETS, get_target
from qdq_surgery.targets.target import ACTIVATIONS, PRECISIONS


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_is_a_profile_beside_a_rule_file(name: str) -> None:
    target = get_target(name)
    assert target.name == name
    assert name in qs.shipped_rules()
    assert qs.load_rules(name).name == name


@pytest.mark.parametrize("name", TARGETS)
def test_the_usual_values_are_among_those_allowed(name: str) -> None:
    target = get_target(name)
    first, last = target.opsets
    assert 19 <= first <= target.opset <= last  # half-precision scales and 8-bit floats came with 19
    assert target.activations
    assert set(target.activations) <= set(ACTIVATIONS)
    assert target.precisions[0] == "float32"
    assert set(target.precisions) <= set(PRECISIONS)


def test_tensorrt_is_symmetric() -> None:
    target = get_target("tensorrt")
    assert target.activations == ("int8",)
    assert not target.unsigned


@pytest.mark.parametrize(
    ("machine", "first"), [("x86_64", "uint8"), ("AMD64", "uint8"), ("aarch64", "int8"), ("arm64", "int8")]
)
def test_the_sign_of_activations_is_that_of_the_cpus_kernels(
    machine: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    found = profile._cpu_activations()
    assert found[0] == first
    assert set(found) == set(ACTIVATIONS)


def test_a_target_that_there_is_not() -> None:
    with pytest.raises(qs.ExportError, match="no target 'tensorflow'; targets are onnxruntime, openvino, tensorrt"):
        get_target("tensorflow")
