"""Rows of any length through a model: sorted by length, in batches of about equally many tokens, given back in order.

A batch is as wide as its longest row, so a long text among short ones costs as much for each of them. Widths are
multiples of eight: runtimes prepare their kernels for each shape anew, and so meet few.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.errors import OptionError
from qdq_surgery.hf.config_facts import max_tokens
from qdq_surgery.hf.example_inputs import takes_any
from qdq_surgery.serve.model import OnnxModel
from qdq_surgery.text.progress import track

__all__ = ["Row", "run_rows"]

#: A text, a pair of texts, or token ids by the names of the model's arguments.
Row: TypeAlias = "str | tuple[str, str] | Mapping[str, Sequence[int]]"

#: From the model's outputs and the batch to something with an entry for each row.
Keep: TypeAlias = "Callable[[Any, Mapping[str, Tensor]], Sequence[Any] | Tensor]"

#: Rows that are sorted at a time.
_WINDOW = 4096

_STEP = 8

_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"

#: Outputs of two axes of which the second is the tokens'.
_SPANS = frozenset(("start_logits", "end_logits"))


@dataclass(frozen=True)
class _Batch:
    """Rows that run together.

    Attributes:
        places: Where each row is in its window.
        inputs: What the model is called with.
        lengths: Tokens of each row.
    """

    places: list[int]
    inputs: dict[str, Tensor]
    lengths: list[int]


def run_rows(
    model: PreTrainedModel | OnnxModel,
    rows: Iterable[Row],
    tokenizer: Any = None,
    *,
    keep: str | Keep = "outputs",
    tokens: int = 4096,
    length: int | None = None,
    streams: int = 1,
) -> Iterator[Any]:
    """Run a model on rows of any length, and give back what it makes of each, in their order.

    Args:
        model: A file that :func:`~qdq_surgery.load_onnx` opened, a frozen model, a converted one or any other encoder,
            in eval mode.
        rows: Texts, pairs of texts, or token ids by the names of the model's arguments. However many: some thousand
            are read ahead.
        tokenizer: The model's; rows of token ids need none.
        keep: ``"outputs"``: a dict of the model's outputs, of tokens' outputs only those of the row's own tokens.
            ``"mean"``: the mean of the last hidden states over the tokens. ``"first"``: that of the first token. Or a
            function of the outputs and the batch with an entry for each row.
        tokens: Of a batch at most, padding counted; a longer row runs alone.
        length: Most tokens of a text, what is longer is cut off; what the model takes if left out. Rows of token ids
            are not cut.
        streams: How many batches run at once on a file. More than one gains where the file is opened with fewer
            threads than there are cores.

    Returns:
        An iterator with a tensor for each row, or a dict of tensors, on the CPU.

    Raises:
        OptionError: A row or an option is none; says which.
        ModelError: The file cannot run it.
    """
    if tokens < 1 or streams < 1 or (length is not None and length < 3):
        raise OptionError(f"tokens={tokens}, streams={streams}, length={length}: give at least 1, 1 and 3")
    if streams > 1 and not isinstance(model, OnnxModel):
        raise OptionError(
            f"streams={streams} is for a file; a {type(model).__name__} in PyTorch runs one batch at once"
        )
    if getattr(model, "training", False):
        raise OptionError(f"this {type(model).__name__} is in training mode; call model.eval() first")
    return _run(_Job(model, tokenizer, _kept(keep), tokens, length), rows, streams)


def _run(job: _Job, rows: Iterable[Row], streams: int) -> Iterator[Any]:
    count = 0
    with ThreadPoolExecutor(streams) as pool:
        for window in _windows(rows):
            made: list[Any] = [None] * len(window)
            batches = job.batches(window, count)
            run = map(job.run, batches) if streams == 1 else pool.map(job.run, batches)
            for batch, found in track(zip(batches, run, strict=True), "running", len(batches)):
                for place, each in zip(batch.places, found, strict=True):
                    made[place] = each
            count += len(window)
            yield from made


def _windows(rows: Iterable[Row]) -> Iterator[list[Row]]:
    left = iter(rows)
    while window := list(itertools.islice(left, _WINDOW)):
        yield window


class _Job:
    """What is done to every row."""

    def __init__(
        self, model: PreTrainedModel | OnnxModel, tokenizer: Any, keep: Keep, tokens: int, length: int | None
    ) -> None:
        self._model, self._tokenizer, self._keep, self._tokens = model, tokenizer, keep, tokens
        most = [each for each in (length, max_tokens(model.config)) if each]
        self._length = min([*most, getattr(tokenizer, "model_max_length", most[0] if most else 512)])
        padding = getattr(tokenizer, "pad_token_id", None)
        padding = getattr(model.config, "pad_token_id", None) if padding is None else padding
        self._fill = {_IDS: padding if isinstance(padding, int) and padding >= 0 else 0}
        taken = model.inputs if isinstance(model, OnnxModel) else tuple(inspect.signature(model.forward).parameters)
        self._taken, self._any = frozenset(taken), not isinstance(model, OnnxModel) and takes_any(model)

    def batches(self, window: Sequence[Row], first: int) -> list[_Batch]:
        """The rows of a window, the longest first: what is too large for the memory is so at once."""
        encoded = self._encoded(window, first)
        order = sorted(range(len(window)), key=lambda place: -len(encoded[place][_IDS]))
        made: list[_Batch] = []
        while order:
            width = self._width(len(encoded[order[0]][_IDS]))
            most = max(1, self._tokens // width)
            if not self._masked:  # padding would be read as text
                most = min(most, sum(len(encoded[place][_IDS]) == width for place in order))
            made.append(self._batch(encoded, order[:most], width))
            order = order[most:]
        return made

    def run(self, batch: _Batch) -> Sequence[Any]:
        """What is kept of each row of a batch."""
        model, inputs = self._model, batch.inputs
        if isinstance(model, OnnxModel):
            outputs = model(**inputs)
        else:
            with torch.no_grad():
                outputs = model(**{name: value.to(model.device) for name, value in inputs.items()})
        found = self._keep(outputs, inputs)
        if len(found) != len(batch.places):
            raise OptionError(f"keep gave {len(found)} entries for {len(batch.places)} rows; give one for each")
        return [_own(each, length) for each, length in zip(found, batch.lengths, strict=True)]

    def _takes(self, name: str) -> bool:
        return name in self._taken or (self._any and name != _TYPES)

    @property
    def _masked(self) -> bool:
        return self._takes(_MASK)

    def _width(self, length: int) -> int:
        return min(-(-length // _STEP) * _STEP, max(self._length, length)) if self._masked else length

    def _encoded(self, window: Sequence[Row], first: int) -> list[Mapping[str, Sequence[int]]]:
        texts = [place for place, row in enumerate(window) if not isinstance(row, Mapping)]
        made: list[Any] = [row if isinstance(row, Mapping) else None for row in window]
        for place, row in enumerate(window):
            _check(row, first + place, self._tokenizer)
        for pairs in (False, True):
            own = [place for place in texts if isinstance(window[place], str) is not pairs]
            chosen: list[Any] = [window[place] for place in own]
            columns = [[row[at] for row in chosen] for at in (0, 1)] if pairs else [chosen]
            found = self._tokenizer(*columns, truncation=True, max_length=self._length) if own else {}
            for at, place in enumerate(own):
                made[place] = {name: found[name][at] for name in found}
                if not made[place][_IDS]:
                    raise OptionError(f"row {first + place} has no token: the tokenizer makes none of it")
        return made

    def _batch(self, encoded: Sequence[Mapping[str, Sequence[int]]], places: list[int], width: int) -> _Batch:
        lengths = [len(encoded[place][_IDS]) for place in places]
        inputs = {}
        for name in {_IDS: None, _MASK: None, **dict.fromkeys(encoded[places[0]])}:
            if self._takes(name):
                fill, absent = self._fill.get(name, 0), int(name == _MASK)
                given = [
                    encoded[place].get(name, [absent] * length) for place, length in zip(places, lengths, strict=True)
                ]
                inputs[name] = torch.tensor([[*row, *[fill] * (width - len(row))] for row in given])
        return _Batch(places, inputs, lengths)


def _check(row: Any, number: int, tokenizer: Any) -> None:
    if isinstance(row, Mapping):
        if not len(row.get(_IDS, ())):
            raise OptionError(f"row {number} has no '{_IDS}'; give some, or a text")
        odd = next((name for name, values in row.items() if len(values) != len(row[_IDS])), None)
        if odd is not None:
            raise OptionError(
                f"row {number} has {len(row[odd])} numbers in '{odd}' and {len(row[_IDS])} in '{_IDS}'; give as many"
            )
        return
    pair = isinstance(row, (tuple, list)) and len(row) == 2 and all(isinstance(each, str) for each in row)
    if not isinstance(row, str) and not pair:
        raise OptionError(f"row {number} is a {type(row).__name__}; give a text, a pair of texts, or token ids by name")
    if tokenizer is None:
        raise OptionError(f"row {number} is a text, and there is no tokenizer; give the model's")


@dataclass(frozen=True)
class _Outputs:
    """The model's outputs for one row, padding and all."""

    tensors: Mapping[str, Tensor]
    by_token: frozenset[str]


def _own(found: Any, length: int) -> Any:
    if isinstance(found, _Outputs):
        return {
            name: (value[:length] if name in found.by_token else value).clone() for name, value in found.tensors.items()
        }
    return found.detach().cpu() if isinstance(found, Tensor) else found


def _outputs(outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[Any]:
    rows, width = batch[_IDS].shape
    tensors = {
        name: value.detach().cpu()
        for name, value in outputs.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == rows
    }
    by_token = frozenset(
        name
        for name, value in tensors.items()
        if value.ndim > 1 and value.shape[1] == width and (value.ndim > 2 or name in _SPANS)
    )
    return [_Outputs({name: value[row] for name, value in tensors.items()}, by_token) for row in range(rows)]


def _mean(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    states: Tensor = outputs.last_hidden_state
    mask = batch.get(_MASK, torch.ones_like(batch[_IDS])).to(states).unsqueeze(-1)
    return (states * mask).sum(1) / mask.sum(1)


def _first(outputs: Any, _: Mapping[str, Tensor]) -> Tensor:
    # (A copy: a view would keep the states of all tokens.)
    return outputs.last_hidden_state[:, 0].clone()  # type: ignore[no-any-return]


_KEEPS: Mapping[str, Keep] = {"outputs": _outputs, "mean": _mean, "first": _first}


def _kept(keep: str | Keep) -> Keep:
    if not isinstance(keep, str):
        return keep
    if keep not in _KEEPS:
        raise OptionError(f"keep={keep!r} is none of {', '.join(_KEEPS)}; give one of them, or a function")
    return _KEEPS[keep]
