"""Values along named axes as views: a map of any two axes with a slider for each other one, bars for one axis."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from graphlens.errors import InputError
from graphlens.views.circuit_graph import circuit
from graphlens.views.encoded import Json, packed, packed_size
from graphlens.views.labelled import Labelled
from graphlens.views.pages import View
from graphlens.views.words import sent

MOST = 12_000_000  # bytes of a page for the values


def of_result(
    result: Labelled, metadata: Mapping[str, object], rows: str | None = None, columns: str | None = None
) -> View:
    """What a result shows of itself: a map, bars for one axis, a graph for edges.

    Args:
        result: A SweepResult.
        metadata: Its metadata, which names the model and the metrics.
        rows: The axis that goes down; None for the last but one.
        columns: The axis that goes across; None for the last.
    """
    given = metadata.get("metrics")
    names = [str(name) for name in given] if isinstance(given, list) else []
    name = names[0] if len(names) == 1 else str(metadata.get("figure", "value"))
    says = [f"{metadata['model']}; {', '.join(names)}." if names and "model" in metadata else ""]
    known = [f"{which} {value:.6g}" for which, value in result.baselines.items() if isinstance(value, float)]
    says.append(f"Without a patch: {', '.join(known)}." if known else "")
    selected = metadata.get("selected")
    if isinstance(selected, dict) and selected:
        says.append(f"At {', '.join(f'{axis} {label}' for axis, label in selected.items())}.")
    rounded = metadata.get("straight_through")
    if rounded:
        says.append(f"Gradients pass {rounded} as if they did not round: they are those of the dequantised weights.")
    lines = tuple(line for line in says if line)
    if result.axes == ("edge",):
        return circuit(result, name=name, title="Edges", says=lines)
    title = f"{name} by {', '.join(result.axes)}" if result.axes else name
    if len(result.axes) == 1 and rows is None and columns is None:
        adds = result.axes == ("component",)  # direct logit attribution; other values are not parts of a whole
        return _bars(result, "given", name, title, lines, adds)
    return heat(result, rows=rows, columns=columns, name=name, title=title, says=lines)


def heat(
    result: Labelled,
    *,
    rows: str | None = None,
    columns: str | None = None,
    name: str = "value",
    diverges: bool = True,
    missing: str | None = None,
    title: str = "Sweep",
    says: tuple[str, ...] = (),
) -> View:
    """Shows a result as a map of two of its axes; the others have a slider each, and the page can choose other axes.

    Args:
        result: A SweepResult, or whatever else has values along named axes.
        rows: The axis that goes down; None for the last but one.
        columns: The axis that goes across; None for the last.
        name: What the values are.
        diverges: Whether colours go both ways from the corrupted baseline (from 0 where there is none); otherwise from nothing
            to much.
        missing: What NaN means, whose cells are then blank; None for "not computed".
        title: The line above it.
        says: What a reader should know.

    Returns:
        The view. Values are float64, as in the result; NaN is grey.

    Raises:
        InputError: For an axis that is not there, and for more values than a page holds.
    """
    axes = result.axes
    size = packed_size(result.values.size, "f8")
    if size > MOST:
        sizes = " x ".join(f"{count} {axis}" for axis, count in zip(axes, result.shape, strict=True))
        raise InputError(
            f"{sizes} are {result.values.size:,} values, {size / 1e6:,.0f} MB of a page (at most {MOST / 1e6:.0f} MB): "
            "select a part with result.sel()."
        )
    for given in (rows, columns):
        if given is not None and given not in axes:
            raise InputError(f"there is no axis {given!r}: the axes are {', '.join(map(repr, axes)) or 'none'}.")
    if rows is not None and rows == columns:
        raise InputError(f"rows and columns are both {rows!r}: a map has two axes.")
    free = [axis for axis in axes if axis not in (rows, columns) and axis != "metric"] + ["metric"] * ("metric" in axes)
    free = [axis for axis in free if axis not in (rows, columns)]
    inner = [axis for axis in free if axis != "metric"] or free
    if columns is None and inner:
        columns = inner[-1]
        inner = [axis for axis in inner if axis != columns] or [axis for axis in free if axis != columns]
    if rows is None and inner:
        rows = inner[-1]
    baseline = np.asarray(result.against())
    squeezed = [axis for axis, count in zip(axes, baseline.shape, strict=True) if count > 1] if baseline.ndim else []
    data: dict[str, Json] = {
        "axes": list(axes),
        "labels": {axis: sent(result.labels[axis]) for axis in axes},
        "values": packed(result.values, "f8"),
        "baseline": packed(baseline.reshape(-1), "f8"),
        "baselineAxes": list(squeezed),
        "rows": rows,
        "columns": columns,
        "name": name,
        "diverges": diverges,
        "missing": missing,
        "middleName": _middle(result),
    }
    entries = len(result.labels[rows]) if rows else 1
    return View("heat", title, data, says, min(720, 230 + 24 * entries))


def bars(
    result: Labelled,
    *,
    order: str = "size",
    name: str = "value",
    title: str = "Direct logit attribution",
    says: tuple[str, ...] = (),
) -> View:
    """Shows a result of one axis as bars, to the right of 0 and to its left: direct logit attribution, say.

    Args:
        result: A SweepResult of one axis.
        order: "size" (the largest first, whatever the sign), "value", or "given".
        name: What the values are.
        title: The line above it.
        says: What a reader should know.

    Returns:
        The view, with the values in float64.

    Raises:
        InputError: For a result of several axes, and for another order.
    """
    return _bars(result, order, name, title, says, adds=True)


def _middle(result: Labelled) -> str:
    """What the middle of the colours is: the corrupted baseline where it is known, and is a number."""
    baseline = result.baselines.get("corrupted")
    if baseline is None:
        return "0"
    finite = np.isfinite(np.asarray(baseline))
    if finite.all():
        return "unpatched"
    return "unpatched (0 where that is not finite)" if finite.any() else "0 (the unpatched value is not finite)"


def _bars(result: Labelled, order: str, name: str, title: str, says: tuple[str, ...], adds: bool) -> View:
    """Bars; ``adds`` says whether the values are parts of a whole, whose sum means something."""
    if len(result.axes) != 1:
        raise InputError(
            f"bars are of one axis, and this result has {len(result.axes)}: select with sel(), or show a map."
        )
    if order not in ("size", "value", "given"):
        raise InputError(f"order={order!r}: it is 'size', 'value' or 'given'.")
    (axis,) = result.axes
    finite = result.values[np.isfinite(result.values)]
    data: dict[str, Json] = {
        "labels": sent(result.labels[axis]),
        "values": packed(result.values, "f8"),
        "order": order,
        "name": name,
        "adds": adds,
    }
    which = "all" if finite.size == result.values.size else "those that are finite,"
    total = f"; {which} {finite.size} sum to {float(finite.sum()):.6g}" if adds else ""
    return View("bars", title, data, (*says, f"Each bar is {name}{total}."), 200 + 20 * min(40, len(result.values)))
