"""Rows of any length through a model: sorted by length, in batches of about equally many tokens, given back in order.

A batch is as wide as its longest row, so a long text among short ones costs as much for each of them. Widths are
multiples of eight: runtimes prepare their kernels for each shape anew, and so meet few.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Integral
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qdq_surgery.errors import ModelError, OptionError, QdqSurgeryError
from qdq_surgery.hf.config_facts import max_tokens
from qdq_surgery.numerics.real_numbers import is_whole
from qdq_surgery.padding.token_masks import token_means
from qdq_surgery.sensitivity.output_error import is_by_token, is_score
from qdq_surgery.serve.model import OnnxModel
from qdq_surgery.text.progress import track

__all__ = ["Row", "run_rows"]

#: A text, a pair of texts, or token ids by the names of the model's arguments.
Row: TypeAlias = "str | tuple[str, str] | Mapping[str, Sequence[int]]"

#: From the model's outputs and the batch to something with an entry for each row.
Keep: TypeAlias = "Callable[[Any, Mapping[str, Tensor]], Sequence[Any] | Tensor]"

#: What is kept if nobody says what.
_OUTPUTS = "outputs"

_NO_LIMIT = 1 << 30

#: Rows that are sorted at a time.
_WINDOW = 4096

_STEP = 8

_IDS, _MASK, _TYPES = "input_ids", "attention_mask", "token_type_ids"


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
    keep: str | Keep = _OUTPUTS,
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
        keep: ``"outputs"``: a dict of the model's outputs that are tensors with an entry for each row, of tokens'
            outputs only those of the row's own tokens. Outputs of some thousand rows are held at once.
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
        ModelError: The file, or the model, cannot run it.
    """
    if not callable(model) or not hasattr(model, "config"):
        raise OptionError(f"found a {type(model).__name__}, wanted what load_onnx opened, or a model of transformers")
    counts = [(tokens, 1), (streams, 1), *([] if length is None else [(length, 3)])]
    if not all(is_whole(count) and count >= least for count, least in counts):
        raise OptionError(f"tokens={tokens}, streams={streams}, length={length}: give at least 1, 1 and 3")
    if streams > 1 and not isinstance(model, OnnxModel):
        raise OptionError(
            f"streams={streams} is for a file; a {type(model).__name__} in PyTorch runs one batch at once"
        )
    if getattr(model, "training", False):
        raise OptionError(f"this {type(model).__name__} is in training mode; call model.eval() first")
    return _run(_Job(model, tokenizer, _kept(keep, model.config), tokens, length), rows, streams)


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
        limits = (length, max_tokens(model.config), getattr(tokenizer, "model_max_length", None))
        self._length = min((each for each in limits if each is not None), default=_NO_LIMIT)
        padding = getattr(tokenizer, "pad_token_id", None)
        padding = getattr(model.config, "pad_token_id", None) if padding is None else padding
        self._fill = {_IDS: padding if isinstance(padding, int) and padding >= 0 else 0}
        self._taken = frozenset(model.inputs if isinstance(model, OnnxModel) else _arguments(model))

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
        outputs = model(**inputs, return_dict=True) if isinstance(model, OnnxModel) else _in_pytorch(model, batch)
        found = self._keep(outputs, inputs)
        if len(found) != len(batch.places):
            raise OptionError(f"keep gave {len(found)} entries for {len(batch.places)} rows; give one for each")
        return [_own(each, length) for each, length in zip(found, batch.lengths, strict=True)]

    @property
    def _masked(self) -> bool:
        return _MASK in self._taken

    def _width(self, length: int) -> int:
        return min(-(-length // _STEP) * _STEP, max(self._length, length)) if self._masked else length

    def _encoded(self, window: Sequence[Row], first: int) -> list[Mapping[str, Sequence[int]]]:
        texts = [place for place, row in enumerate(window) if not isinstance(row, Mapping)]
        made: list[Any] = [row if isinstance(row, Mapping) else None for row in window]
        for place, row in enumerate(window):
            _check(row, first + place, self._tokenizer, self._taken)
        for pairs in (False, True):
            own = [place for place in texts if isinstance(window[place], str) is not pairs]
            chosen: list[Any] = [window[place] for place in own]
            columns = [[row[at] for row in chosen] for at in (0, 1)] if pairs else [chosen]
            cut = {"truncation": True, "max_length": self._length} if self._length < _NO_LIMIT else {}
            found = self._tokenizer(*columns, **cut) if own else {}
            for at, place in enumerate(own):
                made[place] = {name: found[name][at] for name in found}
                if not made[place][_IDS]:
                    raise OptionError(f"row {first + place} has no token: the tokenizer makes none of it")
        return made

    def _names(self, encoded: Sequence[Mapping[str, Any]], places: Iterable[int]) -> list[str]:
        """The arguments that some of the rows have.

        Raises:
            OptionError: Others lack one that has no meaning of its own where it is not given.
        """
        found = dict.fromkeys(name for place in places for name in encoded[place] if name in self._taken)
        for name in found.keys() - {_IDS, _MASK, _TYPES}:
            if any(name not in encoded[place] for place in places):
                raise OptionError(f"some rows have '{name}' and some have not; give it in all of them, or in none")
        return [_IDS, *([_MASK] if self._masked else []), *(name for name in found if name not in (_IDS, _MASK))]

    def _batch(self, encoded: Sequence[Mapping[str, Sequence[int]]], places: list[int], width: int) -> _Batch:
        lengths = [len(encoded[place][_IDS]) for place in places]
        inputs = {}
        for name in self._names(encoded, places):
            fill, absent = self._fill.get(name, 0), int(name == _MASK)
            given = [encoded[place].get(name, [absent] * length) for place, length in zip(places, lengths, strict=True)]
            inputs[name] = torch.tensor([[*row, *[fill] * (width - len(row))] for row in given])
        return _Batch(places, inputs, lengths)


def _in_pytorch(model: PreTrainedModel, batch: _Batch) -> Any:
    """The model's outputs.

    Raises:
        ModelError: It cannot run such rows.
    """
    on = {name: value.to(model.device) for name, value in batch.inputs.items()}
    try:
        with torch.no_grad():
            return model(**on, return_dict=True)
    except QdqSurgeryError:
        raise
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise ModelError(
            f"{type(model).__name__} cannot run {len(batch.places)} rows of {min(batch.lengths)} to "
            f"{max(batch.lengths)} tokens, the ids {int(on[_IDS].min())} to {int(on[_IDS].max())}: {error}; look for "
            "rows that are too long, and for another model's ids"
        ) from error


def _arguments(model: PreTrainedModel) -> Iterable[str]:
    """The names of what a model is called with, also of one in ``torch.compile`` or a PEFT model."""
    inner: Any = getattr(model, "_orig_mod", model)
    inner = inner.get_base_model() if callable(getattr(inner, "get_base_model", None)) else inner
    return inspect.signature(inner.forward).parameters


def _check(row: Any, number: int, tokenizer: Any, taken: Collection[str]) -> None:
    if isinstance(row, Mapping):
        for name in (_IDS, *(each for each in row if each in taken)):
            values = row.get(name)
            whole = isinstance(values, Sequence) and all(isinstance(value, Integral) for value in values)
            if not whole or not values:
                raise OptionError(f"row {number} has no list of whole numbers in '{name}'; give one, or a text")
            if len(values) != len(row[_IDS]):
                raise OptionError(
                    f"row {number} has {len(values)} numbers in '{name}' and {len(row[_IDS])} in '{_IDS}'; give as many"
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


def _outputs(config: Any, outputs: Any, batch: Mapping[str, Tensor]) -> Sequence[Any]:
    rows = len(batch[_IDS])
    tensors = {
        name: value.detach().cpu()
        for name, value in outputs.items()
        if isinstance(value, Tensor) and value.ndim and len(value) == rows
    }
    if not tensors:
        raise OptionError(f"{type(outputs).__name__} has no tensor with an entry for each row; give a function as keep")
    by_token = frozenset(
        name
        for name, value in tensors.items()
        # (Of two axes only scores can be those of tokens.)
        if (value.ndim > 2 or is_score(name)) and is_by_token(config, batch, value)
    )
    return [_Outputs({name: value[row] for name, value in tensors.items()}, by_token) for row in range(rows)]


def _states(outputs: Any) -> Tensor:
    states = getattr(outputs, "last_hidden_state", None)
    if not isinstance(states, Tensor):
        raise OptionError(
            f"{type(outputs).__name__} has no last_hidden_state; keep 'outputs', or give a function as keep"
        )
    return states


def _mean(outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
    states = _states(outputs)
    return token_means(states, batch.get(_MASK, torch.ones_like(batch[_IDS])).to(states.device))


def _first(outputs: Any, _: Mapping[str, Tensor]) -> Tensor:
    return _states(outputs)[:, 0].clone()  # a view would keep the states of all tokens


_KEEPS: Mapping[str, Keep] = {"mean": _mean, "first": _first}


def _kept(keep: str | Keep, config: Any) -> Keep:
    if not isinstance(keep, str):
        return keep
    if keep == _OUTPUTS:
        return functools.partial(_outputs, config)
    if keep not in _KEEPS:
        raise OptionError(f"keep={keep!r} is none of {_OUTPUTS}, {', '.join(_KEEPS)}; give one of them, or a function")
    return _KEEPS[keep]
