"""The table of what each part costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qdq_surgery.sensitivity.parts import KIND, LAYER, SITE
from qdq_surgery.text.layer_names import by_layers, star
from qdq_surgery.text.view import Column, Line, Part, Result, Table, data_words, line, number

__all__ = ["Cost", "Sensitivity"]


@dataclass(frozen=True)
class Cost:
    """What one part costs at the model's output.

    Attributes:
        what: ``"site"``, ``"kind"`` or ``"layer"``.
        name: The quantizer's; rule and operand, such as ``residual-add(local)``; or the path of the layer.
        layers: Of a site or a layer: its index, or, of rows folded, those of all; ``None`` where there is none.
        quantizers: How many they are.
        alone: The error where only they are in INT8.
        left: The error where they are in float and everything else is in INT8.
        gain: What leaving them in float gains: the error of the whole model in INT8, less ``left``.
        outliers: How many times the median channel each outlier channel of what they see is, the largest first.
    """

    what: str
    name: str
    layers: str | None
    quantizers: int
    alone: float
    left: float
    gain: float
    outliers: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Sensitivity(Result):
    """What :func:`sensitivity` measured.

    Attributes:
        metric: ``mse``, ``cosine`` or ``kl``; or the name of the user's function.
        costs: The largest error alone in INT8 first.
        float_score: What the user's metric is for the float model; ``None`` with any other metric.
        int8: The error of the model in INT8, as all the others: with a user's metric, by how much it falls.
        batches, rows, tokens: How much data it was; padding is no token.
    """

    metric: str
    costs: tuple[Cost, ...]
    float_score: float | None
    int8: float
    batches: int
    rows: int
    tokens: int

    def of(self, what: str) -> tuple[Cost, ...]:
        """The costs of sites, of kinds or of layers alone.

        Args:
            what: ``"site"``, ``"kind"`` or ``"layer"``.
        """
        return tuple(each for each in self.costs if each.what == what)

    def folded(self) -> Sensitivity:
        """The same with sites that differ only in their layer as one row: that of the worst, with all their layers."""
        layers = by_layers((_starred(each), _index(each)) for each in self.costs)
        worst: dict[tuple[str, str], Cost] = {}
        for each in self.costs:
            worst.setdefault(_starred(each), each)
        folded = (replace(each, name=key[1], layers=layers[key] or each.layers) for key, each in worst.items())
        return replace(self, costs=tuple(folded))

    def to_json(self) -> dict[str, Any]:
        """As plain data; ``schema`` is the version of this form."""
        return {"schema": 1, **asdict(self)}

    def _title(self) -> Line:
        data = data_words(self.batches, self.rows, self.tokens)
        whole = f"the whole model in INT8: {_shown(self.int8)}"
        if self.float_score is None:
            return line(f"{self.metric} at the output against the float model, on {data}; {whole}")
        return line(f"fall of {self.metric} from {_shown(self.float_score)}, on {data}; {whole}")

    def _parts(self) -> Iterable[Part]:
        for what in (LAYER, KIND, SITE):
            costs = self.of(what)
            if costs:
                yield ""
                yield _table(what, costs)


def _starred(cost: Cost) -> tuple[str, str]:
    return cost.what, star(cost.name, _index(cost)) if cost.what == SITE else cost.name


def _index(cost: Cost) -> int | None:
    return int(cost.layers) if cost.layers is not None and cost.layers.isdecimal() else None


def _table(what: str, costs: Sequence[Cost]) -> Table:
    """Columns that have nothing to say are left out."""
    folded = any("*" in each.name for each in costs)
    cells = {
        Column(what): [each.name for each in costs],
        Column("layers", wraps=False): [each.layers or "" if folded else "" for each in costs],
        number("quantizers"): ["" if what == SITE else str(each.quantizers) for each in costs],
        number("INT8 alone"): [_shown(each.alone) for each in costs],
        number("float alone"): [_shown(each.left) for each in costs],
        number("gain"): [_shown(each.gain) for each in costs],
        Column("outlier channels"): [_named(each) for each in costs],
    }
    kept = {column: words for column, words in cells.items() if any(words)}
    return Table(tuple(kept), tuple(zip(*kept.values(), strict=True)))


def _named(cost: Cost) -> str:
    return ", ".join(f"{channel} ({ratio:.3g} x)" for channel, ratio in cost.outliers.items())


def _shown(value: float) -> str:
    return f"{value + 0.0:.3g}"  # of -0, which nothing that fell is, 0
