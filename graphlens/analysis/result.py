"""What a sweep found: values along named axes, with labels and baselines; selected, ranked, shown, saved and loaded."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import as_array
from graphlens.errors import InputError
from graphlens.file.folder import write_whole
from graphlens.views.text import NOT_COMPUTED, number, shown, view_package

if TYPE_CHECKING:
    from rich.console import RenderableType

Array = npt.NDArray[Any]
FORMAT, FORMAT_VERSION = "graphlens.sweep_result", 1
BASELINES = ("clean", "corrupted")
MAX_ROWS, MAX_COLUMNS = 60, 8  # of the table that a console shows


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """The values of one or more metrics at every place that a sweep has patched or ablated.

    ``values``: float64, one axis for each name in ``axes``: ("layer", "position"), say, where "metric" may come first
    and "batch" last. NaN stands for a value that is not computed yet. ``labels``: what each entry of each axis is
    called. ``baselines``: the metrics without a patch, "clean" and "corrupted": None, a number, or an array over those
    of the axes "metric" and "batch" that there are. ``metadata``: what JSON can hold. Everything is copied; the arrays
    are read-only. Raises InputError where these do not fit each other.
    """

    values: Array
    axes: tuple[str, ...]
    labels: Mapping[str, Sequence[str]]
    baselines: Mapping[str, Any] = field(default_factory=dict)
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

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
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
        """A baseline in a shape that broadcasts to ``values``; 0 where it is not known or not finite."""
        if name not in BASELINES:
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
        """The part at one label, or one index, of each named axis, which it then lacks; ``metadata["selected"]`` tells.

        Raises InputError for an axis, label or index that there is not, and for a label that several entries have.
        """
        index: dict[str, int] = {axis: self._index(axis, wanted) for axis, wanted in chosen.items()}
        shared = [axis for axis in ("metric", "batch") if axis in self.axes]
        baselines = {
            name: value[tuple(index.get(axis, slice(None)) for axis in shared)] if np.ndim(value) else value
            for name, value in self.baselines.items()
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

    def _index(self, axis: str, wanted: Any) -> int:
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
        """The ``n`` values farthest from the corrupted baseline (from 0 where it is not known), farthest first.

        Each as ({axis: label}, value). Values that are not computed yet are left out. Raises InputError unless n >= 1.
        """
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
            raise InputError(f"n must be an integer of 1 or more, not {n!r}.")
        distance = np.abs(self.values - self.against()).ravel()
        order = [int(at) for at in np.argsort(-distance, kind="stable") if not np.isnan(distance[at])]
        return [(self._labels_at(at), float(self.values.flat[at])) for at in order[:n]]

    def _labels_at(self, at: int) -> dict[str, str]:
        indices = np.unravel_index(at, self.shape)
        return {axis: self.labels[axis][int(i)] for axis, i in zip(self.axes, indices, strict=True)}

    def to_dataframe(self) -> Any:
        """A pandas DataFrame: a row for each value, a column of labels for each axis, and "value".

        NaN where it is not computed yet. Raises RuntimeUnavailable without pandas.
        """
        pandas = view_package("pandas", "to_dataframe()")
        columns: dict[str, Any] = {}
        for axis, at in zip(self.axes, np.indices(self.shape), strict=True):
            names = self.labels[axis]
            columns[axis] = [names[i] for i in at.ravel()]
        return pandas.DataFrame({**columns, "value": self.values.ravel().copy()})

    def plot(self, path: str | os.PathLike[str] | None = None, *, backend: str | None = None) -> Any:
        """A heat map, coloured by the distance from the corrupted baseline, one panel for each leading index.

        ``backend``: "terminal" (prints, or writes a .txt), "matplotlib" (.png, .svg, .pdf) or "plotly" (.html); None
        takes what ``path`` ends in, and the terminal without one. Returns the figure of matplotlib or plotly, None for
        the terminal. Raises InputError for another backend or ending, RuntimeUnavailable where the package is missing.
        """
        from graphlens.views import heat_map

        return heat_map.plot(self, path, backend)

    def __rich__(self) -> RenderableType:
        """A table: rows by columns for two axes; more are flattened, with the last one across."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table
        from rich.text import Text

        across = self.axes[-1] if len(self.axes) > 1 else None
        names = [shown(name) for name in self.labels[across]] if across else ["value"]
        leading = self.axes[:-1] if across else self.axes
        rows = self.values.reshape(-1, len(names))
        left_out = [
            f"{size - most} more {what}"
            for what, size, most in (("rows", len(rows), MAX_ROWS), ("columns", len(names), MAX_COLUMNS))
            if size > most
        ]
        notes = [f"across: {across}"] if across else []
        notes += [f"{name} {number(value)}" for name, value in self.baselines.items() if isinstance(value, float)]
        notes += [f"not shown: {' and '.join(left_out)} (all are in values)"] if left_out else []
        notes += [f"{NOT_COMPUTED} not computed yet"] if np.isnan(self.values).any() else []
        table = Table(box=SIMPLE_HEAD, pad_edge=False, caption=Text("; ".join(notes)) if notes else None)
        for axis in leading:
            table.add_column(Text(axis), overflow="ellipsis", no_wrap=True)
        for name in names[:MAX_COLUMNS]:
            table.add_column(Text(name), justify="right", overflow="ellipsis", no_wrap=True)
        indices = np.ndindex(*self.shape[: len(leading)])
        for at, row, _ in zip(indices, rows, range(MAX_ROWS), strict=False):
            cells = [shown(self.labels[axis][i]) for axis, i in zip(leading, at, strict=True)]
            table.add_row(*map(Text, cells), *(Text(number(value)) for value in row[:MAX_COLUMNS]))
        return table

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes ``path`` with the ending .json, and .safetensors beside it for the arrays; returns the JSON's path.

        Each file is put in place whole, and the JSON holds the other's digest. The same result gives the same bytes.
        Raises InputError where they cannot be written.
        """
        from safetensors.numpy import save

        arrays = {name: self.baselines[name] for name in BASELINES if self.baselines[name] is not None}
        arrays["values"] = self.values
        data = save({name: np.ascontiguousarray(array).reshape(np.shape(array)) for name, array in arrays.items()})
        record = {
            "format": FORMAT,
            "version": FORMAT_VERSION,
            "axes": self.axes,
            "labels": self.labels,
            "metadata": self.metadata,
            "safetensors_sha256": hashlib.sha256(data).hexdigest(),
        }
        text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"
        target, beside = saved_files(path)
        try:
            write_whole(beside, data)
            write_whole(target, text.encode("ascii"))
        except OSError as error:
            raise InputError(f"{target}: cannot be written ({error}).") from error
        return target

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Reads what ``save`` wrote, by either file's path or by that without its ending.

        Raises InputError for files that are missing, damaged, not of the same save, or of a newer version.
        """
        source, beside = saved_files(path)
        record, arrays = _read(source, beside)
        try:
            baselines = {name: arrays.get(name) for name in BASELINES}
            return cls(arrays["values"], tuple(record["axes"]), record["labels"], baselines, record["metadata"])
        except (InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{source}: damaged, its parts do not fit ({type(error).__name__}: {error}).") from error


def _numbers(value: Any, what: str) -> Array:
    try:
        array = as_array(value)
    except (ValueError, TypeError) as error:
        raise InputError(f"{what} cannot be read as an array ({error}).") from error
    if array.dtype.kind not in "fiu":
        raise InputError(f"{what} must be real numbers, not {array.dtype}.")
    array = array.astype(np.float64)
    array.flags.writeable = False
    return array


def _texts(given: Any, axis: str, size: int) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f"the labels of axis {axis!r} must be text.")
    if len(texts) != size:
        raise InputError(f"axis {axis!r} has {size} entries, and {len(texts)} labels.")
    return [str(text) for text in texts]


def _baseline(value: Any, name: str, shape: tuple[int, ...]) -> Any:
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


def _same(left: Any, right: Any) -> bool:
    if left is None or right is None:
        return left is right
    return np.array_equal(left, right, equal_nan=True)


def saved_files(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """(JSON, safetensors) of a path with either ending, or with none: "a.b" has none."""
    given = Path(path)
    if not given.name:
        raise InputError(f"{str(path)!r} names no file.")
    stem = given.name.removesuffix(given.suffix) if given.suffix in (".json", ".safetensors") else given.name
    return given.with_name(f"{stem}.json"), given.with_name(f"{stem}.safetensors")


def _read(source: Path, beside: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        record = json.loads(source.read_bytes())
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise InputError(f"{source}: this is not the result of a sweep.")
        version = record.get("version")
        if not isinstance(version, int) or version > FORMAT_VERSION:
            raise InputError(
                f"{source}: version {version}, and this graphlens reads up to {FORMAT_VERSION}. Update it."
            )
        data = beside.read_bytes()
        if hashlib.sha256(data).hexdigest() != record.get("safetensors_sha256"):
            raise InputError(f"{beside}: damaged, or of another save than {source.name}: the digest differs.")
        return record, load(data)
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename}: no such file. A result is two: {source.name}, {beside.name}.") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise InputError(f"{source}: damaged, it cannot be read ({type(error).__name__}: {error}).") from error
