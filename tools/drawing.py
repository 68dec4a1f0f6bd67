"""The shapes of drawn pictures: SVG that loads nothing, reads in light and dark, and says in words what it shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

WIDE = 820  # of every drawing: the width of a page's text, so that letters have the size of its small print
INK, SAYS, BLUE, ORANGE, PAPER = "ink", "says", "blue", "orange", "paper"  # classes of STYLE
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1b1b24}.mono{font:12px ui-monospace,Menlo,Consolas,monospace}"
    ".says{font-size:11px;fill:#5c6068}.head{font-weight:600}.paper{fill:#fff}"
    ".box{fill:#eef3fa;stroke:#9db4d0}.hot{fill:#fdf0e3;stroke:#c98a4b}.line{stroke:#8a8f98;fill:none;stroke-width:1.5}"
    ".grid{stroke:#dfe2e7}.bar{stroke:#1b1b24;stroke-dasharray:4 3}.blue{fill:#175fa8}.orange{fill:#b3530a}.grey{fill:#8a8f98}"
    ".pale{fill:#a9c4e4}.stream{stroke:#175fa8;stroke-width:5}.tip{fill:#8a8f98}"
    "@media(prefers-color-scheme:dark){.paper{fill:#16181d}text{fill:#e8e8ee}.says{fill:#a3a8b3}"
    ".box{fill:#222c3a;stroke:#4a6a92}.hot{fill:#3a2a1a;stroke:#a8763f}.line{stroke:#8a8f98}.grid{stroke:#30343c}.bar{stroke:#e8e8ee}"
    ".blue{fill:#6fb1f2}.orange{fill:#f0a35e}.pale{fill:#33567f}.stream{stroke:#6fb1f2}}"
)

Kind = Literal["blue", "orange", "grey"]


def text(x: float, y: float, words: str, classes: str = "", anchor: str = "") -> str:
    """Words at a place; ``anchor`` is "middle" or "end"."""
    marks = (f' class="{classes}"' if classes else "") + (f' text-anchor="{anchor}"' if anchor else "")
    return f'<text x="{x:g}" y="{y:g}"{marks}>{escape(words, quote=False)}</text>'


def rect(x: float, y: float, wide: float, high: float, classes: str, more: str = "") -> str:
    """A rectangle."""
    return f'<rect class="{classes}" x="{x:g}" y="{y:g}" width="{wide:g}" height="{high:g}"{more}/>'


def line(x: float, y: float, to_x: float, to_y: float, classes: str = "line", tip: bool = False) -> str:
    """A straight line, with the head of an arrow at its end if asked for."""
    end = ' marker-end="url(#tip)"' if tip else ""
    return f'<line class="{classes}" x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}"{end}/>'


def box(x: float, y: float, wide: float, words: str, says: str = "", classes: str = "box", mono: bool = True) -> str:
    """A box around words, with smaller ones below; 40 high, ``y`` its top."""
    middle = x + wide / 2
    parts = [rect(x, y, wide, 40, classes, ' rx="5"')]
    parts.append(text(middle, y + (18 if says else 25), words, "mono" if mono else "", "middle"))
    if says:
        parts.append(text(middle, y + 33, says, "says", "middle"))
    return "".join(parts)


def drawing(high: float, words: str, parts: Iterable[str]) -> str:
    """A whole picture.

    Args:
        high: Its height; it is ``WIDE`` wide.
        words: What it shows, for who does not see it.
        parts: Its shapes.
    """
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {high:g}" role="img" aria-label="{escape(words)}">',
        f"<style>{STYLE}</style>{rect(0, 0, WIDE, high, PAPER)}",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path class="tip" d="M0 0 8 4 0 8"/></marker></defs>',
    )
    return "\n".join([*head, *parts, "</svg>"]) + "\n"


@dataclass(frozen=True)
class Strip:
    """A line of a chart of dots.

    Attributes:
        name: What stands at its left.
        dots: (value, colour) of each dot; the value is positive, or 0, which stands at the left end.
        says: What stands at its right; "" for the dots' range.
        most: What its values may be at most, drawn as a mark on the line; None for none.
    """

    name: str
    dots: Sequence[tuple[float, Kind]]
    says: str = ""
    most: float | None = None


def number(value: float) -> str:
    """A short number: three digits, or a power of ten."""
    if value and value < 1e-3:
        return f"{value:.0e}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def strips(
    words: str,
    title: str,
    lines: Sequence[Strip],
    bar: tuple[float, str] | None = None,
    unit: str = "",
    legend: Sequence[tuple[Kind, str]] = (),
) -> str:
    """Dots on lines that share one logarithmic axis.

    Args:
        words: What the picture shows, for who does not see it.
        title: What stands above.
        lines: The lines, from the top.
        bar: A value that a line crosses all others at, and what it means.
        unit: What follows the numbers: "x".
        legend: What the colours mean.
    """
    right, step = 690, 26
    left = max(150.0, 30 + 7.0 * max(len(each.name) for each in lines))
    top = 76 if legend else 62
    shown = [value for each in lines for value, _ in each.dots if value > 0]
    shown += [each.most for each in lines if each.most] + ([bar[0]] if bar else [])
    low, high = math.log10(min(shown)), math.log10(max(shown))
    room = max(0.03, 0.04 * (high - low))
    low, high = low - room, high + room

    def place(value: float) -> float:
        return left if value <= 0 else left + (math.log10(value) - low) / (high - low) * (right - left)

    bottom = top + step * len(lines)
    parts = [text(14, 24, title, "head")]
    at = 14.0
    for colour, means in legend:
        parts.append(f'<circle class="{colour}" cx="{at + 5:g}" cy="41" r="5"/>' + text(at + 16, 45, means, "says"))
        at += 34 + 6 * len(means)
    for tick in _ticks(low, high):
        parts.append(line(round(place(tick), 1), top - 8, round(place(tick), 1), bottom, "grid"))
        parts.append(text(round(place(tick), 1), bottom + 16, number(tick) + unit, "says", "middle"))
    if bar is not None:
        x = round(place(bar[0]), 1)
        parts.append(line(x, top - 8, x, bottom, "bar"))
        # Beside the line, on the side that has room for the words.
        parts.append(text(x + (6 if x < 480 else -6), top - 10, bar[1], "says", "" if x < 480 else "end"))
    for row, each in enumerate(lines):
        y = top + step * row + 13
        parts.append(text(left - 14, y + 4, each.name, "", "end"))
        parts.append(line(left, y, right, y, "grid"))
        if each.most:
            x = round(place(each.most), 1)
            parts.append(line(x, y - 8, x, y + 8, "bar"))
        for value, colour in sorted(each.dots, key=lambda dot: dot[1] == "orange"):
            x = round(place(value), 1)
            if colour == "orange":  # another shape too, for who does not tell the colours
                parts.append(f'<path class="orange" d="M{x:g} {y - 7:g}l7 7-7 7-7-7z"/>')
            else:
                parts.append(f'<circle class="{colour}" cx="{x:g}" cy="{y:g}" r="5" fill-opacity=".65"/>')
        values = sorted(value for value, _ in each.dots)
        ends = dict.fromkeys(number(value) + unit for value in (values[0], values[-1]))
        parts.append(text(right + 14, y + 4, each.says or " to ".join(ends), "says"))
    return drawing(bottom + 28, words, parts)


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers of an axis between two powers of ten: some four to eight."""
    whole = [10.0**power for power in range(math.ceil(low), math.floor(high) + 1)]
    if len(whole) > 3:
        return whole[:: math.ceil(len(whole) / 8)]
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)):
        found = [step * 10.0**power for power in range(math.floor(low), math.ceil(high) + 1) for step in steps]
        found = [tick for tick in found if low <= math.log10(tick) <= high]
        if len(found) >= 3:
            return found
    span = 10**high - 10**low
    size = 10.0 ** math.floor(math.log10(span / 3))
    return [size * at for at in range(math.ceil(10**low / size), math.floor(10**high / size) + 1)]


def shares(
    words: str, title: str, rows: Sequence[tuple[str, Sequence[int]]], legend: Sequence[tuple[str, str]], of: str
) -> str:
    """Bars of one length, each cut into shares.

    Args:
        words: What the picture shows, for who does not see it.
        title: What stands above.
        rows: (name, the counts).
        legend: (class, meaning) of each count.
        of: What the sum at the right of a bar counts.
    """
    right, top, step = 690, 62, 24
    left = max(150.0, 30 + 7.0 * max(len(name) for name, _ in rows))
    parts, at = [text(14, 24, title, "head"), text(right + 14, top - 8, of, "says")], 14.0
    for colour, means in legend:
        parts.append(rect(at, 36, 10, 10, colour) + text(at + 16, 45, means, "says"))
        at += 34 + 6 * len(means)
    for row, (name, counts) in enumerate(rows):
        y, x, total = top + step * row, float(left), sum(counts)
        parts.append(text(left - 14, y + 13, name, "", "end"))
        for count, (colour, _) in zip(counts, legend, strict=True):
            wide = (right - left) * count / total
            if count:
                parts.append(rect(round(x, 1), y, round(wide, 1), 17, colour))
            x += wide
        parts.append(text(right + 14, y + 13, f"{total:,}", "says"))
    return drawing(top + step * len(rows) + 10, words, parts)
