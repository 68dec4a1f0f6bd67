"""Slice: the slice arguments of TransformerLens's analysis methods, as one object."""

from __future__ import annotations

import builtins
from collections.abc import Sequence
from typing import SupportsIndex, TypeAlias, Union, cast

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import Array, ArrayT, Tensor, as_array
from graphlens.errors import InputError, InputIndexError, checked_number
from graphlens.file.names import JOINT_AXES

# What a slice argument may be; Slice says what each form takes.
SliceInput: TypeAlias = Union[
    SupportsIndex, slice, tuple[int | None, ...], Sequence[int], Sequence[bool], Array, Tensor, "Slice", None
]


class Slice:
    """What to take of one axis (TransformerLens's ``Slice``).

    Args:
        input_slice: ``None`` takes everything; an int one entry, dropping the axis; a tuple ``(stop,)``,
            ``(start, stop)`` or ``(start, stop, step)`` a range; a list or array of ints those entries, or of bools
            those that are True. A ``slice`` and another Slice are taken as they are.

    Raises:
        InputError: For anything else.
    """

    slice: int | builtins.slice | Array
    mode: str

    def __init__(self, input_slice: SliceInput = None) -> None:
        if isinstance(input_slice, Slice):
            self.slice, self.mode = input_slice.slice, input_slice.mode
        elif input_slice is None:
            self.slice, self.mode = slice(None), "identity"
        elif isinstance(input_slice, slice):
            self.slice, self.mode = _whole(input_slice), "slice"
        elif isinstance(input_slice, tuple):
            if not 1 <= len(input_slice) <= 3:
                raise InputError(f"{input_slice!r} is no slice: a tuple is (stop,), (start, stop) or with a step.")
            self.slice, self.mode = _whole(slice(*input_slice)), "slice"
        elif isinstance(input_slice, (str, bytes, bool)):
            raise InputError(f"{input_slice!r} is no slice: pass None, an int, a tuple, or a list of indices.")
        else:
            self.slice, self.mode = self._indices_of(input_slice)

    @staticmethod
    def _indices_of(value: SupportsIndex | Sequence[int] | Array | Tensor) -> tuple[int | Array, str]:
        """(index or indices, mode) of an int, or of a list or array of ints or bools."""
        try:
            array = as_array(cast("npt.ArrayLike", value))
        except (TypeError, ValueError) as error:
            raise InputError(f"{value!r} is no slice: {error}") from error
        if array.size == 0:
            array = array.astype(np.int64)
        if array.ndim == 0 and np.issubdtype(array.dtype, np.integer):
            return int(array), "int"
        if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
            raise InputError(f"{value!r} is no slice: indices are whole numbers or bools along one axis.")
        return array, "array"

    def apply(self, tensor: ArrayT, dim: int = 0) -> ArrayT:
        """The chosen part of an array along one axis.

        Args:
            tensor: An array or a torch tensor.
            dim: The axis, counted from the end where negative.

        Returns:
            A part of the same kind, without the axis where the slice is an int.

        Raises:
            InputIndexError: For an axis or an entry that the array does not have.
        """
        if not -tensor.ndim <= dim < tensor.ndim:
            raise InputIndexError(f"cannot slice axis {dim} of an activation of shape {list(tensor.shape)}.")
        index: list[int | builtins.slice | Array] = [slice(None)] * tensor.ndim
        index[dim] = self.slice
        try:
            return cast(ArrayT, tensor[tuple(index)])
        except IndexError as error:
            raise InputIndexError(f"{self.slice!r} is outside an axis of {tensor.shape[dim]}.") from error

    def indices(self, max_ctx: int | None = None) -> npt.NDArray[np.int64]:
        """The indices that it takes of an axis.

        Args:
            max_ctx: The size of the axis; needed unless the slice is an int.

        Returns:
            int64 [n]; an int gives n = 1.

        Raises:
            InputError: Without ``max_ctx`` where it is needed, and for entries that the axis does not have.
        """
        if self.mode == "int":
            return np.asarray([self.slice], np.int64)
        if max_ctx is None:
            raise InputError("max_ctx is needed: only an int slice has indices without an axis.")
        return np.asarray(self.apply(np.arange(max_ctx, dtype=np.int64)))

    @classmethod
    def unwrap(cls, slice_input: SliceInput) -> Slice:
        """The Slice of an argument of run_with_cache, where an int keeps an axis of one.

        Args:
            slice_input: An int, a slice, a list or array of ints, None for all, or a Slice.

        Returns:
            The Slice; of an int, one of that entry alone.
        """
        given = cls(slice_input)
        if isinstance(given.slice, int) and not isinstance(slice_input, Slice):
            return cls([given.slice])
        return given

    def __repr__(self) -> str:
        return f"Slice({self.slice!r})"


def _whole(given: slice) -> slice:
    """A slice of Python's own ints. Raises InputError for other numbers, and a step of 0."""
    start, stop, step = (
        None if part is None else checked_number(part, f"{name} of a slice")
        for name, part in (("start", given.start), ("stop", given.stop), ("step", given.step))
    )
    if step == 0:
        raise InputError(f"{given!r} is no slice: its step is 0.")
    return slice(start, stop, step)


def of_positions(array: Array, axes: Sequence[str], pos_slice: SliceInput, run: tuple[int, ...]) -> Array:
    """The chosen positions of an activation.

    Args:
        array: The activation.
        axes: The name of each of its axes.
        pos_slice: What to take along ``pos`` or ``query_pos``; an int keeps an axis of one.
        run: (prompts, positions) of the run.

    Returns:
        That part; an activation that has neither axis comes back whole.

    Raises:
        InputError: For positions that are not there.
    """
    if axes[0] in JOINT_AXES:  # prompts and positions in one axis, perhaps heads too
        parts = array.reshape(*run[:2], -1, *array.shape[1:])
        chosen_parts = of_positions(parts, ("batch", "pos", "head", *axes[1:]), pos_slice, run)
        return chosen_parts.reshape(-1, *array.shape[1:])
    axis = next((i for i, name in enumerate(axes) if name in ("pos", "query_pos")), None)
    if axis is None:
        return array
    chosen = Slice.unwrap(pos_slice)
    try:
        return np.asarray(chosen.apply(array, axis))
    except InputError as error:
        raise InputError(f"pos_slice={pos_slice!r} reaches beyond the {array.shape[axis]} positions.") from error
