"""Models that were loaded converted, where people take them: what conversion records, they record at first use."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import batch_for, build
from ecosystem import calibrated, called
from sentence_transformers import SentenceTransformer
from tiny_checkpoint import save_tiny_bert
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

import qdq_surgery as qs
from qdq_surgery.trainer import QATTrainer

TEXTS = ["the quick brown fox jumps over the lazy dog", "paris is the capital of france", "a dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "classifier"
    calibrated().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, for what compilers do to each in turn."""
    path = tmp_path_factory.mktemp("models") / "small"
    calibrated(num_hidden_layers=1).save_pretrained(path)
    return path


def load(folder: Path, **options: Any) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(folder, **options)
    return model


def padded(model: PreTrainedModel, shape: tuple[int, int] = (3, 7)) -> dict[str, Tensor]:
    return batch_for(model, shape)


def test_all_quantizers_run(folder: Path) -> None:
    model = load(folder)
    assert called(model, padded(model)) == called(calibrated(), padded(model))


def test_layers_share_what_is_recorded(folder: Path) -> None:
    model = load(folder)
    blocks = [layer.attention.output for layer in model.bert.encoder.layer]
    assert [len(block._qdq_forward.variants.found) for block in blocks] == [0, 0]
    model(**padded(model))
    assert blocks[0]._qdq_forward.variants is blocks[1]._qdq_forward.variants
    assert len(blocks[0]._qdq_forward.variants.found) == 1


class Pairs(Dataset[dict[str, Tensor]]):
    def __init__(self, model: PreTrainedModel, count: int) -> None:
        batch = batch_for(model, (count, 6), mask=False, labels=True)
        self.rows = [{name: value[index] for name, value in batch.items()} for index in range(count)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.rows[index]


@pytest.mark.parametrize("kind", [Trainer, QATTrainer])
def test_training_goes_on_and_is_saved(kind: Any, folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    before = copy.deepcopy(model.state_dict())
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        save_steps=3,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-2,
    )
    trainer = kind(model=model, args=arguments, train_dataset=Pairs(model, 12), eval_dataset=Pairs(model, 4))
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    assert trainer.predict(Pairs(model, 4)).predictions.shape == (4, 2)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    model.eval()
    again = load(tmp_path / "checkpoint-3")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    with torch.no_grad():
        assert torch.equal(again(**padded(model)).logits, model(**padded(model)).logits)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted encoder with its tokenizer, as ``save_pretrained`` writes them."""
    source = save_tiny_bert(tmp_path_factory.mktemp("float"), TEXTS)
    path = tmp_path_factory.mktemp("models") / "encoder"
    tokenizer = AutoTokenizer.from_pretrained(source)
    qmodel = qs.convert(AutoModel.from_pretrained(source))
    qs.calibrate(qmodel, [dict(tokenizer(TEXTS, padding=True, return_tensors="pt"))])
    qmodel.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_sentence_transformers_load_the_folder(encoder_folder: Path, tmp_path: Path) -> None:
    encoder = SentenceTransformer(str(encoder_folder), device="cpu")
    model = AutoModel.from_pretrained(encoder_folder)
    assert qs.quantizers(encoder[0].model).keys() == qs.quantizers(model).keys()
    batch = dict(AutoTokenizer.from_pretrained(encoder_folder)(TEXTS, padding=True, return_tensors="pt"))
    with torch.no_grad():
        states = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).float()
    found = encoder.encode(TEXTS, convert_to_tensor=True)
    # The same hidden states; float32 rounding of the mean.
    assert torch.allclose(found, (states * mask).sum(1) / mask.sum(1), rtol=0, atol=1e-6)
    encoder.save_pretrained(str(tmp_path))
    again = SentenceTransformer(str(tmp_path), device="cpu")
    assert torch.equal(again.encode(TEXTS, convert_to_tensor=True), found)
    assert all(each.amax is not None for each in qs.quantizers(again[0].model).values())


def test_a_pipeline_loads_the_folder(encoder_folder: Path) -> None:
    extract = pipeline("feature-extraction", model=str(encoder_folder), device="cpu")
    model = AutoModel.from_pretrained(encoder_folder)
    assert qs.quantizers(extract.model).keys() == qs.quantizers(model).keys()
    batch = AutoTokenizer.from_pretrained(encoder_folder)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        wanted = model(**batch).last_hidden_state
    assert torch.equal(torch.tensor(extract(TEXTS[0])), wanted)


@pytest.mark.parametrize("beams", [1, 3], ids=["greedy", "beams"])
def test_a_decoder_generates(beams: int, tmp_path: Path) -> None:
    qmodel = calibrated("bert", "BertLMHeadModel", is_decoder=True)
    qmodel.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    prompt = batch_for(qmodel, (2, 4), mask=False)
    wanted = qmodel.generate(**prompt, **options)
    assert torch.equal(model.generate(**prompt, **options), wanted)
    assert torch.equal(model.generate(**prompt, **options, use_cache=False), wanted)


def test_threads_that_call_at_once(folder: Path) -> None:
    model, wanted = load(folder), calibrated()
    batches = [batch_for(model, (rows, length), mask=mask) for rows, length in ((1, 3), (2, 5)) for mask in (0, 1)]
    results: dict[int, Tensor] = {}
    barrier = threading.Barrier(len(batches))

    def call(index: int) -> None:
        barrier.wait()
        with torch.no_grad():
            results[index] = model(**batches[index]).logits

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for index, batch in enumerate(batches):
            assert torch.equal(results[index], wanted(**batch).logits)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_saved_like_the_model(copied: Any, folder: Path, tmp_path: Path) -> None:
    model = copied(load(folder))
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(**padded(model)).logits, calibrated()(**padded(model)).logits)


def test_embeddings_can_be_resized(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.resize_token_embeddings(64)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.get_input_embeddings().weight.shape[0] == 64
    with torch.no_grad():
        assert torch.equal(again(**padded(model)).logits, model(**padded(model)).logits)


def test_another_attention_is_refused(folder: Path) -> None:
    model = load(folder)
    model.set_attn_implementation("sdpa")
    with pytest.raises(qs.AttentionBypassError, match="qdq_eager"):
        model(**padded(model))


def test_compiled_at_once_in_parts(small: Path) -> None:
    """A block: of a whole model torch compiles again, at each break, all that lies around it."""
    model = load(small)
    torch._dynamo.reset()
    model.bert.encoder.layer[0].attention.output.compile(backend="eager")
    with torch.no_grad():
        found = model(**padded(model)).logits
    assert torch.equal(found, calibrated(num_hidden_layers=1)(**padded(model)).logits)


def test_compiled_in_one_graph_after_a_call(small: Path) -> None:
    model = load(small)
    batch = padded(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        with pytest.raises(
            torch._dynamo.exc.Unsupported, match=r"call the model once, in the same mode and with padding"
        ):
            compiled(**batch)
        wanted = model(**batch).logits
        torch._dynamo.reset()
        assert torch.equal(compiled(**batch).logits, wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict: bool, small: Path) -> None:
    model = load(small)
    batch = padded(model)
    if strict:  # which torch.compile's tracer does, see above
        model(**batch)
    program = torch.export.export(model, (), batch, strict=strict)
    assert torch.equal(program.module()(**batch).logits, model(**batch).logits)


def test_the_base_model_of_a_head_and_a_head_on_it(folder: Path, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(folder)
    wanted = calibrated()
    batch = padded(base)
    with torch.no_grad():
        assert torch.equal(base(**batch).last_hidden_state, wanted.bert(**batch).last_hidden_state)
    base.save_pretrained(tmp_path)
    head = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=5)
    with torch.no_grad():
        assert torch.equal(head.bert(**batch).last_hidden_state, wanted.bert(**batch).last_hidden_state)
    assert head(**batch).logits.shape == (3, 5)


def test_float_again(folder: Path) -> None:
    model = load(folder).dequantize()
    wanted = build("bert", "BertForSequenceClassification")
    assert not qs.quantizers(model)
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        assert torch.equal(model(**padded(model)).logits, wanted(**padded(model)).logits)
    qs.convert(model)  # and it can be converted again
