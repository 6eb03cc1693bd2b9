"""Which parameters are one: what transformers ties by its own lists, and what is one object already."""

from __future__ import annotations

from torch import nn

__all__ = ["tied_names"]


def tied_names(model: nn.Module, name: str) -> list[str]:
    """The other names of a parameter, such as that of the decoder whose weight is the table of the word embeddings.

    While transformers loads a model, weights that are going to be tied are objects of their own yet.

    Args:
        name: Qualified name of a parameter of ``model``.
    """
    lists: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    parameters = dict(model.named_parameters(remove_duplicate=False))
    first = lists.get(name, name)
    one = parameters.get(name)
    return [
        other
        for other, parameter in parameters.items()
        if other != name and (parameter is one or lists.get(other, other) == first)
    ]
