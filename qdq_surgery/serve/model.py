"""An exported file, called like the Hugging Face model that it was made from."""

from __future__ import annotations

import inspect
import platform
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from qdq_surgery.errors import ModelError
from qdq_surgery.numerics.real_numbers import is_whole
from qdq_surgery.onnx_file.origin import Origin, read_origin
from qdq_surgery.safety.given_path import given_path
from qdq_surgery.serve.feed import make_feed
from qdq_surgery.targets.registry import DEFAULT, computed_in, session_on
from qdq_surgery.targets.session import Session

__all__ = ["OnnxModel", "load_onnx"]

_Self = TypeVar("_Self", bound="OnnxModel")

#: What an option of the call asks for: fields of the output.
_ASKED = {"output_attentions": ("attentions", "cross_attentions"), "output_hidden_states": ("hidden_states",)}

#: More than any machine has cores: a runtime makes so many at once.
_MOST_THREADS = 4096

#: What to do about a file without them.
_REMEDIES = {
    "output_attentions": "export the model again with output_attentions=True among the example_inputs",
    "output_hidden_states": "set model.config.output_hidden_states = True and export the model again",
}


def load_onnx(
    path: str | Path, runtime: str = DEFAULT, *, threads: int | None = None, precision: str | None = None
) -> OnnxModel:
    """Open a file that :func:`~qdq_surgery.export_onnx` wrote, to be called like the model that it was made from.

    A pickle of it, and a copy, is the path and the options, not the file: it opens what lies under this path where it
    is loaded, in another process or on another machine. ``threads=None`` is what PyTorch uses there.

    Args:
        path: The file. One with its weights beside it needs them there.
        runtime: ``"onnxruntime"`` or ``"openvino"``, on the CPU. A file made for one runs on the other, too.
        threads: To compute with; as many as PyTorch does (``torch.get_num_threads()``) if left out.
        precision: Of OpenVINO, for all that is not INT8: ``"float32"`` or ``"bfloat16"`` (``"f32"`` and ``"bf16"`` for
            short). Its own choice if left out: bfloat16 where the CPU has instructions for it.

    Returns:
        The file, on the runtime, under the class name of the model.

    Raises:
        ModelError: No such file, one that ``export_onnx`` did not write, a runtime that is not there or cannot run it.
    """
    if threads is not None:
        if not (is_whole(threads) and 1 <= threads <= _MOST_THREADS):
            raise ModelError(f"threads is {threads!r}; give 1 or more, or None for as many as PyTorch uses")
        threads = int(threads)
    session = session_on(runtime)(given_path(path, "an ONNX file"), threads, computed_in(runtime, precision))
    origin = read_origin(session.path, session.metadata, [port.name for port in session.outputs])
    # Another process may have another working directory.
    again = partial(_open_again, str(session.path.absolute()), runtime, threads, precision)
    return _named(origin.name)(session, origin, again)


def _open_again(path: str, runtime: str, threads: int | None, precision: str | None) -> OnnxModel:
    """What a pickle calls.

    Raises:
        ModelError: As :func:`load_onnx`; a file that is not there is explained for another machine.
    """
    if not Path(path).is_file():
        raise ModelError(
            f"the pickled model is the file {path}, which is not there on this machine ({platform.node()}): a pickle "
            "holds the path alone. Put the file under this path, with its weights if they lie beside it, on each "
            "machine or in a folder that all share, or call load_onnx there"
        )
    return load_onnx(path, runtime, threads=threads, precision=precision)


class OnnxModel:
    """A file on a runtime: Hugging Face's arguments in, Hugging Face's output class out.

    Made by :func:`load_onnx`. It is no ``torch.nn.Module``: it runs, on the CPU, and that is all. transformers'
    pipelines take it with a tokenizer; they know models by the name of their class, so the class of each bears the
    name of the one that was exported (``BertForQuestionAnswering``). A pickle of it is the file's path and the options,
    as :func:`load_onnx` says.

    Args:
        session: The file, opened on its runtime.
        origin: What the file says of the model that was exported.
        again: Opens the file once more, for a copy or a pickle.

    Attributes:
        config: Of the model that was exported.
        path: The file.
        runtime: The runtime that it runs on.
        target: The runtime that it was made for.
        precision: What OpenVINO computes in where the file does not ask for integers: ``"float32"`` or
            ``"bfloat16"``; ``None`` on ONNX Runtime, which computes in what the file says.
        threads: How many it computes with.
        main_input_name, base_model_prefix, input_modalities: As of the Hugging Face class.
    """

    training = False

    def __init__(self, session: Session, origin: Origin, again: Callable[[], OnnxModel]) -> None:
        self._session, self._origin, self._again = session, origin, again
        self.config = origin.config
        self.path, self.runtime, self.target = session.path, session.runtime, origin.target
        self.threads, self.precision = session.threads, session.precision
        self.main_input_name: str = origin.model.main_input_name
        self.base_model_prefix: str = origin.model.base_model_prefix
        self.input_modalities: Any = origin.model.input_modalities
        self._fields = {port.name.split(".")[0] for port in session.outputs}

    @property
    def session(self) -> Any:
        """The ``onnxruntime.InferenceSession``; ``None`` on another runtime."""
        return getattr(self._session, "session", None)

    @property
    def compiled(self) -> Any:
        """The ``openvino.CompiledModel``; ``None`` on another runtime."""
        return getattr(self._session, "compiled", None)

    @property
    def runs_on(self) -> str:
        """The runtime and its version, and what it computes in where that is its own choice."""
        precision = "" if self.precision is None else f" in {self.precision}"
        return f"{self.runtime} {self._session.version}{precision}"

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of what it returns."""
        found = next((port.dtype for port in self._session.outputs if port.dtype.kind == "f"), np.dtype(np.float32))
        return torch.from_numpy(np.empty(0, found)).dtype

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the file takes."""
        return tuple(port.name for port in self._session.inputs)

    def __call__(self, *args: Any, **inputs: Any) -> Any:
        """See :meth:`forward`."""
        return self.forward(*args, **inputs)

    def forward(
        self,
        *args: Any,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the file; several threads may call at once.

        What is left out is what the model itself takes then: ones for ``attention_mask``, zeros for
        ``token_type_ids``. What the file has no input for is refused, unless it changes nothing.

        Args:
            args: As the Hugging Face class's forward orders its arguments.
            return_dict: ``False`` for a tuple; as the config says if left out.
            output_attentions, output_hidden_states: ``False`` leaves out what the file returns of them.
            inputs: Tensors on the CPU, or NumPy arrays, by name; ``None`` is as good as left out.

        Returns:
            The output class of the model's forward, of tensors of their own; a loss is never among them.

        Raises:
            ModelError: An argument is missing, of a wrong type or shape, or not in the file; or the runtime fails.
        """
        asked = {"output_attentions": output_attentions, "output_hidden_states": output_hidden_states}
        dropped = self._dropped(asked)
        given = {**self._by_name(args, inputs), **inputs}
        arrays = self._session.run(make_feed(self.path, self._session.inputs, self._origin, given))
        made = self._origin.rebuilt(
            {name: torch.from_numpy(array) for name, array in arrays.items() if name.split(".")[0] not in dropped}
        )
        as_dict = getattr(self.config, "return_dict", True) if return_dict is None else return_dict
        return made if as_dict else made.to_tuple()

    def _by_name(self, args: tuple[Any, ...], inputs: Mapping[str, Any]) -> dict[str, Any]:
        if not args:
            return {}
        names = [name for name, each in inspect.signature(self._origin.model.forward).parameters.items()][1:]
        if len(args) > len(names):
            raise ModelError(f"{self._origin.name} is given {len(args)} arguments without a name; name them all")
        given = dict(zip(names, args, strict=False))
        twice = [name for name in given if name in inputs]
        if twice:
            raise ModelError(f"'{twice[0]}' is given twice, by its place and by its name")
        return given

    def _dropped(self, asked: Mapping[str, bool | None]) -> set[str]:
        """Fields that the caller wants left out.

        Raises:
            ModelError: One is wanted that the file does not return.
        """
        for option, wanted in asked.items():
            if wanted and _ASKED[option][0] not in self._fields:
                raise ModelError(
                    f"{self.path} does not return {_ASKED[option][0]}; leave {option} out, or {_REMEDIES[option]}"
                )
        return {field for option, wanted in asked.items() if wanted is False for field in _ASKED[option]}

    def eval(self: _Self) -> _Self:
        """The model itself: a file has no other mode."""
        return self

    def train(self: _Self, mode: bool = True) -> _Self:
        """The model itself if ``mode`` is ``False``.

        Raises:
            ModelError: A file cannot be trained.
        """
        if mode:
            raise ModelError(f"{self.path} cannot be trained; train the PyTorch model, and export it again")
        return self

    def to(self: _Self, *args: Any, **kwargs: Any) -> _Self:
        """The model itself, if it is where and what is asked for.

        Raises:
            ModelError: Another device than the CPU, or another type.
        """
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.dtype) and value is not self.dtype:
                raise ModelError(f"{self.path} returns {self.dtype}, and cannot be converted to {value}")
            if isinstance(value, (str, int, torch.device)) and not isinstance(value, bool):
                device = torch.device(value)
                if device.type != "cpu":
                    raise ModelError(
                        f"{self.path} runs on the CPU and cannot move to {device}; give device='cpu' to a pipeline"
                    )
        return self

    def can_generate(self) -> bool:
        """No: one call is one forward, without a cache."""
        return False

    def __reduce__(self) -> tuple[Callable[[], OnnxModel], tuple[()]]:
        # A copy, or the model in another process, opens the file again.
        return self._again, ()

    def __repr__(self) -> str:
        outputs = ", ".join(port.name for port in self._session.outputs)
        where = f"{self.runtime} {self._session.version}, {self.threads} threads"
        if self.precision is not None:
            where += f", {self.precision}"
        return f"{type(self).__name__}({str(self.path)!r} on {where}: {', '.join(self.inputs)} -> {outputs})"


@cache
def _named(name: str) -> type[OnnxModel]:
    return type(name, (OnnxModel,), {"__module__": __name__, "__doc__": OnnxModel.__doc__})
