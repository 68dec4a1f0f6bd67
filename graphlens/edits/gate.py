"""What the interventions at one hook point come to in one run: a factor, an addend, and a replacement for some elements.

Any sequence of them is one map x -> where(chosen, replacement, x * factor + addend), since each kind is one and such maps
compose. So one gate serves every sequence, and only its inputs change.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from graphlens.edits.kinds import Ablate, Intervention, Patch, Scale, Selection
from graphlens.errors import InputError
from graphlens.file.manifest import HookEntry

Array = npt.NDArray[Any]
Indices = npt.NDArray[np.int64]
# The parts of a gate, by the kind of change that needs them: the names of its inputs.
PARTS: Mapping[str, tuple[str, ...]] = {"scale": ("scale",), "add": ("add",), "patch": ("where", "patch")}
POSITION_AXES = ("pos", "query_pos")
_NOWHERE = -(2**40)  # an index that no run has


@dataclass(frozen=True)
class Window:
    """The tokens of one run: ``batch`` sequences, ``new`` positions after the ``start`` that a KV cache holds. The
    sequence may grow to ``horizon`` positions, and its first ``prompt`` ones are the prompt."""

    batch: int
    start: int
    new: int
    horizon: int
    prompt: int

    @classmethod
    def whole(cls, batch: int, length: int) -> Self:
        """The tokens of a run over whole prompts, ``batch`` of ``length`` positions, without a KV cache."""
        return cls(batch, 0, length, length, length)

    @property
    def total(self) -> int:
        """The length of the sequence after the run."""
        return self.start + self.new


@dataclass(frozen=True)
class Axis:
    """One axis of an activation in a run: indices ``start`` to ``start + size`` of ``total``, which may grow to
    ``horizon``."""

    name: str
    start: int
    size: int
    total: int
    horizon: int


def change_kind(item: Intervention) -> str:
    """The kind of change an intervention is: a key of ``PARTS``."""
    return {"steer": "add", "scale": "scale"}.get(item.kind, "patch")


def kinds(items: Sequence[Intervention]) -> tuple[str, ...]:
    """The kinds of change that interventions at one hook point need, in the order of ``PARTS``."""
    needed = {change_kind(item) for item in items}
    return tuple(kind for kind in PARTS if kind in needed)


def neutral(part: str, dtype: str) -> Array:
    """The scalar at which a part of a gate changes nothing."""
    return np.asarray({"scale": 1, "where": False}.get(part, 0), bool if part == "where" else dtype)


def check(items: Sequence[Intervention], entry: HookEntry, sizes: Mapping[str, int]) -> None:
    """Raises InputError for what no run can honour: an axis that is not there, an index beyond it, a value too wide.

    Warns where a patch hides an earlier one of the same elements.
    """
    for item in items:
        if entry.dtype.startswith("int") and not isinstance(item, Patch):
            raise InputError(f"{label(item)}: this hook point holds integers, which only Patch can change.")
        if entry.dtype.startswith("int"):
            _check_tokens(item, sizes["d_vocab"])
        for axis_name, field in selected_by(entry.axes).items():
            if axis_name in sizes and axis_name != "1":
                axis = Axis(axis_name, 0, sizes[axis_name], sizes[axis_name], sizes[axis_name])
                chosen = order(getattr(item, field) if field else None, axis, item, field)
                place, shape = entry.axes.index(axis_name) - len(entry.axes), item.array.shape
                size = shape[place] if -place <= len(shape) else 1
                selected = axis.size if chosen is None else len(chosen)
                if size not in (1, axis.size, selected):
                    raise _misfit(item, entry.axes, axis_name, size, axis.size, None if chosen is None else selected)
        missing = "heads" if item.heads is not None and "heads" not in selected_by(entry.axes).values() else None
        if missing:
            raise InputError(
                f"{label(item)}: it has no heads (its axes are {', '.join(entry.axes)}); leave out heads=."
            )
        if item.array.ndim > len(entry.axes):
            raise InputError(
                f"{label(item)}: its {item.operand} has shape {list(item.array.shape)}, more axes than the activation's "
                f"{len(entry.axes)} ({', '.join(entry.axes)})."
            )
    patches = [item.selection for item in items if isinstance(item, Patch)]
    if len(patches) > len(set(patches)):
        warnings.warn(f"two patches of the same elements at {items[0].hook!r}: the later one wins.", stacklevel=4)


def _check_tokens(item: Intervention, vocabulary: int) -> None:
    values = item.array
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() >= vocabulary:
        raise InputError(f"{label(item)}: its value must be token ids, integers from 0 to {vocabulary - 1}.")


def compose(
    items: Sequence[Intervention], entry: HookEntry, sizes: Mapping[str, int], window: Window
) -> dict[str, Array]:
    """The arrays of a gate for one run, by part, each broadcasting to the activation. Parts that change nothing are
    left out. Raises InputError for positions or batch entries that are not there and values that do not fit."""
    axes = [_axis(name, sizes, window) for name in entry.axes]
    factor: Array | None = None
    addend: Array | None = None
    chosen: Array | None = None
    replacement: Array | None = None
    for item in items:
        found = _placed(item, entry, axes, window)
        if found is None:
            continue
        mask, value = found
        if isinstance(item, (Ablate, Patch)):
            every = np.ones((1,) * len(axes), bool) if mask is None else mask
            whole = replacement is None or mask is None
            replacement = value if whole else np.where(mask, value, replacement)  # type: ignore[arg-type]
            chosen = every if chosen is None else chosen | every
        elif isinstance(item, Scale):
            times = value if mask is None else np.where(mask, value, value.dtype.type(1))
            factor = times if factor is None else factor * times
            addend = None if addend is None else addend * times
            replacement = None if replacement is None else replacement * times
        else:
            more = value if mask is None else np.where(mask, value, value.dtype.type(0))
            addend = more if addend is None else addend + more
            replacement = None if replacement is None else replacement + more
    parts = {"scale": factor, "add": addend, "where": chosen, "patch": replacement}
    return {part: np.ascontiguousarray(array) for part, array in parts.items() if array is not None}


def label(item: Intervention) -> str:
    """How an error names an intervention."""
    return f"{type(item).__name__} at {item.hook!r}"


def selected_by(axes: Sequence[str]) -> dict[str, str]:
    """The axes of an activation -> the field that selects along each."""
    found = {}
    for index, name in enumerate(axes):
        if name == "batch":
            found[name] = "batch"
        elif name in POSITION_AXES:
            found[name] = "positions"
        elif name.endswith("head_index"):
            found[name] = "heads"
        elif index == len(axes) - 1:
            found[name] = "dims"
    return found


def _axis(name: str, sizes: Mapping[str, int], window: Window) -> Axis:
    if name == "batch":
        return Axis(name, 0, window.batch, window.batch, window.batch)
    if name in POSITION_AXES:
        return Axis(name, window.start, window.new, window.total, window.horizon)
    if name == "key_pos":
        return Axis(name, 0, window.total, window.total, window.horizon)
    return Axis(name, 0, sizes[name], sizes[name], sizes[name])


def _placed(
    item: Intervention, entry: HookEntry, axes: Sequence[Axis], window: Window
) -> tuple[Array | None, Array] | None:
    """The mask of the selected elements (None: all) and the operand, both broadcasting to the activation of this run;
    None where the run has none of them."""
    rank = len(axes)
    mask: Array | None = None
    value = item.array.reshape((1,) * (rank - item.array.ndim) + item.array.shape)
    fields = selected_by(entry.axes)
    whole = all(size in (1, axis.total) for size, axis in zip(value.shape, axes, strict=True))
    for index, axis in enumerate(axes):
        selection = getattr(item, fields[axis.name]) if axis.name in fields else None
        if axis.name in POSITION_AXES and is_grid(selection):
            grid, chosen = _grid(item, selection, axis, window), None
            part = grid.reshape(len(grid), *(1,) * (index - 1), axis.size, *(1,) * (rank - index - 1))
        else:
            chosen = order(selection, axis, item, fields.get(axis.name), window.prompt, item.strict)
            if chosen is None:
                part = None
            else:
                local = chosen - axis.start
                flags = np.zeros(axis.size, bool)
                flags[local[(local >= 0) & (local < axis.size)]] = True
                part = flags.reshape((1,) * index + (-1,) + (1,) * (rank - index - 1))
        if part is not None:
            if not part.any():
                return None
            mask = part if mask is None else mask & part
        value = along(item, entry.axes, value, index, axis, chosen, whole)
    with np.errstate(over="ignore"):  # it is said below
        cast = value.astype(entry.dtype, copy=False)
    if not item.allow_nonfinite and not np.isfinite(cast).all():
        raise InputError(f"{label(item)}: its {item.operand} is too large for {entry.dtype}.")
    return mask, cast


def along(
    item: Intervention,
    names: Sequence[str],
    value: Array,
    index: int,
    axis: Axis,
    chosen: Indices | None,
    whole: bool,
) -> Array:
    """``value`` with its entries along one axis where the run has them. ``whole``: it is shaped like the activation,
    else like the selected part of it. Raises InputError where it has neither size."""
    size = value.shape[index]
    if size == 1:
        return value
    if whole or chosen is None:
        if size != axis.total:
            raise _misfit(item, names, axis.name, size, axis.total, None if chosen is None else len(chosen))
        return value[(slice(None),) * index + (slice(axis.start, axis.start + axis.size),)]
    if size != len(chosen):
        raise _misfit(item, names, axis.name, size, axis.total, len(chosen))
    places = np.zeros(axis.size, np.int64)
    local = chosen - axis.start
    here = (local >= 0) & (local < axis.size)
    places[local[here]] = np.flatnonzero(here)
    return value.take(places, axis=index)


def _misfit(
    item: Intervention, names: Sequence[str], axis: str, size: int, whole: int, selected: int | None
) -> InputError:
    selection = "" if selected is None else f", of which {selected} are selected"
    return InputError(
        f"{label(item)}: its {item.operand} has shape {list(item.array.shape)}, which does not fit the activation "
        f"[{', '.join(names)}]: along {axis} it has {size}, and the activation {whole}{selection}."
    )


def is_grid(selection: Selection) -> bool:
    """Whether a selection is a mask [batch, pos]."""
    return isinstance(selection, tuple) and isinstance(selection[0], tuple)


def _grid(item: Intervention, selection: Selection, axis: Axis, window: Window) -> Array:
    """A mask [batch, pos] for the positions of this run."""
    grid = np.asarray(selection, bool)
    if grid.shape[0] not in (1, window.batch) or not axis.total <= grid.shape[1] <= max(axis.horizon, axis.total):
        raise InputError(
            f"{label(item)}: positions is a mask {list(grid.shape)}; the run has {window.batch} sequences of {axis.total} "
            "positions."
        )
    return grid[:, axis.start : axis.start + axis.size]


def order(
    selection: Selection,
    axis: Axis,
    item: Intervention,
    field: str | None,
    prompt: int = 0,
    strict: bool = True,
) -> Indices | None:
    """The selected indices along an axis, in the selection's order; None for all. Raises InputError for one beyond."""
    if selection is None:
        return None
    if selection == "prompt":
        return np.arange(prompt)
    if selection == "generated":
        return np.arange(prompt, axis.total)
    said = f"{label(item)}: {field}={selection!r}"
    if isinstance(selection, slice):
        found = np.arange(axis.total)[selection]
        if strict and not found.size and not np.arange(axis.horizon)[selection].size:
            raise InputError(f"{said} selects none of the {axis.total} along {axis.name}.")
        return found
    if isinstance(selection, tuple) and isinstance(selection[0], bool):
        longest = max(axis.horizon, axis.total)
        short = len(selection) < axis.total == longest
        if (len(selection) > longest and strict) or short:
            raise InputError(f"{said} is a mask of {len(selection)}; {axis.name} has {axis.total}.")
        return np.flatnonzero(selection)
    asked = np.atleast_1d(np.asarray(selection, np.int64))
    indices = np.where(asked < 0, asked + axis.total, asked)
    beyond = (indices < 0) | (indices >= max(axis.horizon, axis.total))
    if beyond.any() and strict:
        bad = int(asked[beyond][0])
        raise InputError(f"{said}: there is no {bad}; {axis.name} has {axis.total} (0-{axis.total - 1}){_hint(field)}.")
    return np.where(beyond, _NOWHERE, indices)


def _hint(field: str | None) -> str:
    return ". Pass strict=False to ignore what lies beyond the sequence" if field == "positions" else ""
