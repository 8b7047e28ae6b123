"""Results of methods side by side: a table, and Recall@1 against the number of dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from unicom_ext.report import charts

OURS, COLOURS = "k0", 7  # classes of the style sheet: k1 .. k7 are the others'


@dataclass(frozen=True)
class Methods:
    """results  by the name of the method, in the order to show: what retrieval found at each
                number of dimensions, as metrics.json has it. Only `dim` and `recall` must be there
    ours        the one that stands out, with all its figures; "" for none
    """

    results: Mapping[str, Sequence[Mapping[str, Any]]]
    ours: str = ""

    @property
    def dims(self) -> list[int]:
        return sorted({result["dim"] for results in self.results.values() for result in results})

    @property
    def own(self) -> Sequence[Mapping[str, Any]]:
        """The results of ours."""
        return self.results.get(self.ours, ())

    def recall(self, name: str, dim: int) -> float | None:
        """Recall@1; None where the method has none at these dimensions."""
        found = self._at(name, dim)
        return None if found is None else found["recall"]["1"]

    def interval(self, name: str, dim: int) -> tuple[float, float] | None:
        """Of Recall@1."""
        found = self._at(name, dim)
        return None if found is None else interval(found, "Recall@1")

    @property
    def has_intervals(self) -> bool:
        return any(self.interval(name, dim) for name in self.results for dim in self.dims)

    def is_best(self, name: str, dim: int) -> bool:
        """Whether no other one has a higher Recall@1."""
        recalls = [r for other in self.results if (r := self.recall(other, dim)) is not None]
        return bool(recalls) and self.recall(name, dim) == max(recalls)

    def kind(self, name: str) -> str:
        """The classes of its line."""
        if name == self.ours:
            return OURS
        place = [other for other in self.results if other != self.ours].index(name)
        return f"k{1 + place % COLOURS}" + " dashed" * (place >= COLOURS)

    @property
    def legend(self) -> list[tuple[str, str]]:
        return [(self.kind(name), name) for name in self.results]

    def chart(self) -> Markup:
        """Recall@1 against dimensions; nothing where there is one number of them."""
        if len(self.dims) < 2:
            return Markup("")
        names = sorted(self.results, key=lambda name: name == self.ours)  # the last is on top
        drawn = []
        for name in names:
            results = sorted(self.results[name], key=lambda result: result["dim"])
            bands = [interval(result, "Recall@1") for result in results]
            drawn.append(
                charts.Line(
                    [result["dim"] for result in results],
                    [result["recall"]["1"] for result in results],
                    self.kind(name),
                    [band for band in bands if band] if all(bands) else (),
                )
            )
        alt = "Recall@1 of each method against the number of dimensions, as in the table"
        return charts.lines(alt, "dimensions", "Recall@1", drawn, x_ticks=self.dims)

    def _at(self, name: str, dim: int) -> Mapping[str, Any] | None:
        return next((result for result in self.results[name] if result["dim"] == dim), None)


def figures(result: Mapping[str, Any]) -> dict[str, float]:
    """The averages of a result by the names that their intervals have. A run of version 0.1 has no
    others than Recall@K and mAP@R."""
    found = {f"Recall@{k}": value for k, value in result["recall"].items()}
    for key, name in (("map_at_r", "mAP@R"), ("r_precision", "R-precision")):
        if key in result:
            found[name] = result[key]
    return found | {f"mAP@{k}": value for k, value in result.get("map_at_k", {}).items()}


def interval(result: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """Where a figure lies with 95 %; None where that was not computed."""
    found = (result.get("intervals") or {}).get(name)
    return None if found is None else (found[0], found[1])
