"""A deployed folder for Hugging Face's text-embeddings-inference, a server whose ONNX backend reads one name only.

Source: ``backends/ort/src/lib.rs`` of huggingface/text-embeddings-inference. It opens ``model.onnx`` or
``onnx/model.onnx``, gives it what its inputs are named, and reads ``last_hidden_state``, which it pools as 1_Pooling
says, or a classifier's ``logits``. Of config.json it wants the sizes under BERT's names.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from qdq_surgery.deployment.folder import FILE
from qdq_surgery.errors import OptionError
from qdq_surgery.targets.target import Target

__all__ = ["SERVED", "check_ports", "check_served", "write_served"]

#: The name that the server looks for.
SERVED = FILE.with_name("model.onnx")

_RUNTIME = "onnxruntime"

_SIZES = ("hidden_size", "num_hidden_layers")

#: What it gives: two always, the others to a file that takes them.
_ALWAYS, _ASKED_FOR = ("input_ids", "attention_mask"), ("token_type_ids", "position_ids")

#: What it reads, and with how many axes.
_READ = {"last_hidden_state": 3, "logits": 2}


def check_served(target: Target, config: Any) -> None:
    """Whether the server can take a file for this target, of a model with this config.

    Raises:
        OptionError: It cannot.
    """
    if target.session is None or target.session.runtime != _RUNTIME:
        raise OptionError(
            f"--tei: text-embeddings-inference runs ONNX Runtime, and the file is for {target.title}; give "
            "--target onnxruntime"
        )
    own = config.to_dict()  # what config.json will say, without names that stand for others
    missing = [name for name in _SIZES if not isinstance(own.get(name), int)]
    if missing:
        raise OptionError(
            f"--tei: text-embeddings-inference wants {' and '.join(missing)} in config.json, and a {config.model_type} "
            "has no such sizes; leave it out"
        )


def write_served(draft: Path, target: Target) -> None:
    """Write the file under the server's name into a deployed folder.

    Args:
        draft: The folder, which has the file.

    Raises:
        OptionError: The file takes what the server does not give, or gives nothing that it reads.
    """
    assert target.session is not None
    session = target.session(draft / FILE)
    check_ports({port.name for port in session.inputs}, {port.name: len(port.shape) for port in session.outputs})
    # Weights that lie beside the one file are found by the other, too.
    shutil.copy(draft / FILE, draft / SERVED)


def check_ports(takes: Set[str], gives: Mapping[str, int]) -> None:
    """Whether the server can feed a file, or a model, and read it.

    Args:
        takes: The names of its inputs.
        gives: How many axes each of its outputs has, by name.

    Raises:
        OptionError: It takes what the server does not give, or gives nothing that it reads.
    """
    wrong = sorted((takes - {*_ALWAYS, *_ASKED_FOR}) | (set(_ALWAYS) - takes))
    if wrong:
        raise OptionError(
            f"--tei: text-embeddings-inference gives {', '.join(_ALWAYS)} and on demand {', '.join(_ASKED_FOR)}, and "
            f"the file differs in {', '.join(wrong)}; leave it out"
        )
    if not any(_READ.get(name) == axes for name, axes in gives.items()):
        given = ", ".join(f"{name} with {axes} axes" for name, axes in gives.items())
        raise OptionError(
            "--tei: text-embeddings-inference reads last_hidden_state, or logits of whole texts, and the file gives "
            f"{given}; leave it out"
        )
