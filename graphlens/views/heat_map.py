"""Heat maps of what a sweep found: in a terminal (see ``terminal_map``), as a page, or as figures of matplotlib or plotly.

The colour is the distance from the corrupted baseline: blue below it, red above it, white at it.
"""

from __future__ import annotations

import contextlib
import html
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from graphlens.errors import InputError, is_one_of
from graphlens.views.labelled import Labelled
from graphlens.views.maps import of_result
from graphlens.views.pages import View
from graphlens.views.panels import Panel as Panel
from graphlens.views.panels import panels as panels
from graphlens.views.progress import notebook
from graphlens.views.terminal_map import HeatMap as HeatMap
from graphlens.views.terminal_map import draw
from graphlens.views.wording import number, shown, view_package

BACKENDS = {
    "terminal": (".txt",),
    "matplotlib": (".png", ".svg", ".pdf"),
    **{"page": (".html",), "plotly": (".html",)},  # a page, unless plotly is asked for by its name
}
MAX_PANELS = 16  # below each other: of a figure, or printed
COLD, WARM = (33, 102, 172), (178, 24, 43)  # the ends of the colours, as "red, green, blue"; white is between them


def plot(
    result: Labelled,
    path: str | os.PathLike[str] | None = None,
    backend: str | None = None,
    into: Callable[[Path], contextlib.AbstractContextManager[Path]] = contextlib.nullcontext,
) -> Any:
    """Plots a result: see ``SweepResult.plot``. ``into`` gives the file to write, and puts it in place at the end."""
    target = None if path is None else Path(path)
    if target is None and backend is None and notebook() is not None:
        backend = "page"  # which the notebook shows
    backend = backend_of(target, backend)
    drawers: dict[str, Callable[[Labelled, Path | None], Any]] = {
        "terminal": draw,
        "matplotlib": _draw_matplotlib,
        "page": _draw_page,
        "plotly": _draw_plotly,
    }
    if backend != "page":
        _ensure_few_panels(result)
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


def _ensure_few_panels(result: Labelled) -> None:
    """Raises InputError for more maps than anyone looks at; the sentence asks which."""
    metrics = result.axes[:1] == ("metric",)
    leading = result.axes[: max(metrics, len(result.axes) - 2)]
    count = int(np.prod([len(result.labels[axis]) for axis in leading])) if leading else 1
    if count > MAX_PANELS:
        sizes = ", ".join(f"{axis} ({size})" for axis, size in zip(result.axes, result.shape, strict=True))
        asked = ", ".join(f"{axis}=0" for axis in leading)
        raise InputError(
            f"this result has the axes {sizes}, a map shows two, and {count} panels are too many ({MAX_PANELS}): say which by "
            f"sel({asked}), or plot to a file that ends in .html, which has a slider for each other axis."
        )


def _draw_page(result: Labelled, target: Path | None) -> View:
    """A page with a slider for each axis beyond two, written where there is a target."""
    view = of_result(result, getattr(result, "metadata", {}))
    if target is not None:
        target.write_text(view.report().html(), encoding="utf-8", newline="\n")
    return view


def _titles(result: Labelled) -> tuple[str, str]:
    """What a figure is called, and what its numbers are: the name of the metric."""
    metadata: Mapping[str, object] = getattr(result, "metadata", {})
    given = metadata.get("metrics")
    names = [str(name) for name in given] if isinstance(given, list) else []
    if result.axes[:1] == ("metric",):
        names = list(result.labels["metric"])
    chosen = metadata.get("selected")
    selected = chosen if isinstance(chosen, Mapping) else {}
    figure = str(selected.get("metric", names[0] if len(names) == 1 else metadata.get("figure", "value")))
    at = ", ".join(f"{axis} {shown(str(label))}" for axis, label in selected.items() if axis != "metric")
    model = str(metadata.get("model", ""))
    title = ": ".join(part for part in (model, ", ".join(names) or figure) if part)
    return f"{title} at {at}" if at else title, figure


def _range(panel: Panel, shown_panels: Sequence[Panel]) -> tuple[float, float]:
    """The least and the most distance that the colour scale of a panel is of: that of all panels with the same scale."""
    own = np.concatenate([each.clipped().ravel() for each in shown_panels if each.span == panel.span])
    finite = own[np.isfinite(own)]
    least, most = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 0.0)
    return (least, most) if least < most else (min(least, 0.0), max(most, 0.0) or panel.span)


def _marks(panel: Panel, ends: tuple[float, float]) -> dict[float, str]:
    """What the ends of a colour scale, and its middle where it lies between them, are called."""
    inside = [at for at in (ends[0], 0.0, ends[1]) if ends[0] <= at <= ends[1]]
    if panel.centre is not None:
        centre = panel.centre
        return {at: number(centre + at) for at in inside}
    return {at: f"baseline {'-' if at < 0 else '+'} {number(abs(at))}" if at else "baseline" for at in inside}


def _colour(share: float) -> str:
    """The colour at a share of the way from the middle, -1 to 1, as CSS."""
    end = WARM if share > 0 else COLD
    return f"rgb({', '.join(str(round(255 + (part - 255) * abs(share))) for part in end)})"


def _draw_matplotlib(result: Labelled, target: Path | None) -> Any:
    """A figure of matplotlib, written where there is a target."""
    # Not pyplot: it keeps every figure, and picks a window system.
    figure_type = view_package("matplotlib.figure", "plotting with matplotlib").Figure
    shown_panels = panels(result)
    widest = max(len(panel.columns) for panel in shown_panels)
    heights = [1.6 + 0.3 * len(panel.rows) for panel in shown_panels]
    figure = figure_type(figsize=(3 + 0.45 * widest, sum(heights)), layout="constrained")
    drawn = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    title, name = _titles(result)
    figure.suptitle(title, parse_math=False)
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
        ends = _range(panel, shown_panels)
        bar.set_ticks(list(_marks(panel, ends)), labels=list(_marks(panel, ends).values()))
        bar.ax.set_ylim(*ends)  # the colours that the data has
        bar.set_label(panel.title.partition(",")[0] if "metric" in result.axes else name, parse_math=False)
    if target is not None:
        figure.savefig(target)
    return figure


def _draw_plotly(result: Labelled, target: Path | None) -> Any:
    """A figure of plotly, written where there is a target."""
    graph_objects = view_package("plotly.graph_objects", "plotting with plotly")
    subplots = view_package("plotly.subplots", "plotting with plotly")
    shown_panels = panels(result)
    count = len(shown_panels)
    title, name = _titles(result)
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
        ends = _range(panel, shown_panels)
        marks = _marks(panel, ends)
        shares = sorted({*ends, *([0.0] if ends[0] < 0 < ends[1] else [])})
        heat = graph_objects.Heatmap(
            z=[[None if np.isnan(value) else value for value in row] for row in panel.clipped().tolist()],
            zmin=ends[0],
            zmax=ends[1],
            colorscale=[[(at - ends[0]) / (ends[1] - ends[0]), _colour(at / panel.span)] for at in shares],
            text=hover,
            hoverinfo="text",
            colorbar={
                "title": {"text": _escaped(panel.title.partition(",")[0] if "metric" in result.axes else name)},
                "tickvals": list(marks),
                "ticktext": list(marks.values()),
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
    figure.update_layout(
        height=60 + sum(150 + 24 * len(panel.rows) for panel in shown_panels), title={"text": _escaped(title)}
    )
    if target is not None:
        figure.write_html(target, include_plotlyjs=True, div_id="graphlens")
    return figure


def _escaped(label: str) -> str:
    """Text that plotly shows as it is: it reads tags."""
    return html.escape(label, quote=False)
