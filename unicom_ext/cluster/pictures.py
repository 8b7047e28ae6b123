"""Pictures of a clustering: sizes.png, objective.png and, where images are at hand, members.png."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from unicom_ext.utils.files import write_file

PICTURES = ("sizes.png", "objective.png", "members.png")
SHOWN_CLUSTERS, SHOWN_MEMBERS = 16, 12
AREA = (0.13, 0.13, 0.85, 0.79)  # of the data; to have it worked out takes as long as to draw


def load() -> None:
    """Imports what draws, where it is there: half of what the pictures take, to be done in a thread
    beside other work. What is wrong with it `draw` will say."""
    with suppress(Exception):
        import matplotlib.backends.backend_agg
        import matplotlib.figure  # noqa: F401


def draw(
    output: Path,
    sizes: np.ndarray,
    passes: list[dict[str, Any]],
    members: list[tuple[int, np.ndarray]] | None,
) -> list[str]:
    """Writes the pictures and returns their names.

    members: (cluster, images uint8 [n, h, w] or [n, h, w, 3]) to show.
    Raises ModuleNotFoundError without matplotlib.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))
    axes = figure.add_axes(AREA, xlabel="rows in a cluster", ylabel="clusters", xscale="symlog")
    edges = np.unique(np.geomspace(1, max(sizes.max(initial=1), 2) + 1, 40).round())
    axes.hist(sizes, bins=[0, *edges.tolist()], color="#0969da", histtype="stepfilled")
    median = np.median(sizes) if len(sizes) else 0  # all may have been dissolved
    axes.set_title(
        f"{len(sizes):,} clusters, median {median:,.0f} rows, "
        f"largest {sizes.max(initial=0):,}, empty {np.count_nonzero(sizes == 0):,}"
    )
    sizes_name, objective_name, members_name = PICTURES
    _save(figure, output / sizes_name)
    names = [sizes_name]

    figure = Figure(figsize=(7, 4))
    axes = figure.add_axes(AREA, xlabel="pass", ylabel="mean cosine to the centroid")
    for kind in dict.fromkeys(p["kind"] for p in passes):
        own = [p for p in passes if p["kind"] == kind]
        axes.plot([p["pass"] for p in own], [p["objective"] for p in own], "o-", label=kind)
    if passes:
        axes.legend()
    axes.grid(alpha=0.3)
    _save(figure, output / objective_name)
    names.append(objective_name)

    if members:
        figure = Figure(figsize=(SHOWN_MEMBERS * 0.7, len(members) * 0.8))
        for row, (cluster, images) in enumerate(members):
            for column, image in enumerate(images):
                axes = figure.add_subplot(
                    len(members), SHOWN_MEMBERS, row * SHOWN_MEMBERS + column + 1
                )
                axes.imshow(image, cmap="gray", vmin=0, vmax=255)
                axes.set(xticks=[], yticks=[])
                if column == 0:
                    axes.set_ylabel(str(cluster), fontsize=7, rotation=0, ha="right", va="center")
        _save(figure, output / members_name)
        names.append(members_name)
    return names


def _save(figure: Any, path: Path) -> None:
    write_file(path, lambda file: figure.savefig(file, format="png", dpi=120))
