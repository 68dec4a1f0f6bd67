"""Slice: the slice arguments of TransformerLens's analysis methods, as one object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from graphlens.analysis.arrays import as_array
from graphlens.errors import InputError

SliceInput = Any


class Slice:
    """What to take of one axis (TransformerLens's ``Slice``).

    ``None`` takes everything; an int one entry, dropping the axis; a tuple ``(stop,)``, ``(start, stop)`` or
    ``(start, stop, step)`` a range; a list or array of ints those entries, or of bools those that are True. A
    ``slice`` and another Slice are taken as they are. Raises InputError for anything else.
    """

    slice: int | slice | npt.NDArray[Any]
    mode: str

    def __init__(self, input_slice: SliceInput = None) -> None:
        if isinstance(input_slice, Slice):
            self.slice, self.mode = input_slice.slice, input_slice.mode
        elif input_slice is None:
            self.slice, self.mode = slice(None), "identity"
        elif isinstance(input_slice, slice):
            self.slice, self.mode = input_slice, "slice"
        elif isinstance(input_slice, tuple):
            if not 1 <= len(input_slice) <= 3:
                raise InputError(f"{input_slice!r} is no slice: a tuple is (stop,), (start, stop) or with a step.")
            self.slice, self.mode = slice(*input_slice), "slice"
        elif isinstance(input_slice, (str, bytes, bool)):
            raise InputError(f"{input_slice!r} is no slice: pass None, an int, a tuple, or a list of indices.")
        else:
            self.slice, self.mode = self._indices_of(input_slice)

    @staticmethod
    def _indices_of(value: Any) -> tuple[int | npt.NDArray[Any], str]:
        try:
            array = as_array(value)
        except (TypeError, ValueError) as error:
            raise InputError(f"{value!r} is no slice: {error}") from error
        if array.size == 0:
            array = array.astype(np.int64)
        if array.ndim == 0 and np.issubdtype(array.dtype, np.integer):
            return int(array), "int"
        if array.ndim != 1 or not (np.issubdtype(array.dtype, np.integer) or array.dtype == bool):
            raise InputError(f"{value!r} is no slice: indices are whole numbers or bools along one axis.")
        return array, "array"

    def apply(self, tensor: Any, dim: int = 0) -> Any:
        """``tensor`` (array or torch tensor) with its axis ``dim`` sliced. Raises InputError for what it lacks."""
        if not -tensor.ndim <= dim < tensor.ndim:
            raise InputError(f"cannot slice axis {dim} of an activation of shape {list(tensor.shape)}.")
        index: list[Any] = [slice(None)] * tensor.ndim
        index[dim] = self.slice
        try:
            return tensor[tuple(index)]
        except IndexError as error:
            raise InputError(f"{self.slice!r} is outside an axis of {tensor.shape[dim]}.") from error

    def indices(self, max_ctx: int | None = None) -> npt.NDArray[np.int64]:
        """The indices it takes of an axis of ``max_ctx`` entries, int64 [n] (an int gives n = 1)."""
        if self.mode == "int":
            return np.asarray([self.slice], np.int64)
        if max_ctx is None:
            raise InputError("max_ctx is needed: only an int slice has indices without an axis.")
        return np.asarray(self.apply(np.arange(max_ctx, dtype=np.int64)))

    @classmethod
    def unwrap(cls, slice_input: SliceInput) -> Slice:
        """The Slice of an argument of run_with_cache, where an int keeps an axis of one."""
        given = cls(slice_input)
        return cls([given.slice]) if given.mode == "int" and not isinstance(slice_input, Slice) else given

    def __repr__(self) -> str:
        return f"Slice({self.slice!r})"


def of_positions(array: npt.NDArray[Any], axes: Sequence[str], pos_slice: SliceInput) -> npt.NDArray[Any]:
    """The chosen positions of an activation with these named axes: along ``pos`` or ``query_pos``; one that has neither
    comes back whole. Raises InputError for positions that are not there."""
    axis = next((i for i, name in enumerate(axes) if name in ("pos", "query_pos")), None)
    if axis is None:
        return array
    chosen = Slice.unwrap(pos_slice)
    try:
        return np.asarray(chosen.apply(array, axis))
    except InputError as error:
        raise InputError(f"pos_slice={pos_slice!r} reaches beyond the {array.shape[axis]} positions.") from error
