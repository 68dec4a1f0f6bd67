"""How ``heads``, ``positions``, ``dims`` and ``batch`` of an intervention pick elements of an activation in one run."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol, Self, SupportsIndex, get_args

import numpy as np
import numpy.typing as npt

from graphlens.edits.record import Array
from graphlens.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Indices = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
SelectionField = Literal["heads", "positions", "dims", "batch"]
Span = Literal["prompt", "generated"]
FIELDS: tuple[SelectionField, ...] = get_args(SelectionField)
SPANS: tuple[Span, ...] = get_args(Span)
POSITION_AXES = ("pos", "query_pos")
Grid = tuple[tuple[bool, ...], ...]
# The plain form that a checked intervention holds: None for all, an index, a slice, the name of a part of the sequence,
# indices, a boolean mask of the axis, or a boolean mask [batch, pos].
Chosen = int | slice | Span | tuple[int, ...] | tuple[bool, ...] | Grid | None
_NOWHERE = -(2**40)  # an index that no run has


class Tensor(Protocol):
    """What is known here of a tensor of torch: how it is read."""

    def detach(self) -> Self:
        """The tensor without the graph that computed it."""

    def cpu(self) -> Self:
        """The tensor in the computer's own memory."""

    def numpy(self) -> Array:
        """Its values."""


# What a user may give. Everything but text and slices is read as an array of integers or booleans.
Selection = (
    SupportsIndex
    | slice
    | str
    | range
    | Sequence[int]
    | Sequence[bool]
    | Sequence[Sequence[bool]]
    | npt.NDArray[np.generic]
    | Tensor
    | None
)


class Edit(Protocol):
    """What is read here of an intervention: its name in errors, and its operand."""

    operand: ClassVar[str]

    @property
    def label(self) -> str:
        """How an error names it."""

    @property
    def array(self) -> Array:
        """Its operand."""


@dataclass(frozen=True)
class Window:
    """The tokens of one run, of which there may be earlier ones in a KV cache and later ones to come.

    Attributes:
        batch: The number of sequences.
        start: The number of positions that the KV cache holds, 0 without one.
        new: The number of positions of this run, which come after those.
        horizon: The most positions that the sequence may grow to.
        prompt: The number of positions, from the first one, that are the prompt.
    """

    batch: int
    start: int
    new: int
    horizon: int
    prompt: int

    @classmethod
    def whole(cls, batch: int, length: int) -> Self:
        """The window of a run without a KV cache: ``batch`` sequences of ``length`` positions, all of them prompt."""
        return cls(batch, 0, length, length, length)

    @property
    def total(self) -> int:
        """The length of the sequence after the run."""
        return self.start + self.new


@dataclass(frozen=True)
class Axis:
    """One axis of an activation in one run.

    Attributes:
        name: As the manifest calls it: "batch", "pos", "head_index", and so on.
        start: The first index that the run computes; more than 0 only under a KV cache.
        size: The number of indices that it computes.
        total: The size of the axis, earlier indices included.
        horizon: The size that it may grow to.
    """

    name: str
    start: int
    size: int
    total: int
    horizon: int

    @classmethod
    def fixed(cls, name: str, size: int) -> Self:
        """An axis that every run computes whole."""
        return cls(name, 0, size, size, size)

    def mask(self, chosen: Indices, index: int, rank: int) -> Mask:
        """The chosen indices as a mask of the run's part of this axis.

        Args:
            chosen: Indices along the whole axis. Those that the run does not compute are ignored.
            index: The place of this axis among the axes of the activation.
            rank: The number of axes of the activation.

        Returns:
            A mask with ``rank`` axes, each of size 1 but the one at ``index``.
        """
        local = chosen - self.start
        flags = np.zeros(self.size, bool)
        flags[local[(local >= 0) & (local < self.size)]] = True
        return flags.reshape((1,) * index + (-1,) + (1,) * (rank - index - 1))


def plain(value: Selection, field: SelectionField) -> Chosen:
    """A selection in its plain form.

    Args:
        value: What a user gave.
        field: The field that it was given for. Only "positions" takes "prompt", "generated" and a mask [batch, pos].

    Returns:
        None, "prompt", "generated", an int, a slice, or a tuple of ints, of bools, or of tuples of bools.

    Raises:
        InputError: If it is none of what the field takes, or selects nothing.
    """
    if value is None:
        return None
    if isinstance(value, str):
        for span in SPANS:
            if field == "positions" and value == span:
                return span
        wanted = " or ".join(map(repr, SPANS)) if field == "positions" else "no text"
        raise InputError(f"{field}={value!r}: {field} takes {wanted}, an int, a slice, a list, or a boolean mask.")
    if isinstance(value, slice):
        try:
            return slice(
                *(None if part is None else operator.index(part) for part in (value.start, value.stop, value.step))
            )
        except TypeError as error:
            raise InputError(f"{field}={value!r}: a slice is of ints.") from error
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        array = np.asarray(value if not isinstance(value, range) else list(value))
    except ValueError as error:
        raise InputError(f"{field}={value!r} is ragged: its rows have different lengths.") from error
    if array.size == 0:
        raise InputError(f"{field}={value!r} selects nothing.")
    if array.dtype.kind == "b" and array.ndim == 1:
        return tuple(array.tolist())
    if array.dtype.kind == "b" and array.ndim == 2 and field == "positions":
        return tuple(map(tuple, array.tolist()))
    if array.dtype.kind in "iu" and array.ndim <= 1:
        return tuple(int(i) for i in array) if array.ndim else int(array)
    raise InputError(
        f"{field}={value!r}: {field} takes an int, a slice, a list of ints, or a boolean mask, not {array.dtype} of "
        f"{array.ndim} axes."
    )


def selected_by(axes: Sequence[str]) -> dict[str, SelectionField]:
    """Which field selects along which axis of an activation.

    Args:
        axes: The names of the activation's axes, in order.

    Returns:
        Axis name -> field, without the axes that no field selects along.
    """
    found: dict[str, SelectionField] = {}
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


def is_grid(selection: Chosen) -> TypeIs[Grid]:
    """True if a selection is a mask [batch, pos]."""
    return isinstance(selection, tuple) and isinstance(selection[0], tuple)


def grid_mask(selection: Grid, axis: Axis, window: Window, label: str) -> Mask:
    """The part of a mask [batch, pos] that is about the positions of this run.

    Args:
        selection: The mask, with one row for all sequences or a row for each.
        axis: The position axis in this run.
        window: The tokens of this run.
        label: How an error names the intervention.

    Returns:
        A mask [1 or batch, new positions].

    Raises:
        InputError: If the mask is not of the run's sequences and positions.
    """
    grid = np.asarray(selection, bool)
    if grid.shape[0] not in (1, window.batch) or not axis.total <= grid.shape[1] <= max(axis.horizon, axis.total):
        raise InputError(
            f"{label}: positions is a mask {list(grid.shape)}; the run has {window.batch} sequences of {axis.total} "
            "positions."
        )
    return grid[:, axis.start : axis.start + axis.size]


def order(
    selection: Chosen, axis: Axis, label: str, field: SelectionField | None, prompt: int = 0, strict: bool = True
) -> Indices | None:
    """The selected indices along an axis, in the order in which the selection lists them.

    Args:
        selection: A plain selection, but no mask [batch, pos].
        axis: The axis in this run.
        label: How an error names the intervention.
        field: The field that holds the selection; None along an axis that no field selects along.
        prompt: The number of positions of the prompt.
        strict: False lets an index beyond the axis pass, as one that no run has.

    Returns:
        int64 [n], counted from the start of the axis; None for all.

    Raises:
        InputError: If an index or a mask goes beyond the axis, or a slice selects nothing of it.
    """
    if selection is None:
        return None
    if selection == "prompt":
        return np.arange(prompt)
    if selection == "generated":
        return np.arange(prompt, axis.total)
    said = f"{label}: {field}={selection!r}"
    if isinstance(selection, slice):
        found = np.arange(axis.total)[selection]
        if strict and not found.size and not np.arange(axis.horizon)[selection].size:
            raise InputError(f"{said} selects none of the {axis.total} along {axis.name}.")
        return found
    longest = max(axis.horizon, axis.total)
    if isinstance(selection, tuple) and isinstance(selection[0], bool):
        short = len(selection) < axis.total == longest
        if (len(selection) > longest and strict) or short:
            raise InputError(f"{said} is a mask of {len(selection)}; {axis.name} has {axis.total}.")
        return np.flatnonzero(selection)
    asked = np.atleast_1d(np.asarray(selection, np.int64))
    indices = np.where(asked < 0, asked + axis.total, asked)
    beyond = (indices < 0) | (indices >= longest)
    if beyond.any() and strict:
        bad = int(asked[beyond][0])
        hint = ". Pass strict=False to ignore what lies beyond the sequence" if field == "positions" else ""
        raise InputError(f"{said}: there is no {bad}; {axis.name} has {axis.total} (0-{axis.total - 1}){hint}.")
    return np.where(beyond, _NOWHERE, indices)


def along(
    item: Edit, names: Sequence[str], value: Array, index: int, axis: Axis, chosen: Indices | None, whole: bool
) -> Array:
    """An operand with its entries along one axis moved to where the run computes their elements.

    Args:
        item: The intervention, for errors.
        names: The names of the activation's axes, for errors.
        value: The operand, with as many axes as the activation.
        index: The place of the axis among them.
        axis: The axis in this run.
        chosen: What ``order`` gave for it.
        whole: True if the operand is shaped like the activation, False if like the selected part of it.

    Returns:
        The operand with 1 or ``axis.size`` entries along the axis. Those of elements that are not selected mean nothing.

    Raises:
        InputError: If the operand has neither size along the axis.
    """
    size = value.shape[index]
    if size == 1:
        return value
    if whole or chosen is None:
        if size != axis.total:
            raise misfit(item, names, axis, size, chosen)
        return value[(slice(None),) * index + (slice(axis.start, axis.start + axis.size),)]
    if size != len(chosen):
        raise misfit(item, names, axis, size, chosen)
    places = np.zeros(axis.size, np.int64)
    local = chosen - axis.start
    here = (local >= 0) & (local < axis.size)
    places[local[here]] = np.flatnonzero(here)
    return value.take(places, axis=index)


def misfit(item: Edit, names: Sequence[str], axis: Axis, size: int, chosen: Indices | None) -> InputError:
    """The error for an operand whose ``size`` along an axis is neither the axis's nor that of the selected part."""
    selection = "" if chosen is None else f", of which {len(chosen)} are selected"
    return InputError(
        f"{item.label}: its {item.operand} has shape {list(item.array.shape)}, which does not fit the activation "
        f"[{', '.join(names)}]: along {axis.name} it has {size}, and the activation {axis.total}{selection}."
    )
