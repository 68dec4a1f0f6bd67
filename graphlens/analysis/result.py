"""What a sweep found: values along named axes, with labels and baselines; selected, ranked, shown, saved and loaded."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

from graphlens.analysis import result_files, result_tables
from graphlens.analysis.arrays import Array, ArrayInput, as_array
from graphlens.analysis.result_files import saved_files as saved_files
from graphlens.errors import InputError, checked_number, is_one_of
from graphlens.file.folder import replacing, user_path

if TYPE_CHECKING:
    import pandas  # type: ignore[import-untyped]
    import xarray
    from rich.table import Table

    from graphlens.analysis.summary import EffectSummary
    from graphlens.views.pages import View

# A metric without a patch: not known, a number, or an array over the axes "metric" and "batch".
Baseline: TypeAlias = float | Array | None
BASELINES = ("clean", "corrupted")
MAX_ROWS, MAX_COLUMNS = 60, 8  # of the table that a console shows


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """The values of one or more metrics at every place that a sweep has patched or ablated.

    Everything is copied, and the arrays are read-only.

    Attributes:
        values: float64, one axis for each name in ``axes``; NaN is a value that is not computed yet.
        axes: The name of each axis: ("layer", "position"), say, where "metric" may come first and "batch" last.
        labels: What each entry of each axis is called.
        baselines: The metrics without a patch, "clean" and "corrupted": None, a number, or an array over those of the
            axes "metric" and "batch" that there are.
        metadata: What JSON can hold.

    Raises:
        InputError: Where these do not fit each other.
    """

    values: Array
    axes: tuple[str, ...]
    labels: Mapping[str, Sequence[str]]
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        values = _numbers(self.values, "values")
        axes = (self.axes,) if isinstance(self.axes, str) else tuple(self.axes)
        if len(set(axes)) != len(axes) or not all(isinstance(axis, str) and axis for axis in axes):
            raise InputError(f"axes {axes}: each has a name of its own.")
        if "value" in axes:
            raise InputError("no axis can be called 'value': that is the column of the values in to_dataframe().")
        if ("metric" in axes[1:]) or ("batch" in axes[:-1]):
            raise InputError(f"axes {axes}: 'metric' comes first and 'batch' last.")
        if values.ndim != len(axes) or values.size == 0:
            raise InputError(f"values have shape {list(values.shape)}, and there are {len(axes)} axes: {axes}.")
        if set(self.labels) != set(axes):
            raise InputError(f"labels are given for {sorted(self.labels)}, and the axes are {sorted(axes)}.")
        labels = {axis: _texts(self.labels[axis], axis, size) for axis, size in zip(axes, values.shape, strict=True)}
        if set(self.baselines) - set(BASELINES):
            raise InputError(
                f"baselines are 'clean' and 'corrupted', not {sorted(set(self.baselines) - set(BASELINES))}."
            )
        shared = tuple(len(labels[axis]) for axis in ("metric", "batch") if axis in axes)
        baselines = {name: _baseline(self.baselines.get(name), name, shared) for name in BASELINES}
        for name, value in (("values", values), ("axes", axes), ("labels", labels), ("baselines", baselines)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "metadata", _plain(self.metadata))

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis."""
        return self.values.shape

    def __array__(self, dtype: npt.DTypeLike | None = None, copy: bool | None = None) -> Array:
        return np.array(self.values, dtype, copy=copy)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SweepResult):
            return NotImplemented
        mine, theirs = (self.axes, self.labels, self.metadata), (other.axes, other.labels, other.metadata)
        pairs = [(self.values, other.values), *((self.baselines[name], other.baselines[name]) for name in BASELINES)]
        return mine == theirs and all(_same(left, right) for left, right in pairs)

    def __hash__(self) -> int:
        return hash((self.axes, self.shape))

    def __repr__(self) -> str:
        missing = int(np.isnan(self.values).sum())
        sizes = ", ".join(f"{axis}={size}" for axis, size in zip(self.axes, self.shape, strict=True))
        return f"SweepResult({sizes or self.values.item()}{f'; {missing} values not computed yet' if missing else ''})"

    def against(self, name: str = "corrupted") -> Array:
        """A baseline in a shape that broadcasts to ``values``.

        Args:
            name: "corrupted" or "clean".

        Returns:
            float64; 0 where the baseline is not known or not finite.

        Raises:
            InputError: For another name.
        """
        if not is_one_of(name, BASELINES):
            raise InputError(f"there is no baseline {name!r}: it is 'clean' or 'corrupted'.")
        baseline = self.baselines[name]
        array = np.asarray(0.0 if baseline is None else baseline)
        if array.ndim:
            kept = [
                size if axis in ("metric", "batch") else 1 for axis, size in zip(self.axes, self.shape, strict=True)
            ]
            array = array.reshape(kept)
        return np.where(np.isfinite(array), array, 0.0)

    def sel(self, **chosen: int | str) -> Self:
        """The part at one entry of each named axis.

        Args:
            **chosen: For each axis a label, or an index (a negative one counts from the end).

        Returns:
            A result without these axes, whose ``metadata["selected"]`` says what was chosen.

        Raises:
            InputError: For an axis, label or index that does not exist, and for a label that several entries have.
        """
        index: dict[str, int] = {axis: self._index(axis, wanted) for axis, wanted in chosen.items()}
        shared = [axis for axis in ("metric", "batch") if axis in self.axes]
        part = tuple(index.get(axis, slice(None)) for axis in shared)
        baselines = {
            name: value[part] if isinstance(value, np.ndarray) else value for name, value in self.baselines.items()
        }
        earlier = self.metadata.get("selected")
        selected = {axis: self.labels[axis][at] for axis, at in index.items()}
        return replace(
            self,
            values=self.values[tuple(index.get(axis, slice(None)) for axis in self.axes)],
            axes=tuple(axis for axis in self.axes if axis not in index),
            labels={axis: names for axis, names in self.labels.items() if axis not in index},
            baselines=baselines,
            metadata={**self.metadata, "selected": {**(earlier if isinstance(earlier, dict) else {}), **selected}},
        )

    def _index(self, axis: str, wanted: int | str) -> int:
        """The index of an entry of an axis."""
        if axis not in self.axes:
            raise InputError(f"there is no axis {axis!r}: the axes are {', '.join(map(repr, self.axes)) or 'none'}.")
        names = self.labels[axis]
        if isinstance(wanted, str):
            found = [at for at, name in enumerate(names) if name == wanted]
            if len(found) == 1:
                return found[0]
            if found:
                raise InputError(f"{axis}={wanted!r} is the label of entries {found}: select one by its index.")
            some = ", ".join(map(repr, names[:8])) + (", …" if len(names) > 8 else "")
            raise InputError(f"{axis}={wanted!r}: no entry is called so. There are {len(names)}: {some}.")
        if isinstance(wanted, bool | np.bool_) or not isinstance(wanted, int | np.integer):
            raise InputError(f"{axis}={wanted!r}: select by a label or an index, one for each axis.")
        if not -len(names) <= wanted < len(names):
            raise InputError(f"{axis}={wanted}: the index is outside 0 to {len(names) - 1}.")
        return int(wanted) % len(names)

    def top(self, n: int = 10) -> list[tuple[dict[str, str], float]]:
        """The values farthest from the corrupted baseline (from 0 where it is not known), farthest first.

        Args:
            n: How many, 1 or more.

        Returns:
            ({axis: label}, value) of each; values that are not computed yet are left out.

        Raises:
            InputError: Unless n >= 1.
        """
        n = checked_number(n, "n", least=1)
        distance = np.abs(self.values - self.against()).ravel()
        order = [int(at) for at in np.argsort(-distance, kind="stable") if not np.isnan(distance[at])]
        return [(self._labels_at(at), float(self.values.flat[at])) for at in order[:n]]

    def _labels_at(self, at: int) -> dict[str, str]:
        """The labels of the value at a flat index."""
        indices = np.unravel_index(at, self.shape)
        return {axis: self.labels[axis][int(i)] for axis, i in zip(self.axes, indices, strict=True)}

    def summary(self, confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> EffectSummary:
        """The mean effect at each place over the prompts of a sweep with reduction="none", and how sure it is.

        Args:
            confidence: Of the bootstrap interval of the mean, between 0 and 1.
            resamples: How many means are drawn for it, and how many patterns of signs for the p-values.
            seed: Of the draws.

        Returns:
            An EffectSummary: ``mean``, ``standard_error``, ``low``, ``high`` and ``p_value``, each a SweepResult without the axis
            "batch".

        Raises:
            InputError: Without that axis, for places that are not done, and for numbers out of range.
        """
        from graphlens.analysis.summary import summarise

        return summarise(self, confidence, resamples, seed)

    def to_dataframe(self) -> pandas.DataFrame:
        """The values as a table of pandas.

        Returns:
            A DataFrame with a row for each value: a column of labels for each axis, and "value", NaN where it is not
            computed yet.

        Raises:
            RuntimeUnavailable: Without pandas.
        """
        return result_tables.to_pandas(self)

    def to_xarray(self) -> xarray.DataArray:
        """The values as a labelled array of xarray.

        Returns:
            A DataArray with the dimensions ``axes`` and their labels as coordinates; NaN where a value is not computed yet. Its
            ``attrs`` hold the baselines that are known: "clean" and "corrupted".

        Raises:
            RuntimeUnavailable: Without xarray.
        """
        return result_tables.to_xarray(self)

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Writes the values as a table in UTF-8: what ``to_dataframe().to_csv(path, index=False)`` writes. Needs no pandas.

        Args:
            path: The file. It gets a line with the axes' names and "value", and then a line for each value: its labels, and the
                number in full precision, empty where it is not computed yet.

        Returns:
            The file's path.

        Raises:
            InputError: It cannot be written.
        """
        target = user_path(path)
        result_tables.write_csv(self, target)
        return target

    def plot(self, path: str | os.PathLike[str] | None = None, *, backend: str | None = None) -> Any:
        """A heat map, coloured by the distance from the corrupted baseline.

        A page has a slider for each axis beyond two; everything else a panel for each index of the leading axes, up to 16.

        Args:
            path: The file to write; None writes none.
            backend: "terminal" (prints, or writes a .txt), "matplotlib" (.png, .svg, .pdf), "page" (.html) or "plotly" (.html);
                None takes the first of the path's ending; without a path a page in a notebook, and the terminal elsewhere.

        Returns:
            The view, or the figure of matplotlib or plotly; None for the terminal.

        Raises:
            InputError: For another backend or ending, for too many panels, and where the file cannot be written.
            RuntimeUnavailable: Where the package is not installed.
        """
        from graphlens.views import heat_map

        return heat_map.plot(self, None if path is None else user_path(path), backend, replacing)

    def __rich__(self) -> Table:
        """A table: rows by columns for two axes; more are flattened, with the last one across."""
        from graphlens.views.tables import result_table

        return result_table(self, MAX_ROWS, MAX_COLUMNS)

    def view(self, rows: str | None = None, columns: str | None = None) -> View:
        """What a notebook shows: a map with a slider for each axis beyond two, bars for one axis, a graph for edges.

        Args:
            rows: The axis that goes down; None for the last but one.
            columns: The axis that goes across; None for the last.

        Returns:
            A view: ``.save("page.html")`` writes it, ``views.report([...])`` puts it beside others.

        Raises:
            InputError: For an axis that is not there, and for more values than a page holds.
        """
        from graphlens.views.maps import of_result

        return of_result(self, self.metadata, rows, columns)

    def _repr_html_(self) -> str:
        from graphlens.views.pages import in_notebook

        return in_notebook(self)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes ``path`` with the ending .json, and .safetensors beside it for the arrays.

        Each file is put in place whole, and the JSON holds the other's digest. The same result gives the same bytes.

        Args:
            path: Where, with either ending or without one.

        Returns:
            The JSON's path.

        Raises:
            InputError: Where they cannot be written.
        """
        known = {name: value for name, value in self.baselines.items() if value is not None}
        record = {"axes": self.axes, "labels": self.labels, "metadata": self.metadata}
        return result_files.write(path, record, {**known, "values": self.values})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what ``save`` wrote.

        Args:
            path: Either file's path, or that without its ending.

        Raises:
            InputError: For files that are missing, damaged, not of the same save, or of a newer version.
        """
        record, arrays = result_files.read(path)
        try:
            baselines: dict[str, Baseline] = {name: arrays.get(name) for name in BASELINES}
            return cls(arrays["values"], tuple(record["axes"]), record["labels"], baselines, record["metadata"])
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            source, _ = saved_files(path)
            raise InputError(f"{source}: damaged, its parts do not fit ({type(error).__name__}: {error}).") from error


def _numbers(value: ArrayInput, what: str) -> Array:
    """A read-only float64 copy. Raises InputError for what holds no real numbers."""
    try:
        array = as_array(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} cannot be read as an array ({error}).") from error
    if array.dtype.kind not in "fiu":
        raise InputError(f"{what} must be real numbers, not {array.dtype}.")
    array = array.astype(np.float64)
    array.flags.writeable = False
    return array


def _texts(given: Iterable[str], axis: str, size: int) -> list[str]:
    """The labels of an axis of so many entries. Raises InputError where they do not fit."""
    texts = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"the labels of axis {axis!r} must be text.")
    if len(texts) != size:
        raise InputError(f"axis {axis!r} has {size} entries, and {len(texts)} labels.")
    return [str(text) for text in texts]


def _baseline(value: ArrayInput | None, name: str, shape: tuple[int, ...]) -> Baseline:
    """A baseline as it is kept. Raises InputError for one of another shape than that of the shared axes."""
    if value is None:
        return None
    array = _numbers(value, f"the {name} baseline")
    if array.ndim and array.shape != shape:
        raise InputError(
            f"the {name} baseline has shape {list(array.shape)}: it is a number, or {list(shape)} for the axes 'metric' "
            "and 'batch'."
        )
    return array if array.ndim else float(array)


def _plain(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata as it comes back from a file: tuples as lists, NumPy's numbers as Python's."""
    try:
        return dict(json.loads(json.dumps(dict(metadata), allow_nan=False, default=lambda item: item.item())))
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"metadata must be what JSON can hold: {error}.") from error


def _same(left: Baseline, right: Baseline) -> bool:
    """True for equal values, where NaN equals NaN."""
    if left is None or right is None:
        return left is right
    return np.array_equal(left, right, equal_nan=True)
