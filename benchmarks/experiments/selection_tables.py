"""The numbers of `selection_numbers.py` for people: Markdown, and pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from methods import FULL, GRID, RATES, SMALL_SCALE, Method
from picture_sets import LABELS
from selection_numbers import MEASURES, PCA_ROW, PRIMARY, numbers
from tables import Table

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

LEADING = next(iter(MEASURES))
HEAT_DIMS = ("16", "128")
WORDS = """\
Mean over seeds ± half of a 95 % interval (Student). Differences are to full softmax of the same
seed. A star: significant at 5 % after Holm's correction for all comparisons of the table; what has
none is not shown to differ.
"""


def write(records: list[dict[str, Any]], stem: Path) -> list[Path]:
    """STEM.md, and beside it two plots of each set of pictures."""
    found = numbers(records)
    paths = [stem.with_suffix(".md")]
    paths[0].write_text(markdown(found))
    for data, of_data in found.items():
        tested = {labels: of_data[labels]["tables"][LEADING] for labels in LABELS
                  if labels in of_data and of_data[labels]["tables"][LEADING]}  # fmt: skip
        for name, draw in (("curves", _curves), ("grid", _heat_maps)):
            if tested:
                paths.append(stem.parent / f"{data}-{name}.png")
                figure = draw(tested)
                figure.suptitle(data)
                figure.savefig(paths[-1], dpi=120)
                plt.close(figure)
    return paths


def markdown(found: dict[str, Any]) -> str:
    parts = [f"# Partial selection: {', '.join(found)}\n", WORDS]
    for data, of_data in found.items():
        for labels in LABELS:
            if labels in of_data and of_data[labels]["tables"][LEADING]:  # not tuned alone
                parts += [f"## {data}, {labels} labels\n", *_section(labels, of_data[labels])]
    return "\n".join(parts)


def _section(labels: str, part: dict[str, Any]) -> list[str]:
    tables = part["tables"]
    lines = []
    method, kind, dim = PRIMARY
    asked = tables[LEADING].get(method.title, {}).get(str(dim), {})
    d = asked.get("difference", {"p": None})
    if labels == kind and d["p"] is not None:
        lines.append(
            f"Asked first: {method.title} at {dim} dimensions differs from full softmax by "
            f"{_cell(d, '+.4f')} (p = {d['p']:.2g}, {d['n']} seeds, one comparison).\n"
        )
    facts = ", ".join(f"{name} {value:.4g}" for name, value in part["labels"].items())
    lines += [f"- labels: {facts}", f"- best on the validation classes: {part['chosen']}"]
    lines += [f"- {', '.join(f'{k} {v:g}' for k, v in part['recipe'].items())}; "
              f"{part['seconds']:.0f} s for a run (median)"]  # fmt: skip
    lines += [*(f"- {machine}" for machine in part["machines"]), ""]
    for title, rows in tables.items():
        if rows:
            lines += [t.markdown() for t in _level_and_difference(title, rows)]
    tuned = [
        [title, *(f"{c}: {recall:.4f}" for c, recall in candidates.items())]
        for title, candidates in part["tuning"].items()
    ]
    if tuned:
        header = ["", *[""] * (max(map(len, tuned)) - 1)]
        lines.append(Table("Tuning: mean Recall@1 by candidate", header, tuned).markdown())
    return lines


def _level_and_difference(title: str, rows: dict[str, Any]) -> list[Table]:
    dims = list(next(iter(rows.values())))
    levels, differences = [], []
    for row, cells in rows.items():
        seeds = str(cells[dims[0]]["n"])
        levels.append([row, *(_cell(cells[dim], ".3f") for dim in dims), seeds])
        if all("difference" in cells[dim] for dim in dims):
            of_dims = [cells[dim]["difference"] for dim in dims]
            shown = [_cell(d, "+.4f") + "*" * d["significant"] for d in of_dims]
            differences.append([row, *shown, str(of_dims[0]["n"])])
    header = ["", *dims, "seeds"]
    tables = [Table(title, header, levels)]
    if differences:
        tables.append(Table(f"{title}: difference to full softmax", header, differences))
    return tables


def _cell(value: dict[str, Any], form: str) -> str:
    half = "" if value["half"] is None else f" ± {value['half']:{form.lstrip('+')}}"
    return f"{value['mean']:{form}}{half}"


# ---- plots ---------------------------------------------------------------------------------------

CURVES = {
    FULL.title: "full softmax",
    PCA_ROW: PCA_ROW,
    **{m.title: m.title for m in (
        Method("matryoshka"), Method("softmax"), Method("filter"), Method("partial", 0.3, 1.0),
        Method("partial", 1.0, 0.5), Method("partial", 0.3, 0.5), *SMALL_SCALE,
    )},
}  # fmt: skip


def _curves(tested: dict[str, Any]) -> plt.Figure:
    """Recall@1 against the number of dimensions, and below it the differences to full softmax, with
    the intervals of these; a column for each kind of labels."""
    figure, panels = plt.subplots(
        2, len(tested), figsize=(2.6 + 3.4 * len(tested), 7.5), layout="constrained", squeeze=False,
        sharex=True, sharey="row",
    )  # fmt: skip
    for (levels, differences), (labels, rows) in zip(panels.T, tested.items(), strict=True):
        for number, (row, name) in enumerate(CURVES.items()):
            if row not in rows:
                continue
            dims = np.array([int(dim) for dim in rows[row]])
            cells = list(rows[row].values())
            style = {"label": name, "color": f"C{number}", "lw": 1.2}
            levels.plot(dims, [cell["mean"] for cell in cells], marker=".", **style)
            if row == FULL.title:
                differences.axhline(0, **style)
                continue
            d = [cell["difference"] for cell in cells]
            # A little apart, so that intervals do not hide each other.
            x = dims * 2 ** (0.08 * (number - len(CURVES) / 2))
            halves = [value["half"] or 0 for value in d]
            differences.errorbar(x, [v["mean"] for v in d], yerr=halves, capsize=2, **style)
        levels.set_title(f"{labels} labels")
        differences.set(xlabel="leading dimensions", xscale="log")
        differences.set_xticks(dims, [str(dim) for dim in dims])
        differences.minorticks_off()
    panels[0][0].set_ylabel("Recall@1, test classes")
    panels[1][0].set_ylabel("difference to full softmax, 95 % interval")
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=2 * len(tested), fontsize="small")
    return figure


def _heat_maps(tested: dict[str, Any]) -> plt.Figure:
    """Difference to full softmax over r1 and r2: rows of panels are dimensions, columns labels. If
    some kinds of labels have the whole grid, these alone."""
    grid = {method.title for method in GRID}
    whole = {labels: rows for labels, rows in tested.items() if grid <= rows.keys()}
    tested = whole or tested
    figure, panels = plt.subplots(
        len(HEAT_DIMS), len(tested), figsize=(1.6 + 3.4 * len(tested), 6), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    grids = {
        (dim, labels): _grid(rows, dim) for labels, rows in tested.items() for dim in HEAT_DIMS
    }
    finite = np.concatenate([g[np.isfinite(g)] for g in grids.values()])
    limit = max(np.abs(finite).max(initial=0), 1e-3)
    for (dim, labels), grid in grids.items():
        panel = panels[HEAT_DIMS.index(dim)][list(tested).index(labels)]
        image = _heat_map(panel, grid, limit)
        panel.set_title(f"{labels} labels, {dim} dimensions", fontsize="small")
    figure.colorbar(image, ax=panels, label="Recall@1, difference to full softmax", shrink=0.7)
    return figure


def _grid(rows: dict[str, Any], dim: str) -> np.ndarray:
    """[r1, r2] of mean differences; NaN where there is none."""
    grid = np.full(tuple(map(len, RATES)), np.nan)
    for i, r1 in enumerate(RATES[0]):
        for j, r2 in enumerate(RATES[1]):
            cell = rows.get(Method("partial", r1, r2).title, {}).get(dim, {})
            grid[i, j] = cell.get("difference", {"mean": np.nan})["mean"]
    return grid


def _heat_map(panel: Axes, grid: np.ndarray, limit: float) -> Any:
    image = panel.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit)
    for (i, j), value in np.ndenumerate(grid):
        text = "0" if i == j == 0 else "" if np.isnan(value) else f"{value:+.3f}"
        dark = abs(value) > 0.6 * limit
        panel.text(j, i, text, ha="center", va="center", fontsize=8, color="w" if dark else "k")
    panel.set_yticks(range(len(RATES[0])), [f"{r:g}" for r in RATES[0]])
    panel.set_xticks(range(len(RATES[1])), [f"{r:g}" for r in RATES[1]])
    panel.set(ylabel="r1, classes", xlabel="r2, dimensions")
    return image
