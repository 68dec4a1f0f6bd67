"""A sweep's result as tables of other programs: CSV, pandas, xarray. Knows alone which columns they have."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from graphlens.errors import InputError
from graphlens.file.folder import replacing
from graphlens.views.labelled import Labelled
from graphlens.views.wording import view_package

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]
    import xarray


def columns(result: Labelled) -> dict[str, list[str]]:
    """The label of each value of a result along each axis: axis -> one label for each value, in the order of the values."""
    found = {}
    for axis, at in zip(result.axes, np.indices(result.shape), strict=True):
        names = result.labels[axis]
        found[axis] = [names[i] for i in at.ravel()]
    return found


def to_pandas(result: Labelled) -> pandas.DataFrame:
    """See ``SweepResult.to_dataframe``."""
    frames = view_package("pandas", "to_dataframe()")
    frame: pandas.DataFrame = frames.DataFrame({**columns(result), "value": result.values.ravel().copy()})
    return frame


def to_xarray(result: Labelled) -> xarray.DataArray:
    """See ``SweepResult.to_xarray``."""
    arrays = view_package("xarray", "to_xarray()")
    baselines = {name: value for name, value in result.baselines.items() if value is not None}
    labels = {axis: list(names) for axis, names in result.labels.items()}
    found: xarray.DataArray = arrays.DataArray(
        result.values.copy(), dims=result.axes, coords=labels, name="value", attrs=baselines
    )
    return found


def _lines(result: Labelled) -> Iterator[list[str]]:
    """The rows of the CSV, the first one with the names of the columns."""
    labels = columns(result)
    yield [*labels, "value"]
    for at, value in enumerate(result.values.ravel().tolist()):
        yield [*(names[at] for names in labels.values()), "" if value != value else repr(value)]


def write_csv(result: Labelled, target: Path) -> None:
    """See ``SweepResult.to_csv``.

    Args:
        result: The result.
        target: The file.

    Raises:
        InputError: It cannot be written.
    """
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(_lines(result))
    try:
        with replacing(target) as made:
            made.write_bytes(text.getvalue().encode("utf-8", "surrogatepass"))
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error}).") from error
