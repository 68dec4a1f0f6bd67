"""Heat maps in a terminal: numbers in cells, coloured where there is colour and readable where there is none.

Knows alone how wide a map's cells and labels are. A cell at the baseline is blank; the line below a map says which value
that is, and from where to where the values go.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from graphlens.views.labelled import Array, Labelled
from graphlens.views.panels import Panel, panels
from graphlens.views.wording import NOT_COMPUTED, PLAIN, number

BELOW, AT, ABOVE = (67, 147, 195), (247, 247, 247), (214, 96, 77)  # of cells; the text on all of them is black
FAINT = (
    0.12  # of the largest distance: cells below it have no colour, which on a dark terminal would be their brightest
)
ROW_LABEL, COLUMN_LABEL, LEGIBLE, GAP = 18, 10, 6, 1  # widths, in cells of the terminal
TEXT_WIDTH = 120  # of a .txt
_CLOSE = 1e3  # so many times larger than their distances, values are shown as differences
_MOST_DECIMALS, _MOST_DIGITS = 3, 5  # of a cell; beyond them the map says which power of ten it shows its values in


@dataclass(frozen=True)
class Scale:
    """How the numbers of a map are written.

    Attributes:
        power: The power of ten that every number is divided by.
        decimals: How many decimals a number has.
    """

    power: int
    decimals: int

    @classmethod
    def of(cls, values: Array, span: float) -> Scale:
        """The scale that shows differences of 1/40 of ``span``, the largest distance from the baseline.

        Args:
            values: All values of the map; those that are not finite do not count.
            span: More than 0.
        """
        finite = np.abs(values[np.isfinite(values)])
        largest = float(finite.max(initial=span))
        decimals = max(0, 1 - math.floor(math.log10(span / 2)))
        if decimals <= _MOST_DECIMALS and largest < 10**_MOST_DIGITS:
            return cls(0, decimals)
        power = math.floor(math.log10(largest))
        return cls(power, min(_MOST_DIGITS, max(0, 1 - math.floor(math.log10(span / 2) - power))))

    def text(self, value: float) -> str:
        """A value as a cell shows it."""
        if math.isnan(value):
            return NOT_COMPUTED
        if math.isinf(value):
            return f"{value:.0f}"
        text = f"{self._divided(value):.{self.decimals}f}"
        return text if float(text) else text.removeprefix("-")

    def precisely(self, value: float) -> str:
        """A value in the same unit, to 4 significant digits."""
        return number(self._divided(value))

    def _divided(self, value: float) -> float:
        # In two steps: one power of ten may be too small for a float.
        return value / 10.0 ** (self.power // 2) / 10.0 ** (self.power - self.power // 2)

    @property
    def unit(self) -> str:
        """What the numbers are to be multiplied by, for people; empty for 1."""
        return f"1e{self.power}" if self.power else ""


class HeatMap:
    """A rich renderable of a result; columns that do not fit beside each other go below each other."""

    def __init__(self, result: Labelled) -> None:
        self._panels = panels(result)
        baseline = result.baselines.get("corrupted")
        self._known = baseline is not None and bool(np.isfinite(np.asarray(baseline)).all())  # else 0 is the middle

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The lines of every panel, for a console of ``options.max_width``."""
        for at, panel in enumerate(self._panels):
            if at:
                yield Text()
            for line in _lines(panel, options.max_width, self._known):
                line.rstrip()
                line.no_wrap, line.overflow = True, "ellipsis"
                if options.ascii_only:
                    line.plain = line.plain.translate(PLAIN)
                yield line


def draw(result: Labelled, target: Path | None) -> None:
    """Prints the heat map, or writes it as text."""
    if target is None:
        return Console().print(HeatMap(result))
    with target.open("w", encoding="utf-8", newline="\n") as file:
        console = Console(file=file, width=TEXT_WIDTH, color_system=None, force_terminal=False, legacy_windows=False)
        console.print(HeatMap(result))


@dataclass(frozen=True)
class _Layout:
    """A panel as it is drawn.

    Attributes:
        panel: The panel, its axes exchanged where it fits only so.
        texts: What each cell says, [rows][columns].
        margin: The width of the rows' labels.
        cell: The width of a cell.
        beside: How many columns lie beside each other.
    """

    panel: Panel
    texts: list[list[str]]
    margin: int
    cell: int
    beside: int

    @property
    def fits(self) -> bool:
        """True if all columns lie beside each other."""
        return self.beside >= len(self.panel.columns)


def _laid_out(panel: Panel, scale: Scale, width: int) -> _Layout:
    """How a panel is drawn in so many cells of the terminal."""
    baseline = np.subtract(
        panel.values, panel.distance, out=np.zeros_like(panel.values), where=np.isfinite(panel.values)
    )
    texts = [
        ["" if text == scale.text(base) and not np.isnan(value) else text for value, base, text in row]
        for row in (
            [(value, base, scale.text(value)) for value, base in zip(values, bases, strict=True)]
            for values, bases in zip(panel.values, baseline, strict=True)
        )
    ]
    margin = min(ROW_LABEL, width // 3, max(map(cell_len, (*panel.rows, panel.row_axis))))
    room = max(1, width - margin)
    longest = max(map(cell_len, panel.columns))
    longest_number = max(len(text) for row in texts for text in row)
    least = min(max(1, longest_number, min(LEGIBLE, longest)), max(1, room - GAP))
    widest = max(least, min(COLUMN_LABEL, longest))
    cell = max(least, min(widest, room // len(panel.columns) - GAP))
    return _Layout(panel, texts, margin, cell, max(1, room // (cell + GAP)))


def _lines(panel: Panel, width: int, known: bool) -> Iterator[Text]:
    """The lines of one panel in so many cells of the terminal.

    Args:
        panel: The panel.
        width: How wide the terminal is.
        known: Whether there is a baseline.
    """
    finite = np.abs(panel.values[np.isfinite(panel.values)])
    close = finite.max(initial=0) > _CLOSE * panel.span
    base = "the unpatched value" if panel.centre is None else f"{panel.centre:.6g}"
    about = f"differences from {base}" if close else ""
    if close:  # written in full, the numbers would all look the same
        panel = replace(panel, values=panel.distance, centre=0.0)
    scale = Scale.of(panel.values, panel.span)
    layout = _laid_out(panel, scale, width)
    if not layout.fits and panel.row_axis and panel.column_axis:
        turned = _laid_out(_transposed(panel), scale, width)
        layout = turned if turned.fits else layout
    panel = layout.panel
    if panel.title:
        yield Text(panel.title, style="bold")
    if panel.column_axis:
        yield Text(f"{_fitted(panel.row_axis, layout.margin)} {panel.column_axis} →", style="dim")
    for start in range(0, len(panel.columns), layout.beside):
        part = slice(start, start + layout.beside)
        if panel.column_axis:
            names = " ".join(_fitted(name, layout.cell, right=True) for name in panel.columns[part])
            yield Text(f"{'':{layout.margin}} {names}")
        for name, texts, distances in zip(panel.rows, layout.texts, panel.distance, strict=True):
            line = Text(_fitted(name, layout.margin))
            for text, distance in zip(texts[part], distances[part], strict=True):
                shown = _fitted(text, layout.cell, right=True)
                line.append(" ").append(shown, style_at(distance, panel.span) if text else "")
            yield line
    yield Text(_legend(panel, scale, about, known, blank=any(not text for row in layout.texts for text in row)))


def _legend(panel: Panel, scale: Scale, about: str, known: bool, blank: bool) -> str:
    """What the numbers of a panel are."""
    finite = panel.values[np.isfinite(panel.values)]
    said = [about] if about else []
    if scale.unit:
        said.append(f"in units of {scale.unit}")
    if finite.size:
        low, high = (scale.precisely(float(end)) for end in (finite.min(), finite.max()))
        said.append(f"from {low} to {high}")
    if panel.centre is None:
        said.append(
            "blank: the unpatched value, which differs between columns"
            if blank
            else "unpatched: differs between columns"
        )
    else:
        at = scale.precisely(panel.centre)
        what = f"{at} (unpatched)" if known else at
        said += [f"blank: {what}"] if blank else [f"unpatched: {at}"] if known else []
    if np.isnan(panel.values).any():
        said.append(f"{NOT_COMPUTED} not computed yet")
    return "; ".join(said)


def _transposed(panel: Panel) -> Panel:
    """The same panel with its rows as columns."""
    return replace(
        panel,
        row_axis=panel.column_axis,
        column_axis=panel.row_axis,
        rows=panel.columns,
        columns=panel.rows,
        values=panel.values.T,
        distance=panel.distance.T,
    )


def _fitted(label: str, width: int, right: bool = False) -> str:
    """The label in exactly ``width`` cells; one that is too long is cut in the middle.

    A position is labelled by its token and its number, ``John_10``: cut at the end, it would lose what tells it apart.
    """
    size = cell_len(label)
    if size > width:
        before = (width - 1) // 2
        after, tail = width - 1 - before, label
        while tail and cell_len(tail) > after:
            tail = tail[1:]
        label = set_cell_size(label, before) + "…" + " " * (after - cell_len(tail)) + tail
        return set_cell_size(label, width)
    return " " * (width - size) + label if right else label + " " * (width - size)


def style_at(distance: float, span: float) -> str:
    """The rich style of a cell.

    Args:
        distance: From the baseline; NaN where the value is not computed yet.
        span: The distance at which the scale ends; what lies beyond looks like its end.
    """
    if np.isnan(distance):
        return "dim"
    share = float(np.clip(distance / span, -1, 1))
    if abs(share) < FAINT:
        return ""
    end = ABOVE if share > 0 else BELOW
    red, green, blue = (round(a + (b - a) * abs(share)) for a, b in zip(AT, end, strict=True))
    return f"rgb(0,0,0) on rgb({red},{green},{blue})"
