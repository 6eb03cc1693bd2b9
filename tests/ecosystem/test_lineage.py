"""Every text encoder in transformers' registries is listed; each converts, and the document says of it what is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from comparing import assert_same
from counting import Counting

import qdq_surgery as qs
from lineage import KIN, OTHERS, OUTSIDE, Kin, build, candidates, examples, heads
from qdq_surgery.surgery.model_state import plan_of

PRODUCTS = {"linear", "matmul", "baddbmm", "einsum", "sdpa", "conv1d", "autograd_function", "block"}

DOCUMENT = Path(__file__).parents[2] / "docs" / "models.md"

BY_TYPE = {kin.model_type: kin for kin in KIN}


def rows() -> dict[str, list[str]]:
    """The cells of the table by model type."""
    lines = re.findall(r"^\| ([\w-]+) \| (\d.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return {name: cells.split(" | ") for name, cells in lines}


def test_every_text_encoder_is_listed() -> None:
    listed = {*BY_TYPE, *OUTSIDE}
    missing = sorted(set(candidates()) - listed)
    assert not missing, (
        f"transformers has text encoders that are not listed yet: {missing}; put each into KIN of scripts/lineage.py, "
        "run scripts/sweep_models.py on it, and leave it there or, with a reason, in OUTSIDE"
    )
    assert len(listed) == len(KIN) + len(OUTSIDE), "listed twice"


def test_the_document_has_every_type() -> None:
    assert list(rows()) == [*sorted(BY_TYPE), *sorted(kin.model_type for kin in OTHERS)]
    text = DOCUMENT.read_text()
    for name, why in OUTSIDE.items():
        assert f"- `{name}`: {why}." in text


def test_sixty_types_pass_every_stage() -> None:
    whole = [
        name
        for name, (passed, *counts_and_stages) in rows().items()
        if name in BY_TYPE
        and len(set(passed.split(" of "))) == 1
        and not any(cell.startswith(("no", "0%")) for cell in counts_and_stages)
    ]
    assert len(whole) >= 60


@pytest.mark.parametrize("kin", [*KIN, *OTHERS], ids=lambda kin: kin.model_type)
def test_it_converts_and_nothing_is_left_out_in_silence(kin: Kin) -> None:
    known = heads(kin.model_type)
    model = build(kin, known[0])
    qmodel = qs.convert(model)
    made = plan_of(qmodel)
    passed, *counts = rows()[kin.model_type][:4]
    assert passed.endswith(f" of {len(known)}")
    kinds = ("linear", "matmul", "residual add")
    assert [f"{made.coverage[kind].quantized}/{made.coverage[kind].found}" for kind in kinds] == counts
    batch = examples(model, (3, 12))
    for training in (False, True):
        model.train(training)
        qmodel.train(training)
        with torch.no_grad():
            assert_same(model, qmodel, batch)
    # What runs bare, by a count of another make, is refused; and what is refused runs so.
    listed = [r for r in made.refusals if r.layer is not None and r.operator in PRODUCTS]
    refused = {r.operator for r in listed if "the example inputs never reach it" not in r.reason}
    counting = Counting(qmodel.eval())
    with torch.no_grad(), counting:
        qmodel(**batch)
    assert bool(counting.bare) == bool(refused), (counting.bare, refused)
