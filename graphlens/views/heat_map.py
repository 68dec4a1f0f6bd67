"""Heat maps of what a sweep found: in a terminal (see ``terminal_map``), or as figures of matplotlib or plotly.

The colour is the distance from the corrupted baseline: blue below it, red above it, white at it.
"""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from graphlens.errors import InputError, is_one_of
from graphlens.views.labelled import Labelled
from graphlens.views.panels import Panel as Panel
from graphlens.views.panels import panels as panels
from graphlens.views.terminal_map import HeatMap as HeatMap
from graphlens.views.terminal_map import draw
from graphlens.views.wording import number, view_package

BACKENDS = {"terminal": (".txt",), "matplotlib": (".png", ".svg", ".pdf"), "plotly": (".html",)}
MAX_PANELS = 64  # of a figure


def plot(
    result: Labelled,
    path: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    into: Callable[[Path], contextlib.AbstractContextManager[Path]] = contextlib.nullcontext,
) -> Any:
    """Plots a result: see ``SweepResult.plot``. ``into`` gives the file to write, and puts it in place at the end."""
    target = None if path is None else Path(path)
    backend = backend_of(target, backend)
    drawers: dict[str, Callable[[Labelled, Path | None], Any]] = {
        "terminal": draw,
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


def backend_of(target: Path | None, backend: str | None = None) -> str:
    """Which of BACKENDS draws a file.

    Args:
        target: The file; None for none.
        backend: The one that is asked for; None takes the one of the file's ending, and the terminal without a file.

    Raises:
        InputError: There is no such backend, or it writes no such file.
    """
    if backend is None:
        ending = ".txt" if target is None else target.suffix.lower()
        backend = next((name for name, endings in BACKENDS.items() if ending in endings), None)
    known = "; ".join(f"{name!r} ({', '.join(endings)})" for name, endings in BACKENDS.items())
    if backend is None:
        raise InputError(f"{target}: no plot ends in {target.suffix if target else ''!r}. There is {known}.")
    if not is_one_of(backend, BACKENDS):
        raise InputError(f"there is no backend {backend!r}. There is {known}.")
    if target is not None and target.suffix.lower() not in BACKENDS[backend]:
        raise InputError(f"{target}: {backend} writes {' and '.join(BACKENDS[backend])}.")
    return backend


def ensure_drawable(target: Path) -> None:
    """Makes sure, before long work, that a picture can be drawn once there is something to draw.

    Args:
        target: The file that is to be written.

    Raises:
        InputError: No picture has such an ending.
        RuntimeUnavailable: The package that draws it is not installed.
    """
    packages = {"matplotlib": "matplotlib.figure", "plotly": "plotly.graph_objects"}
    backend = backend_of(target)
    if backend in packages:
        view_package(packages[backend], f"a picture that ends in {target.suffix}")


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
