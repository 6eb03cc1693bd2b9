"""Quantize the encoder inside packages that people deploy: their own calls give what they gave, to the bit in float.

    python scripts/check_packages.py [gliner setfit pylate cross-encoder sparse-encoder flair]

Each package is built on a tiny random model in a local folder, by its own public API; nothing is fetched. Its encoder
is converted in place and calibrated on the batches that the package's own call makes. With the quantizers off the
results must be those of before, to the bit and of the same types; calibrated, of the same types and others. A package
that is not installed is skipped with the command that installs it. Ends with 1 if one fails.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import qdq_surgery as qs
from deberta_v3 import OPTIONS as DEBERTA_V3

TEXTS = ["the quick brown fox jumps over the lazy dog", "paris is the capital of france", "a dog in paris"]

_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
}
_DEBERTA = {**_SIZES, **DEBERTA_V3}


@dataclass(frozen=True)
class Held:
    """A package's object around an encoder.

    Attributes:
        encoder: The Hugging Face model in it, which is converted in place.
        call: The package's own call on :data:`TEXTS`.
    """

    encoder: PreTrainedModel
    call: Callable[[], Any]


def save_tiny(folder: Path, model_type: str, head: str, **options: Any) -> str:
    """A random model and a tokenizer of the words in :data:`TEXTS`, as ``save_pretrained`` writes them."""
    words = sorted({word for text in TEXTS for word in text.split()})
    vocabulary = {word: index for index, word in enumerate([*_SPECIAL, *words, ",", ".", "person", "place"])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B [SEP]", [("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL, strict=True))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, model_max_length=64, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        model_type, **_SIZES | options, vocab_size=len(vocabulary), pad_token_id=0
    )
    model = getattr(transformers, head).from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embedding" not in name:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return str(folder)


def in_gliner(folder: Path) -> Held:
    """Spans with labels, from a DeBERTa-v3."""
    from gliner import GLiNER, GLiNERConfig

    name = save_tiny(folder, "deberta-v2", "AutoModel", **_DEBERTA)
    torch.manual_seed(0)
    outer = GLiNER.from_config(GLiNERConfig(model_name=name, hidden_size=32, max_width=4, dropout=0.0))
    labels = ["person", "place"]
    call: Any = outer.inference if hasattr(outer, "inference") else outer.batch_predict_entities
    return Held(outer.model.token_rep_layer.bert_layer.model, lambda: call(TEXTS, labels, threshold=0.0))


def in_setfit(folder: Path) -> Held:
    """Probabilities of classes, from sentence embeddings and a head of scikit-learn's."""
    from setfit import SetFitModel

    name = save_tiny(folder, "mpnet", "AutoModel")
    outer = SetFitModel.from_pretrained(name, local_files_only=True)
    outer.fit([*TEXTS, *TEXTS], [0, 1, 0, 0, 1, 0], num_epochs=1)
    return Held(outer.model_body[0].auto_model, lambda: outer.predict_proba(TEXTS))


def in_pylate(folder: Path) -> Held:
    """An embedding for each token of documents and queries (ColBERT), from a ModernBERT."""
    from pylate.models import ColBERT

    special = {"bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8}
    name = save_tiny(folder, "modernbert", "AutoModel", **special)
    torch.manual_seed(0)
    # (Up to transformers 5.3, which it pins, ModernBERT's attention is chosen when the model is built.)
    chosen = {"attn_implementation": "eager"}
    outer = ColBERT(name, embedding_size=16, device="cpu", document_length=32, query_length=16, model_kwargs=chosen)

    def call() -> Any:
        both = (outer.encode(TEXTS, is_query=query, show_progress_bar=False) for query in (False, True))
        return list(both)

    return Held(outer[0].auto_model, call)


def in_cross_encoder(folder: Path) -> Held:
    """Scores of pairs, and a ranking."""
    from sentence_transformers import CrossEncoder

    name = save_tiny(folder, "electra", "AutoModelForSequenceClassification", num_labels=1)
    outer = CrossEncoder(name, device="cpu")
    pairs = [(TEXTS[0], text) for text in TEXTS]
    return Held(outer.model, lambda: [outer.predict(pairs), outer.rank(TEXTS[1], TEXTS, return_documents=True)])


def in_sparse_encoder(folder: Path) -> Held:
    """SPLADE: a weight for each word of the vocabulary, as a sparse tensor."""
    from sentence_transformers import SparseEncoder
    from sentence_transformers.sparse_encoder.modules import MLMTransformer, SpladePooling

    name = save_tiny(folder, "distilbert", "AutoModelForMaskedLM", dim=32, n_layers=2, n_heads=4, hidden_dim=48)
    outer = SparseEncoder(modules=[MLMTransformer(name), SpladePooling("max")], device="cpu")

    def call() -> Any:
        found = outer.encode(TEXTS, convert_to_tensor=True)
        return [found, outer.decode(found, top_k=3)]

    return Held(outer[0].model if hasattr(outer[0], "model") else outer[0].auto_model, call)


def in_flair(folder: Path) -> Held:
    """An embedding for each word, kept in flair's own sentences."""
    # flair imports this name, which it needs for LayoutLM alone and transformers 5 does not have any more.
    module = sys.modules["transformers"]  # which is not always what was imported first
    if not hasattr(module, "LayoutLMv2FeatureExtractor"):
        vars(module)["LayoutLMv2FeatureExtractor"] = object
    from flair.data import Sentence
    from flair.embeddings import TransformerWordEmbeddings

    name = save_tiny(folder, "roberta", "AutoModel")
    # (Without the separator: flair adds its token with an argument that transformers 5 does not take.)
    outer = TransformerWordEmbeddings(name, fine_tune=False, use_context_separator=False)

    def call() -> Any:
        sentences = [Sentence(text) for text in TEXTS]
        outer.embed(sentences)
        return [[token.embedding for token in sentence] for sentence in sentences]

    return Held(outer.model, call)


_ST = "sentence-transformers"


@dataclass(frozen=True)
class Package:
    """How a package is built around an encoder, the module that must be there, and what pip is told to install it."""

    build: Callable[[Path], Held]
    module: str
    install: str


PACKAGES = {
    "gliner": Package(in_gliner, "gliner", "gliner 'transformers<5.17'"),
    "setfit": Package(in_setfit, "setfit", "setfit"),
    "pylate": Package(
        in_pylate,
        "pylate",
        "--no-deps pylate, beside sentence-transformers 5.3.0 and transformers 5.3.0, fastkmeans, ujson, datasets",
    ),
    "cross-encoder": Package(in_cross_encoder, "sentence_transformers", _ST),
    "sparse-encoder": Package(in_sparse_encoder, "sentence_transformers", _ST),
    "flair": Package(in_flair, "flair", "--no-deps flair (it asks for transformers<5), then what its imports ask for"),
}


def batches_of(held: Held) -> list[dict[str, Any]]:
    """The arguments that the package calls its encoder with, by name."""
    seen: list[dict[str, Any]] = []
    forward = held.encoder.forward
    signature = inspect.signature(forward)

    def noting(*positional: Any, **named: Any) -> Any:
        given = signature.bind(*positional, **named).arguments
        seen.append({**given, **given.pop("kwargs", {})})
        return forward(*positional, **named)

    # (No hook: sentence-transformers calls the forward itself.)
    vars(held.encoder)["forward"] = noting
    held.call()
    del vars(held.encoder)["forward"]
    return seen


def same(found: Any, wanted: Any) -> bool:
    """Whether two results are alike: types, structure, and numbers to the bit."""
    if type(found) is not type(wanted):
        return False
    if isinstance(found, torch.Tensor):
        return torch.equal(*(each.to_dense() if each.is_sparse else each for each in (found, wanted)))
    if isinstance(found, np.ndarray):
        return np.array_equal(found, wanted)
    if is_dataclass(found) and not isinstance(found, type):
        return all(same(getattr(found, each.name), getattr(wanted, each.name)) for each in fields(found))
    if isinstance(found, dict):
        return found.keys() == wanted.keys() and all(same(value, wanted[key]) for key, value in found.items())
    if isinstance(found, (list, tuple)):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return bool(found == wanted)


def check(held: Held) -> str:
    """What went wrong; empty if nothing did."""
    held.encoder.eval()
    if held.encoder.config._attn_implementation != "eager":
        held.encoder.set_attn_implementation("eager")  # what is exact to the bit
    with torch.no_grad():
        wanted = held.call()
        if not same(held.call(), wanted):
            return "its own call gives something else each time"
        batches = batches_of(held)
        qs.convert(held.encoder, inplace=True)
        with qs.quantization_disabled(held.encoder):
            if not same(held.call(), wanted):
                return "with the quantizers off its results are others"
        qs.calibrate(held.encoder, batches)
        found = held.call()
    if type(found) is not type(wanted):
        return f"calibrated it gives a {type(found).__name__}, and gave a {type(wanted).__name__}"
    return "the quantizers change nothing" if same(found, wanted) else ""


def main(argv: Sequence[str] | None = None) -> int:
    """Check the packages that are named; 0 if none fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}; all if left out")
    names = parser.parse_args(argv).packages or list(PACKAGES)
    if unknown := [name for name in names if name not in PACKAGES]:
        parser.error(f"{unknown[0]} is none of {', '.join(PACKAGES)}")
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = False
    for name in names:
        told = _outcome(name)
        failed |= told.startswith("FAILED")
        print(f"{name}: {told}", flush=True)
    return 1 if failed else 0


def _outcome(name: str) -> str:
    package = PACKAGES[name]
    with tempfile.TemporaryDirectory() as folder:
        try:
            held = package.build(Path(folder))
        except ImportError as error:
            if importlib.util.find_spec(package.module) is None:
                return f"skipped, {error}; pip install {package.install}"
            return f"FAILED: {error}"
        except Exception as error:
            return f"FAILED: it cannot be built: {type(error).__name__}: {error}"
        try:
            wrong = check(held)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    if wrong:
        return f"FAILED: {wrong}"
    return f"ok, {len(qs.quantizers(held.encoder))} quantizers in its {type(held.encoder).__name__}"


if __name__ == "__main__":
    sys.exit(main())
