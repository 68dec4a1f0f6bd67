"""How ``heads``, ``positions``, ``dims`` and ``batch`` of an intervention pick elements of an activation in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, Self, SupportsIndex, cast, get_args

import numpy as np
import numpy.typing as npt

from graphlens.edits.record import Array
from graphlens.errors import InputError, checked_number

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
_BEYOND = 2**62  # a larger index would not fit int64 once a size is added


class Tensor(Protocol):
    """What is known here of a tensor of torch: how it is read."""

    @property
    def dtype(self) -> object:
        """Its torch.dtype."""

    def detach(self) -> Self:
        """The tensor without the graph that computed it."""

    def cpu(self) -> Self:
        """The tensor in the computer's own memory."""

    def float(self) -> Self:
        """The same numbers as float32."""

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


def of_tensor(value: Tensor, what: str) -> Array:
    """The array of a tensor of torch, on any device; bfloat16, which NumPy lacks, as float32.

    Args:
        value: The tensor.
        what: How an error calls it.

    Raises:
        InputError: If it holds no numbers that NumPy has.
    """
    try:
        value = value.detach().cpu()
        return (value.float() if str(value.dtype) == "torch.bfloat16" else value).numpy()
    except (TypeError, RuntimeError) as error:  # a quantised, sparse or meta tensor
        raise InputError(f"{what} is a tensor that cannot be read as an array ({error}).") from error


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
        parts = (
            None if part is None else checked_number(part, f"the {name} of the slice at {field}")
            for name, part in (("start", value.start), ("stop", value.stop), ("step", value.step))
        )
        found = slice(*parts)
        if found.step == 0:
            raise InputError(f"{field}={value!r}: the step of a slice is not 0.")
        return found
    if hasattr(value, "detach"):
        value = of_tensor(cast("Tensor", value), field)
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
        if max(-int(array.min()), int(array.max())) > _BEYOND:
            raise InputError(f"{field}={value!r}: no activation is that long.")
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
