"""What FactoredMatrix computes with: NumPy's operations here, and torch's in the torch face, under the same names."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from graphlens.analysis.arrays import Array, as_array, working


class MatrixOps(Protocol):
    """Operations on one kind of array. For torch's kind, "Array" stands for a tensor: the operators are the same."""

    def read(self, value: object) -> Array:
        """What a user gave, as this kind of array."""

    def broadcast(self, array: Array, shape: tuple[int, ...]) -> Array:
        """The array with more leading axes, or longer ones."""

    def product(self, left: Array, right: Array) -> Array:
        """``left @ right``. Raises ValueError or RuntimeError where the leading axes do not broadcast."""

    def scaled(self, array: Array, number: object) -> Array:
        """The array times one number, in its own dtype."""

    def transposed(self, array: Array) -> Array:
        """The array with its last two axes exchanged."""

    def unsqueeze(self, array: Array, axis: int) -> Array:
        """The array with one more axis, of 1."""

    def squeeze(self, array: Array, axis: int) -> Array:
        """The array without an axis of 1."""

    def root(self, array: Array) -> Array:
        """Square roots."""

    def svd(self, array: Array) -> tuple[Array, Array, Array]:
        """(U, S, V transposed), as ``np.linalg.svd(full_matrices=False)`` gives them."""

    def eigenvalues(self, array: Array) -> Array:
        """The eigenvalues of square matrices, complex."""

    def leading(self, array: Array, index: tuple[object, ...]) -> Array:
        """The array at an index of all axes but the last two, as NumPy understands it."""

    def along(self, array: Array, axis: int, item: slice | Array) -> Array:
        """Some entries of one of the last two axes."""


class NumpyOps:
    """NumPy's; see MatrixOps."""

    def read(self, value: object) -> Array:
        """An array of at least float32."""
        return working(as_array(value))  # type: ignore[arg-type]

    def broadcast(self, array: Array, shape: tuple[int, ...]) -> Array:
        """See MatrixOps."""
        return np.broadcast_to(array, shape)

    def product(self, left: Array, right: Array) -> Array:
        """See MatrixOps."""
        return np.asarray(left @ right)

    def scaled(self, array: Array, number: object) -> Array:
        """See MatrixOps."""
        scaled: Array = array * as_array(number).reshape(()).astype(array.dtype)  # type: ignore[arg-type]
        return scaled

    def transposed(self, array: Array) -> Array:
        """See MatrixOps."""
        return np.swapaxes(array, -1, -2)

    def unsqueeze(self, array: Array, axis: int) -> Array:
        """See MatrixOps."""
        return np.expand_dims(array, axis)

    def squeeze(self, array: Array, axis: int) -> Array:
        """See MatrixOps."""
        return np.squeeze(array, axis)

    def root(self, array: Array) -> Array:
        """See MatrixOps."""
        return np.asarray(np.sqrt(array))

    def svd(self, array: Array) -> tuple[Array, Array, Array]:
        """See MatrixOps."""
        left, values, right = np.linalg.svd(array, full_matrices=False)
        return left, values, right

    def eigenvalues(self, array: Array) -> Array:
        """See MatrixOps."""
        values = np.linalg.eigvals(array)
        return values.astype(np.result_type(values.dtype, np.complex64), copy=False)

    def leading(self, array: Array, index: tuple[object, ...]) -> Array:
        """See MatrixOps."""
        part: Array = array[index]  # type: ignore[index]
        return part

    def along(self, array: Array, axis: int, item: slice | Array) -> Array:
        """See MatrixOps."""
        part: Array = array[(..., item) if axis == -1 else (..., item, slice(None))]
        return part
