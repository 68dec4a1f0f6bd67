"""What patch and attribute show of a result: baselines as they are and normalised, a map, and the largest effects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from graphlens.analysis.result import SweepResult

TOP = 5  # of the largest effects that are shown, and TOP_JSON of those that JSON has
TOP_JSON = 20


def show(title: str, found: SweepResult, kept: Path, raw: Mapping[str, float] | None) -> None:
    """Prints a result: its baselines, a heat map, the largest effects, and where it is kept.

    Args:
        title: What it is called.
        found: The result.
        kept: Where it is kept, without an ending.
        raw: The metric before it is normalised, of the clean and of the corrupted prompt; None where it is not normalised.
    """
    from rich.console import Console
    from rich.markup import escape

    from graphlens.views.heat_map import HeatMap

    console = Console()
    baselines = ", ".join(f"{which} {value:+.3f}" for which, value in _baselines(found).items())
    unscaled = "" if raw is None else f" (raw: {', '.join(f'{which} {value:+.4g}' for which, value in raw.items())})"
    said = escape(f"{found.metadata['metrics'][0]}; {baselines}{unscaled}")  # a metric is named after its tokens
    console.print(f"[bold]{title}[/]: {said}", highlight=False)
    console.print(HeatMap(found))
    for labels, value in found.top(TOP):
        console.print(
            f"  {value:+.3f}  {', '.join(f'{axis} {label}' for axis, label in labels.items())}",
            highlight=False,
            markup=False,
        )
    console.print(f"Kept in {kept}.json and .safetensors", highlight=False, markup=False)


def _baselines(found: SweepResult) -> dict[str, float]:
    """The baselines that are known, as numbers."""
    return {name: float(value) for name, value in found.baselines.items() if value is not None}


def json_of(found: SweepResult, kept: Path, raw: Mapping[str, float], normalised: bool) -> dict[str, object]:
    """What JSON says of a result.

    Args:
        found: The result.
        kept: Where it is kept, without an ending.
        raw: The metric before it is normalised, of the clean and of the corrupted prompt.
        normalised: Whether the values are normalised.

    Returns:
        The file, the metric, axes and labels, nested lists of values, the baselines of the values and of the metric itself,
        and the values farthest from the corrupted baseline with the labels of their sites, each also as the metric itself.
    """
    span = raw["clean"] - raw["corrupted"]

    def unscaled(value: float) -> float:
        return value * span + raw["corrupted"] if normalised else value

    return {
        "file": f"{kept}.json",
        "metric": found.metadata["metrics"][0],
        "normalised": normalised,
        "axes": list(found.axes),
        "labels": {axis: list(names) for axis, names in found.labels.items()},
        "values": _nested(found.values.tolist()),
        "baselines": {
            "values": {name: number_of(value) for name, value in _baselines(found).items()},
            "raw": {name: number_of(value) for name, value in raw.items()},
        },
        "top": [
            {"site": labels, "value": number_of(value), "raw": number_of(unscaled(value))}
            for labels, value in found.top(TOP_JSON)
        ],
    }


def _nested(values: object) -> object:
    """Nested lists of numbers as JSON has them."""
    return [_nested(value) for value in values] if isinstance(values, list) else number_of(float(str(values)))


def number_of(value: float) -> float | str | None:
    """A number as JSON has it, which knows no NaN and no infinities: None for NaN, else text.

    >>> number_of(0.5), number_of(float("nan")), number_of(float("-inf"))
    (0.5, None, '-inf')
    """
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else str(value)
