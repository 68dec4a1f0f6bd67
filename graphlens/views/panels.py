"""Which panels a heat map has: the values of each, its axes and labels, and where its colour scale begins and ends."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphlens.views.labelled import Array, Labelled
from graphlens.views.wording import number, shown


@dataclass(frozen=True)
class Panel:
    """One heat map.

    Attributes:
        title: The text above it, where there are several.
        row_axis: The name of the axis of the rows; empty without one.
        column_axis: That of the columns; empty without one.
        rows: The labels of the rows.
        columns: The labels of the columns.
        values: [rows, columns]; NaN is what is not computed yet.
        distance: From the corrupted baseline, of the same shape.
        centre: That baseline; None where it differs between the columns (prompts).
        span: The distance at which the colour scale ends.
    """

    title: str
    row_axis: str
    column_axis: str
    rows: list[str]
    columns: list[str]
    values: Array
    distance: Array
    centre: float | None
    span: float

    def clipped(self) -> Array:
        """The distances, infinite ones as the ends of the scale, since a figure would leave them out."""
        return np.clip(self.distance, -self.span, self.span)

    def scale(self) -> tuple[str, str, str]:
        """What the lowest colour, the middle one and the highest mean."""
        if self.centre is None:
            return f"baseline - {number(self.span)}", "baseline", f"baseline + {number(self.span)}"
        return number(self.centre - self.span), number(self.centre), number(self.centre + self.span)


def panels(result: Labelled) -> list[Panel]:
    """The panels of a result: its last two axes, for each index of the axes before them.

    A result of one axis is one row; "metric" is never one of the two. One metric has one colour scale in all its panels,
    so that they can be compared.
    """
    metrics = result.axes[:1] == ("metric",)
    inner = result.axes[metrics:][-2:]
    leading = result.axes[: len(result.axes) - len(inner)]
    row_axis, column_axis = ("", "", *inner)[-2:]
    row_labels = list(result.labels[row_axis]) if row_axis else [""]
    column_labels = list(result.labels[column_axis]) if column_axis else [""]
    baseline = np.broadcast_to(result.against(), result.shape)
    distance = result.values - baseline
    found = []
    for at in np.ndindex(*result.shape[: len(leading)]):
        shape = (len(row_labels), len(column_labels))
        own = baseline[at].reshape(shape)
        of_metric = distance[at[0]] if metrics else distance[...]
        finite = np.abs(of_metric[np.isfinite(of_metric)])
        names = [shown(result.labels[axis][i]) for axis, i in zip(leading, at, strict=True)]
        panel = Panel(
            title=", ".join(n if axis == "metric" else f"{axis} {n}" for axis, n in zip(leading, names, strict=True)),
            row_axis=row_axis,
            column_axis=column_axis,
            rows=[shown(label) for label in row_labels],
            columns=[shown(label) for label in column_labels],
            values=result.values[at].reshape(shape),
            distance=distance[at].reshape(shape),
            centre=float(own.flat[0]) if (own == own.flat[0]).all() else None,
            span=float(finite.max(initial=0)) or 1.0,
        )
        found.append(panel)
    return found
