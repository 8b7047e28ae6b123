"""The course of a training: its loss, Recall@1 on the way, and how fast it went."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from markupsafe import Markup

from unicom_ext.report import charts
from unicom_ext.report.methods import interval

POINTS = 60  # of the line of the loss, at most
PARTS = {"validation": "k1", "test": "k0"}


@dataclass(frozen=True)
class Training:
    """loss         of each step
    evaluations  on the way, as metrics.json has them; one without a `part` is of the test images
    seconds      of each phase; "waiting" is the part of "training" in which no images were there
    images       how many the steps have seen together; 0: not known
    """

    loss: Sequence[float]
    evaluations: Sequence[Mapping[str, Any]] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)
    images: int = 0

    @property
    def window(self) -> int:
        """Steps that are averaged for a point of the line."""
        return -(-len(self.loss) // POINTS)

    def loss_chart(self) -> Markup:
        loss = np.array(self.loss, dtype=np.float64)
        loss[~np.isfinite(loss)] = np.nan
        x, y, band = [], [], []
        for start in range(0, len(loss), max(self.window, 1)):
            piece = loss[start : start + self.window]
            piece = piece[~np.isnan(piece)]
            if len(piece):
                x.append(start + (self.window + 1) / 2)
                y.append(float(piece.mean()))
                band.append((float(piece.min()), float(piece.max())))
        line = charts.Line(x, y, "k0", band if self.window > 1 else (), dots=len(x) == 1)
        alt = f"Loss of {len(loss)} steps" + (f", from {y[0]:.3g} to {y[-1]:.3g}" if y else "")
        return charts.lines(alt, "step", "loss", [line], from_zero=True)

    def parts(self) -> dict[str, list[Mapping[str, Any]]]:
        """The evaluations by what they are of."""
        found: dict[str, list[Mapping[str, Any]]] = {}
        for evaluation in self.evaluations:
            found.setdefault(evaluation.get("part", "test"), []).append(evaluation)
        return found

    def legend(self, noun: str) -> list[tuple[str, str]]:
        """What the lines of `recall_chart` are of."""
        return [(PARTS[part], f"{part} {noun}") for part in self.parts()]

    def recall_chart(self) -> Markup:
        """Recall@1 at the most dimensions against the step; nothing where it is known once."""
        if len(self.evaluations) < 2:
            return Markup("")
        drawn = []
        for part, evaluations in self.parts().items():
            last = [evaluation["results"][-1] for evaluation in evaluations]
            bands = [interval(result, "Recall@1") for result in last]
            drawn.append(
                charts.Line(
                    [evaluation["step"] for evaluation in evaluations],
                    [result["recall"]["1"] for result in last],
                    PARTS[part],
                    [band for band in bands if band] if all(bands) else (),
                )
            )
        alt = "Recall@1 against the step, of " + " and ".join(self.parts())
        return charts.lines(alt, "step", "Recall@1", drawn)

    @property
    def speed(self) -> str:
        """A sentence; "" where nothing is known."""
        took = self.seconds.get("training", 0.0)
        if not took:
            return ""
        per = f"{self.images / took:,.0f} images" if self.images else ""
        text = f"{per or f'{len(self.loss) / took:,.1f} steps'} a second"
        if "waiting" in self.seconds:
            text += f", {self.seconds['waiting'] / took:.0%} of the time waiting for images"
        return text + "."
