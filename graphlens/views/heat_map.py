"""Heat maps of what a sweep found: unicode blocks in a terminal, or figures of matplotlib or plotly.

The colour, and in a terminal also the height of a block, is the distance from the corrupted baseline: blue and low
below it, red and high above it, grey and half-high at it.
"""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from graphlens.errors import InputError, is_one_of
from graphlens.views.labelled import Array, Labelled
from graphlens.views.wording import BLOCKS, NOT_COMPUTED, PLAIN, number, shown, view_package

BACKENDS = {"terminal": (".txt",), "matplotlib": (".png", ".svg", ".pdf"), "plotly": (".html",)}
BELOW, AT, ABOVE = (33, 102, 172), (150, 150, 150), (202, 40, 54)
ROW_LABEL, COLUMN_LABEL, LEGIBLE, NARROWEST, GAP = 18, 8, 6, 3, 1  # widths in a terminal, in cells
TEXT_WIDTH = 120  # of a .txt
MAX_PANELS = 64  # of a figure


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


def plot(
    result: Labelled,
    path: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    into: Callable[[Path], contextlib.AbstractContextManager[Path]] = contextlib.nullcontext,
) -> Any:
    """Plots a result: see ``SweepResult.plot``. ``into`` gives the file to write, and puts it in place at the end."""
    target = None if path is None else Path(path)
    if backend is None:
        ending = ".txt" if target is None else target.suffix.lower()
        backend = next((name for name, endings in BACKENDS.items() if ending in endings), None)
    known = "; ".join(f"{name!r} ({', '.join(endings)})" for name, endings in BACKENDS.items())
    if backend is None:
        raise InputError(f"{path}: no plot ends in {target.suffix if target else ''!r}. There is {known}.")
    if not is_one_of(backend, BACKENDS):
        raise InputError(f"there is no backend {backend!r}. There is {known}.")
    if target is not None and target.suffix.lower() not in BACKENDS[backend]:
        raise InputError(f"{path}: {backend} writes {' and '.join(BACKENDS[backend])}.")
    drawers: dict[str, Callable[[Labelled, Path | None], Any]] = {
        "terminal": _draw_terminal,
        "matplotlib": _draw_matplotlib,
        "plotly": _draw_plotly,
    }
    try:
        if target is None:
            return drawers[backend](result, None)
        with into(target) as made:
            return drawers[backend](result, made)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error}).") from error


# In a terminal


class HeatMap:
    """A rich renderable of a result; columns that do not fit beside each other go below each other."""

    def __init__(self, result: Labelled) -> None:
        self._panels = panels(result)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines of every panel, for a console of ``options.max_width``."""
        for at, panel in enumerate(self._panels):
            if at:
                yield Text()
            for line in _lines(panel, options.max_width):
                line.rstrip()
                line.no_wrap, line.overflow = True, "ellipsis"
                if options.ascii_only:
                    line.plain = line.plain.translate(PLAIN)
                yield line


def _lines(panel: Panel, width: int) -> Iterator[Text]:
    """The lines of one panel in so many cells."""
    if panel.title:
        yield Text(panel.title, style="bold")
    margin = min(ROW_LABEL, width // 3, max(map(cell_len, (*panel.rows, panel.row_axis))))
    room = max(width - margin - GAP, NARROWEST + GAP)
    widest = min(COLUMN_LABEL, max(map(cell_len, panel.columns)))
    cell = max(NARROWEST, min(widest, max(LEGIBLE, room // len(panel.columns) - GAP)))
    beside = max(1, room // (cell + GAP))
    if panel.column_axis:
        yield Text(f"{_fitted(panel.row_axis, margin)} {panel.column_axis} →", style="dim")
    for start in range(0, len(panel.columns), beside):
        part = slice(start, start + beside)
        if panel.column_axis:
            names = " ".join(_fitted(name, cell) for name in panel.columns[part])
            yield Text(f"{'':{margin}} {names}")
        for name, distances in zip(panel.rows, panel.distance, strict=True):
            line = Text(_fitted(name, margin))
            for distance in distances[part]:
                block, style = block_at(distance, panel.span)
                line.append(" ").append(block * cell if block != NOT_COMPUTED else f"{block:{cell}}", style)
            yield line
    legend = Text()
    for value, text in zip((-1.0, 0.0, 1.0), panel.scale(), strict=True):
        block, style = block_at(value, 1.0)
        legend.append(block, style).append(f" {text}{' (unpatched)' if value == 0 else ''}  ")
    if np.isnan(panel.values).any():
        legend.append(f"{NOT_COMPUTED} not computed yet")
    yield legend


def _fitted(label: str, width: int) -> str:
    """The label in exactly ``width`` cells, an ellipsis where it is cut."""
    text = Text(label)
    text.truncate(width, overflow="ellipsis", pad=True)
    return text.plain


def block_at(distance: float, span: float) -> tuple[str, str]:
    """How a distance looks in a terminal.

    Args:
        distance: From the baseline; NaN where the value is not computed yet.
        span: The distance at which the scale ends; what lies beyond looks like its end.

    Returns:
        (block character, rich style).
    """
    if np.isnan(distance):
        return NOT_COMPUTED, "dim"
    share = float(np.clip(distance / span, -1, 1))
    end = ABOVE if share > 0 else BELOW
    red, green, blue = (round(a + (b - a) * abs(share)) for a, b in zip(AT, end, strict=True))
    middle = len(BLOCKS) // 2
    return BLOCKS[middle + round(share * middle)], f"rgb({red},{green},{blue})"


def _draw_terminal(result: Labelled, target: Path | None) -> None:
    """Prints the heat map, or writes it as text."""
    if target is None:
        return Console().print(HeatMap(result))
    with target.open("w", encoding="utf-8", newline="\n") as file:
        console = Console(file=file, width=TEXT_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
        console.print(HeatMap(result))


# Figures


def _figure_panels(result: Labelled) -> list[Panel]:
    """The panels of a figure. Raises InputError for too many."""
    found = panels(result)
    if len(found) > MAX_PANELS:
        raise InputError(f"{len(found)} panels are too many for a figure ({MAX_PANELS}): select some with sel().")
    return found


def _draw_matplotlib(result: Labelled, target: Path | None) -> Any:
    """A figure of matplotlib, written where there is a target."""
    # Not pyplot: it keeps every figure, and picks a window system.
    figure_type = view_package("matplotlib.figure", "plotting with matplotlib").Figure
    shown_panels = _figure_panels(result)
    widest = max(len(panel.columns) for panel in shown_panels)
    heights = [1.6 + 0.3 * len(panel.rows) for panel in shown_panels]
    figure = figure_type(figsize=(3 + 0.45 * widest, sum(heights)), layout="constrained")
    drawn = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, panel in zip(drawn, shown_panels, strict=True):
        image = axes.imshow(panel.clipped(), "RdBu_r", vmin=-panel.span, vmax=panel.span, aspect="auto")
        axes.set_facecolor("lightgrey")  # seen where nothing is computed yet
        ticks: tuple[tuple[Callable[..., None], list[str], dict[str, str | int]], ...] = (
            (axes.set_xticks, panel.columns, {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}),
            (axes.set_yticks, panel.rows, {}),
        )
        for set_ticks, labels, style in ticks:
            # A token may hold two dollar signs.
            set_ticks(range(len(labels)), labels, parse_math=False, **style)
        axes.set_xlabel(panel.column_axis, parse_math=False)
        axes.set_ylabel(panel.row_axis, parse_math=False)
        axes.set_title(panel.title, parse_math=False)
        bar = figure.colorbar(image, ax=axes)
        bar.set_ticks([-panel.span, 0, panel.span], labels=panel.scale())
    if target is not None:
        figure.savefig(target)
    return figure


def _draw_plotly(result: Labelled, target: Path | None) -> Any:
    """A figure of plotly, written where there is a target."""
    graph_objects = view_package("plotly.graph_objects", "plotting with plotly")
    subplots = view_package("plotly.subplots", "plotting with plotly")
    shown_panels = _figure_panels(result)
    count = len(shown_panels)
    figure = subplots.make_subplots(
        rows=count,
        cols=1,
        subplot_titles=[_escaped(panel.title) for panel in shown_panels],
        vertical_spacing=0.4 / count,
    )
    for at, panel in enumerate(shown_panels):
        rows, columns = ([_escaped(label) for label in labels] for labels in (panel.rows, panel.columns))
        hover = [
            [f"{row}, {column}: {number(value)}" for column, value in zip(columns, values, strict=True)]
            for row, values in zip(rows, panel.values, strict=True)
        ]
        heat = graph_objects.Heatmap(
            z=[[None if np.isnan(value) else value for value in row] for row in panel.clipped().tolist()],
            zmin=-panel.span,
            zmax=panel.span,
            colorscale="RdBu",
            reversescale=True,
            text=hover,
            hoverinfo="text",
            colorbar={
                "tickvals": [-panel.span, 0, panel.span],
                "ticktext": panel.scale(),
                "len": 0.8 / count,
                "y": 1 - (at + 0.5) / count,
            },
        )
        figure.add_trace(heat, row=at + 1, col=1)
        # By index: two positions may hold the same token, and plotly would make one of them.
        for update, axis, labels, extra in (
            (figure.update_xaxes, panel.column_axis, columns, {}),
            (figure.update_yaxes, panel.row_axis, rows, {"autorange": "reversed"}),
        ):
            ticks = {"tickvals": list(range(len(labels))), "ticktext": labels}
            update(title_text=_escaped(axis), **ticks, **extra, row=at + 1, col=1)
    figure.update_layout(height=sum(150 + 24 * len(panel.rows) for panel in shown_panels))
    if target is not None:
        figure.write_html(target, include_plotlyjs=True, div_id="graphlens")
    return figure


def _escaped(label: str) -> str:
    """Text that plotly shows as it is: it reads tags."""
    return html.escape(label, quote=False)
