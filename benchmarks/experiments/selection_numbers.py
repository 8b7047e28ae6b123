"""What the records of `partial_selection.py` say: means over seeds and differences in pairs.

A difference is that to full softmax of the same seed, so that what a seed brings with it, above all
easy or hard test classes, cancels. Intervals are Student's, at 95 %, each for itself. A difference
is marked as significant where its p-value holds at 5 % after Holm's correction for all comparisons
of its table.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from methods import DIMS, FULL, METHODS, Method
from scipy import special

LEVEL = 0.95
# Title, dimensions and measure of each table.
MEASURES = {
    "Recall@1 at leading dimensions": ("leading", "recall"),
    "Recall@1 at random dimensions": ("random", "recall"),
    "mAP@R at leading dimensions": ("leading", "map_at_r"),
}
PRIMARY = Method("partial", 0.3, 0.5), "joint", 16  # the question asked first
PCA_ROW = "PCA of full"
CHOSEN_ROW = "r1, r2 chosen on validation"

Curve = dict[str, float]  # by dimension
Series = dict[int, Curve]  # by seed


class Interval(NamedTuple):
    """half: of its width. p: that the mean is 0, two-sided. None of both with one value alone."""

    mean: float
    half: float | None
    p: float | None
    n: int


def interval(values: Sequence[float]) -> Interval:
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return Interval(mean, None, None, n)
    error = float(np.std(values, ddof=1)) / n**0.5
    half = float(special.stdtrit(n - 1, (1 + LEVEL) / 2)) * error
    p = 2 * float(special.stdtr(n - 1, -abs(mean) / error)) if error else float(mean == 0)
    return Interval(mean, half, p, n)


def paired(series: Series, other: Series, dim: str) -> Interval:
    """Of the differences at the seeds that both have."""
    return interval([series[s][dim] - other[s][dim] for s in sorted(series.keys() & other.keys())])


def holm(p_values: Sequence[float], level: float = 1 - LEVEL) -> list[bool]:
    """Which are significant, so that with probability 1 - level no true null hypothesis is."""
    significant = [False] * len(p_values)
    for rank, at in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if not p_values[at] <= level / (len(p_values) - rank):
            break
        significant[at] = True
    return significant


def numbers(records: list[dict[str, Any]]) -> dict[str, Any]:
    """By set of pictures and kind of labels: tables, what was tuned, and what labels were like."""
    parts: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        parts[record["data"]][record["labels"]].append(record)
    return {
        data: {labels: _numbers(of_labels) for labels, of_labels in of_data.items()}
        for data, of_data in parts.items()
    }


def _numbers(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one set of pictures and one kind of labels."""
    tests: dict[Method, dict[int, dict[str, Any]]] = defaultdict(dict)
    tuning: dict[Method, dict[str, float]] = defaultdict(dict)
    for record in records:
        method = Method(record["name"], record["sample_rate"], record["feature_rate"])
        if record["stage"] == "test":
            tests[method][record["seed"]] = record
        else:
            recall = record["results"]["leading"]["recall"]
            tuning[method][record["candidate"]] = float(np.mean(list(recall.values())))
    best = _best_cell(tuning)
    tables = {title: _table(_rows(tests, *measure)) for title, measure in MEASURES.items()}
    if best in tests:
        for table in tables.values():
            table[CHOSEN_ROW] = table[best.title]
    return {
        "tables": tables,
        "tuning": {
            method.title: tuning[method] for method in METHODS if method in tuning
        },
        "chosen": None if best is None else best.title,
        "labels": _label_facts(records),
        "seconds": float(np.median([r["seconds"] for r in records if r["stage"] == "test"] or [0])),
        "machines": sorted({f"{m['cpu']}, {m['capability']}, torch {m['torch']}, commit "
                            f"{m['git_commit']}" for m in (r["machine"] for r in records)}),
        "recipe": records[0]["recipe"],
    }  # fmt: skip


def _best_cell(tuning: dict[Method, dict[str, float]]) -> Method | None:
    """The point of the grid that did best on the validation classes; None until all have been."""
    grid = [method for method in tuning if method.name == "partial"]
    if not grid or any(len(tuning[method]) < len(method.candidates) for method in grid):
        return None
    return max(grid, key=lambda method: max(tuning[method].values()))


def _rows(
    tests: dict[Method, dict[int, dict[str, Any]]], dims: str, measure: str
) -> dict[str, Series]:
    def series(method: Method, which: str = dims) -> Series:
        return {seed: r["results"][which][measure] for seed, r in tests[method].items()}

    rows = {method.title: series(method) for method in METHODS if method in tests}
    if FULL in tests and dims == "leading":
        rows[PCA_ROW] = series(FULL, "pca")
    return rows


def _table(rows: dict[str, Series]) -> dict[str, Any]:
    """Rows of {dimension: {mean, half, n, difference}}, the difference without full softmax."""
    full = rows.get(FULL.title)
    table: dict[str, Any] = {}
    compared = []
    for title, series in rows.items():
        table[title] = {}
        for dim in (str(d) for d in DIMS if str(d) in next(iter(series.values()))):
            values = interval([curve[dim] for curve in series.values()])
            cell = table[title][dim] = values._asdict()
            del cell["p"]
            if full and title != FULL.title and series.keys() & full.keys():
                cell["difference"] = {**paired(series, full, dim)._asdict(), "significant": False}
                compared.append(cell["difference"])
    compared = [difference for difference in compared if difference["p"] is not None]
    significant = holm([difference["p"] for difference in compared])
    for difference, is_significant in zip(compared, significant, strict=True):
        difference["significant"] = is_significant
    return table


def _label_facts(records: list[dict[str, Any]]) -> dict[str, float]:
    """Means over seeds of what is known of the labels."""
    of_seed = {r["seed"]: r["classes"] for r in records if r["stage"] == "test"}
    names = next(iter(of_seed.values()), {})
    return {name: float(np.mean([facts[name] for facts in of_seed.values()])) for name in names}
