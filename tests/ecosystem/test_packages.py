"""Encoders in packages that people deploy, by each package's own calls: what scripts/check_packages.py runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from transformers.utils import logging

import check_packages
import qdq_surgery as qs


def is_there(name: str) -> bool:
    return importlib.util.find_spec(check_packages.PACKAGES[name].module) is not None


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of the packages, about each other's names
@pytest.mark.parametrize("name", sorted(check_packages.PACKAGES))
def test_its_own_calls_give_the_same_in_float_and_their_own_types_in_integers(name: str, tmp_path: Path) -> None:
    package = check_packages.PACKAGES[name]
    pytest.importorskip(package.module, reason=f"pip install {package.install}")
    logging.disable_progress_bar()
    held = package.build(tmp_path)
    logging.enable_progress_bar()
    assert check_packages.check(held) == ""
    assert qs.quantizers(held.encoder)


def test_what_is_absent_is_skipped_with_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    absent = [name for name in check_packages.PACKAGES if not is_there(name)]
    if not absent:
        pytest.skip("every package is installed")
    verbosity = logging.get_verbosity()
    try:
        assert check_packages.main(absent[:1]) == 0
    finally:
        logging.set_verbosity(verbosity)  # the script is quiet about all else, for as long as its process lives
    told = capsys.readouterr().out
    assert told.startswith(f"{absent[0]}: skipped, No module named ")
    assert check_packages.PACKAGES[absent[0]].install in told


@pytest.mark.parametrize(
    ("found", "wanted", "alike"),
    [
        ([torch.ones(2), {"a": 1.0}], [torch.ones(2), {"a": 1.0}], True),
        (torch.ones(2).to_sparse(), torch.ones(2).to_sparse(), True),
        (torch.ones(2), torch.full((2,), 1.0000001), False),
        ([1, 2], (1, 2), False),
        ({"a": 1.0}, {"b": 1.0}, False),
        (["a"], ["a", "b"], False),
    ],
    ids=["nested", "sparse", "another bit", "another type", "another key", "another length"],
)
def test_same_is_to_the_bit(found: object, wanted: object, alike: bool) -> None:
    assert check_packages.same(found, wanted) is alike
