"""Quantize rxnmapper's own ALBERT, and count the reactions that it maps as before; exit code 1 below 97 %.

    SITE=FOLDER; pip install --no-deps --target $SITE rxnmapper rxn-chem-utils rxn-utils rdkit attrs "setuptools<81"
    pip download --no-deps --no-binary drfp drfp==0.3.7 && tar xzf drfp-0.3.7.tar.gz drfp-0.3.7/data/schneider50k.tsv
    PYTHONPATH=$SITE python scripts/check_rxnmapper.py drfp-0.3.7/data/schneider50k.tsv [--reactions 200]

rxnmapper's product are the attentions of one head: which atom comes from where. Its model's class and call stay as the
package makes them; only ``mapper.model`` is replaced by its converted copy. The reactions are real, of US patents in 50
classes (Schneider et al., 2015; the source distribution of drfp has them); calibration sees others than those counted.
With the quantizers off, mappings and confidences must be the same to the bit; of the calibrated ones, the first of
``--rules`` with the first of ``--methods`` decides.
"""

from __future__ import annotations

import argparse
import csv
import random
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers.models.bert.tokenization_bert_legacy import BertTokenizerLegacy
from transformers.utils import logging as transformers_logging

import qdq_surgery as qs
from qdq_surgery.numerics.range_choice import BEST, RANGE_METHODS

try:
    from rxnmapper import RXNMapper
    from rxnmapper.tokenization_smiles import SmilesTokenizer
except ImportError as error:
    sys.exit(f"rxnmapper cannot be imported: {error}. Install it as the first lines of {__file__} say.")

BATCH, SHARE = 8, 0.97
METHODS = [
    *(str(options.get("percentile", name)) for name, each in RANGE_METHODS.items() for options in each.settings),
    BEST,
]
Mappings = list[dict[str, Any]]


def fit_the_tokenizer() -> None:
    """Give rxnmapper's tokenizer the base class that it was written for: it has nothing to do with the model.

    In transformers 5 the name BertTokenizer means another class, which ignores ``_tokenize`` and has no
    ``batch_encode_plus``; the old one goes by the name of BertTokenizerLegacy.
    """
    SmilesTokenizer.__bases__ = (BertTokenizerLegacy,)
    SmilesTokenizer.batch_encode_plus = BertTokenizerLegacy.__call__


def read_reactions(path: Path, mapper: Any, count: int, seed: int) -> list[str]:
    """Reactions of the column ``rxn``, drawn at random without repetitions, short enough for the model."""
    with path.open(newline="", encoding="utf-8") as file:
        table = csv.DictReader(file, delimiter="\t")
        if "rxn" not in (table.fieldnames or ()):
            sys.exit(f"{path} has no column rxn; give a table with tabs between its columns, such as schneider50k.tsv.")
        found = sorted({row["rxn"] for row in table})
    random.Random(seed).shuffle(found)
    limit = mapper.model.config.max_position_embeddings
    kept = (each for each in found if len(mapper.tokenize_for_model(each)) <= limit)
    drawn = [each for each, _ in zip(kept, range(count), strict=False)]
    if len(drawn) < count:
        sys.exit(f"{path} has {len(drawn)} different reactions of at most {limit} tokens; {count} are needed.")
    return drawn


def map_all(mapper: Any, reactions: list[str]) -> Mappings:
    """What the package answers, in batches of different lengths, so with padding."""
    return [
        mapping
        for start in range(0, len(reactions), BATCH)
        for mapping in mapper.get_attention_guided_atom_maps(reactions[start : start + BATCH])
    ]


def batches_of(mapper: Any, reactions: list[str]) -> list[dict[str, Any]]:
    """The arguments that the package calls its model with to map ``reactions``."""
    seen: list[dict[str, Any]] = []

    def note(_model: nn.Module, _positional: tuple[object, ...], named: dict[str, Any]) -> None:
        seen.append(named)

    hook = mapper.model.register_forward_pre_hook(note, with_kwargs=True)
    map_all(mapper, reactions)
    hook.remove()
    return seen


def same(first: Mappings, second: Mappings) -> int:
    return sum(one["mapped_rxn"] == other["mapped_rxn"] for one, other in zip(first, second, strict=True))


def calibrate(model: nn.Module, stats: qs.Statistics, method: str) -> None:
    if method.replace(".", "").isdigit():
        qs.calibrate(model, stats, "percentile", percentile=float(method))
    else:
        qs.calibrate(model, stats, method)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="table with tabs and a column rxn: reaction SMILES without numbers")
    parser.add_argument("--reactions", type=int, default=200, help="how many are counted")
    parser.add_argument("--calibration", type=int, default=200, help="how many others calibration sees")
    parser.add_argument("--seed", type=int, default=0, help="which reactions are drawn")
    parser.add_argument("--rules", nargs="+", default=["qdqbert", "openvino", "linear-only"], help="names or files")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="a method of calibrate, or a percentile")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    fit_the_tokenizer()
    mapper = RXNMapper()
    model = mapper.model
    drawn = read_reactions(arguments.data, mapper, arguments.reactions + arguments.calibration, arguments.seed)
    counted, others = drawn[: arguments.reactions], drawn[arguments.reactions :]
    expected, batches = map_all(mapper, counted), batches_of(mapper, others)

    table = Table("rules", "method", "same mappings", box=None)
    passed, exact = [], []
    for rules in arguments.rules:
        mapper.model = qs.convert(model, rules)
        assert type(mapper.model) is type(model)
        with qs.quantization_disabled(mapper.model):
            off = map_all(mapper, counted)
        exact.append(off == expected)
        table.add_row(rules, "quantizers off", f"{same(off, expected)} of {len(counted)}")
        stats = qs.collect(mapper.model, batches)
        for method in arguments.methods:
            calibrate(mapper.model, stats, method)
            agreed = same(map_all(mapper, counted), expected)
            passed.append(agreed >= SHARE * len(counted))
            table.add_row("", method, f"{agreed} of {len(counted)}")
    Console(highlight=False).print(table)
    print(f"torch {torch.__version__}; quantizers off, to the bit: {all(exact)}; {SHARE:.0%} met: {passed[0]}")
    return 0 if all(exact) and passed[0] else 1


if __name__ == "__main__":
    sys.exit(main())
