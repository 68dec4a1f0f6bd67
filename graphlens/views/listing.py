"""Tables as views, to sort and filter: hook points, a configuration, the activations of a cache, a drift."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphlens.errors import GraphlensError, InputError
from graphlens.views.encoded import Json, cell, floats, shape_of
from graphlens.views.pages import View

MOST = 20_000  # rows of a page
MOST_BYTES = 250_000_000  # of activations whose statistics a summary computes
_LONGEST = 300  # characters of a cell


def table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, title: str = "Table", says: tuple[str, ...] = ()
) -> View:
    """Shows rows as a table that can be sorted and filtered.

    Args:
        columns: The names of the columns.
        rows: A row each: texts, numbers, or None for nothing.
        title: The line above it.
        says: What a reader should know.

    Returns:
        The view: ``.save("table.html")`` writes it, a notebook shows it.

    Raises:
        InputError: For a row of another length, and for more rows than a page holds.
    """
    names = [str(name) for name in columns]
    given = [list(row) for row in rows]
    if len(given) > MOST:
        raise InputError(f"{len(given):,} rows are more than a page holds ({MOST:,}): give some of them.")
    for index, row in enumerate(given):
        if len(row) != len(names):
            raise InputError(f"row {index} has {len(row)} cells for {len(names)} columns.")
    plain: list[Json] = [[_cut(cell(value)) for value in row] for row in given]
    says = (*says, "It has no rows.") if not given else says
    return View("table", title, {"columns": names, "rows": plain}, says, min(640, 150 + 26 * len(given)))


def _cut(value: Json) -> Json:
    """A cell, with the end of a very long text left out."""
    if isinstance(value, str) and len(value) > _LONGEST:
        return f"{value[:_LONGEST]}… ({len(value)} characters)"
    return value


@dataclass(frozen=True)
class _Statistics:
    """What a cache's summary says of one activation."""

    mean: float
    deviation: float
    least: float
    most: float
    not_finite: int


def activations(cache: Mapping[str, object], *, title: str = "Activations") -> View:
    """Shows what a cache holds: each activation's shape, type and statistics.

    Args:
        cache: An ActivationCache, or a dictionary of arrays.
        title: The line above it.

    Returns:
        The view, a row for each activation. Statistics are over finite entries, computed in float64.

    Raises:
        InputError: For more activations than a page holds.
    """
    total = sum(int(getattr(value, "nbytes", 0)) for value in cache.values())
    measured = total <= MOST_BYTES
    rows = []
    for name, value in cache.items():
        dtype = str(getattr(value, "dtype", type(value).__name__)).removeprefix("torch.")
        found = _statistics(value) if measured else None
        figures = [None] * 4 if found is None else [found.mean, found.deviation, found.least, found.most]
        rows.append([name, _shape(shape_of(value)), dtype, *figures, found.not_finite if found else None])
    says = [
        f"{len(cache)} activations, {total / 1e6:,.1f} MB. Mean, standard deviation (of all, not of a sample), least and most "
        "are over all entries that are finite. views.attention(cache, tokens) and views.lens(cache, tokens) show more."
    ]
    if not measured:
        says.append(f"They are more than {MOST_BYTES / 1e6:.0f} MB, so their statistics were not computed.")
    return table(
        ["hook point", "shape", "dtype", "mean", "std", "least", "most", "not finite"],
        rows,
        title=title,
        says=tuple(says),
    )


def _shape(shape: tuple[int, ...]) -> str:
    """A shape as text."""
    return f"[{', '.join(map(str, shape))}]"


def _statistics(value: object) -> _Statistics | None:
    """The statistics of an activation; None for what has none: integers, text, nothing."""
    try:
        array = floats(value, "activation")
    except GraphlensError:
        return None
    finite = array[np.isfinite(array)]
    if not finite.size or np.asarray(array).dtype.kind != "f":
        return None
    double = finite.astype(np.float64)
    return _Statistics(
        float(double.mean()), float(double.std()), float(double.min()), float(double.max()), array.size - finite.size
    )


def hook_points(entries: Mapping[str, tuple[str, str]], *, title: str = "Hook points") -> View:
    """Shows hook points with their shapes and dtypes.

    Args:
        entries: (shape, dtype) by hook name.
        title: The line above it.

    Returns:
        The view, a row for each hook point.

    Raises:
        InputError: For more than a page holds.
    """
    rows = [[name, shape, dtype] for name, (shape, dtype) in entries.items()]
    return table(["hook point", "shape", "dtype"], rows, title=title)


def settings(fields: Mapping[str, object], *, title: str = "Configuration") -> View:
    """Shows named values: a configuration.

    Args:
        fields: Values by name.
        title: The line above it.

    Returns:
        The view, a row for each value; what is no number or text is shown as Python writes it.
    """
    shown = [
        [name, value if isinstance(value, int | float | str) else None if value is None else repr(value)]
        for name, value in fields.items()
    ]
    return table(["field", "value"], shown, title=title)
