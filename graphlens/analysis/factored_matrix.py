"""FactoredMatrix: a product of two matrices, kept as its factors."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from types import EllipsisType
from typing import Any, ClassVar, Protocol, Self, SupportsIndex, TypeAlias, cast, overload

import numpy as np

from graphlens.analysis.arrays import Array, ArrayInput, ArrayT, ArrayT_co, as_array, like
from graphlens.analysis.matrix_ops import MatrixOps, NumpyOps
from graphlens.errors import InputError, InputIndexError, InputShapeError, checked_number

# One entry of an index, as it is given and as it is worked with.
Index: TypeAlias = SupportsIndex | slice | EllipsisType | Sequence[int] | Sequence[bool] | Array | None
Entry: TypeAlias = int | slice | EllipsisType | Array | None


class FactoredMatrix:
    """A product of two matrices, never multiplied out unless ``AB`` is asked for (TransformerLens: ``FactoredMatrix``).

    Args:
        A: The left factor [..., l, m], an array or a tensor.
        B: The right factor [..., m, r]. Leading axes broadcast.

    Attributes:
        A: The left factor, a NumPy array of at least float32, as every result is; on the torch face a tensor as it was given.
        B: The right factor.
        shape: (..., l, r).
        ldim: l.
        mdim: m.
        rdim: r.
        has_leading_dims: True where there are axes before the matrix's own.

    Raises:
        InputError: For factors whose shapes do not fit.
    """

    # NumPy would otherwise treat `array @ factored` as an array of objects and never ask __rmatmul__.
    __array_ufunc__ = None
    _ops: ClassVar[MatrixOps] = NumpyOps()

    def __init__(self, A: ArrayInput, B: ArrayInput) -> None:  # noqa: N803
        a, b = self._ops.read(A), self._ops.read(B)
        if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
            raise InputShapeError(
                f"shape mismatch: factors of shapes {list(a.shape)} and {list(b.shape)} have no product [l, m] @ [m, r]."
            )
        try:
            leading = np.broadcast_shapes(tuple(a.shape[:-2]), tuple(b.shape[:-2]))
        except ValueError as error:
            raise InputShapeError(
                f"shape mismatch: the leading axes of factors of shapes {list(a.shape)} and {list(b.shape)} do not broadcast."
            ) from error
        self.ldim, self.mdim, self.rdim = int(a.shape[-2]), int(a.shape[-1]), int(b.shape[-1])
        self.has_leading_dims = bool(leading)
        self.shape: tuple[int, ...] = (*leading, self.ldim, self.rdim)
        self.A: Array = self._spread(a)
        self.B: Array = self._spread(b)

    def _spread(self, factor: Array) -> Array:
        """A factor with all leading axes; itself where it has them."""
        shape = (*self.shape[:-2], *factor.shape[-2:])
        return factor if tuple(factor.shape) == shape else self._ops.broadcast(factor, shape)

    def __repr__(self) -> str:
        return f"FactoredMatrix(shape {list(self.shape)}, inner {self.mdim})"

    # Products

    @overload
    def __matmul__(self, other: FactoredMatrix) -> Self: ...
    @overload
    def __matmul__(self, other: ArrayInput) -> Self | Any: ...
    def __matmul__(self, other: FactoredMatrix | ArrayInput) -> Self | Array:
        """Times a matrix [..., r, n] or FactoredMatrix: a FactoredMatrix; times a vector [r]: an array [..., l]."""
        if isinstance(other, FactoredMatrix):
            return cast(Self, self @ other.A) @ other.B
        matrix = self._ops.read(other)
        if matrix.ndim == 0 or matrix.shape[-2 if matrix.ndim > 1 else -1] != self.rdim:
            raise InputShapeError(
                f"shape {list(self.shape)} cannot be multiplied by {list(matrix.shape)} from the right: "
                "the inner dimension differs."
            )
        if matrix.ndim == 1:
            column = self._product(self.A, self._product(self.B, self._ops.unsqueeze(matrix, -1)))
            return self._ops.squeeze(column, -1)
        # Multiply out on the side that leaves the smaller inner dimension.
        if self.rdim > self.mdim:
            return type(self)(self.A, self._product(self.B, matrix))
        return type(self)(self.AB, matrix)

    def __rmatmul__(self, other: ArrayInput) -> Self | Any:
        """A matrix [..., n, l] times this: a FactoredMatrix; a vector [l] times this: an array [..., r]."""
        matrix = self._ops.read(other)
        if matrix.ndim == 0 or matrix.shape[-1] != self.ldim:
            raise InputShapeError(
                f"shape {list(self.shape)} cannot be multiplied by {list(matrix.shape)} from the left: "
                "the inner dimension differs."
            )
        if matrix.ndim == 1:
            row = self._product(self._product(self._ops.unsqueeze(matrix, -2), self.A), self.B)
            return self._ops.squeeze(row, -2)
        if self.ldim > self.mdim:
            return type(self)(self._product(matrix, self.A), self.B)
        return type(self)(matrix, self.AB)

    def _product(self, left: Array, right: Array) -> Array:
        """``left @ right``. Raises InputShapeError where the leading axes do not broadcast."""
        try:
            return self._ops.product(left, right)
        except (ValueError, RuntimeError) as error:
            raise InputShapeError(
                f"shape mismatch: {list(left.shape)} and {list(right.shape)} cannot be multiplied ({error})."
            ) from error

    def __mul__(self, scalar: ArrayInput) -> Self:
        """Times one number. Raises InputError for an array of several: use ``@`` for those."""
        number = as_array(scalar)
        if number.size != 1 or number.dtype.kind not in "biuf":
            raise InputShapeError(f"* takes one number, not {number.dtype}{list(number.shape)}; @ multiplies matrices.")
        return type(self)(self._ops.scaled(self.A, scalar), self.B)

    __rmul__ = __mul__

    @property
    def AB(self) -> Array:  # noqa: N802
        """The matrix itself, [..., l, r]."""
        return self._product(self.A, self.B)

    @property
    def BA(self) -> Array:  # noqa: N802
        """The factors in the other order, [..., m, m]. Raises InputError unless l == r."""
        if self.ldim != self.rdim:
            raise InputShapeError(f"BA needs a square matrix, and this one has shape {list(self.shape)}.")
        return self._product(self.B, self.A)

    @property
    def T(self) -> Self:  # noqa: N802
        """The transpose of the last two axes."""
        return type(self)(self._ops.transposed(self.B), self._ops.transposed(self.A))

    # Spectra

    @cached_property
    def _svd(self) -> tuple[Array, Array, Array]:
        left, left_values, left_right = self._ops.svd(self.A)
        right_left, right_values, right = self._ops.svd(self.B)
        # Only this small middle matrix mixes the two factors: [.., m, m] at most.
        middle = left_values[..., :, None] * (left_right @ right_left) * right_values[..., None, :]
        inner_left, values, inner_right = self._ops.svd(middle)
        return left @ inner_left, values, self._ops.transposed(right) @ self._ops.transposed(inner_right)

    def svd(self) -> tuple[Array, Array, Array]:
        """The singular value decomposition: the matrix is U @ diag(S) @ V.T.

        Returns:
            (U [..., l, k], S [..., k] from the largest down, V [..., r, k]), k = min(l, m, r).
        """
        return self._svd

    @property
    def U(self) -> Array:  # noqa: N802
        """Left singular vectors, columns of [..., l, k]."""
        return self._svd[0]

    @property
    def S(self) -> Array:  # noqa: N802
        """Singular values [..., k], from the largest down."""
        return self._svd[1]

    @property
    def V(self) -> Array:  # noqa: N802
        """Right singular vectors, columns of [..., r, k]."""
        return self._svd[2]

    @property
    def Vh(self) -> Array:  # noqa: N802
        """``V``, under the name it had in TransformerLens, where it was never transposed either. Deprecated."""
        warnings.warn("FactoredMatrix.Vh is V, not its transpose: write V.", DeprecationWarning, stacklevel=2)
        return self.V

    @property
    def eigenvalues(self) -> Array:
        """Eigenvalues, complex [..., m]: those of BA, which are AB's but for zeros. Raises InputError if not square."""
        return self._ops.eigenvalues(self.BA)

    def norm(self) -> Array:
        """Frobenius norm [...]."""
        return self._ops.root((self.S**2).sum(-1))

    def make_even(self) -> Self:
        """The same matrix with the singular values shared evenly between two factors of orthogonal columns and rows."""
        root = self._ops.root(self.S)
        return type(self)(self.U * root[..., None, :], root[..., :, None] * self._ops.transposed(self.V))

    def collapse_l(self) -> Array:
        """diag(S) @ V.T, [..., k, r]: the matrix without its orthogonal left factor, so of the same norms."""
        return self.S[..., :, None] * self._ops.transposed(self.V)

    def collapse_r(self) -> Array:
        """U @ diag(S), [..., l, k]: the matrix without its orthogonal right factor."""
        return self.U * self.S[..., None, :]

    # Shape

    @property
    def ndim(self) -> int:
        """Number of axes, those of the matrix included."""
        return len(self.shape)

    @property
    def pair(self) -> tuple[Array, Array]:
        """(A, B)."""
        return self.A, self.B

    def unsqueeze(self, k: int) -> Self:
        """With a leading axis of one at ``k``.

        Args:
            k: Where the axis goes among the leading ones; negative ones count from the end, and the last two are the matrix.

        Returns:
            The same matrices, [..., 1, ..., l, r].

        Raises:
            InputIndexError: For a place that is not among the leading axes.
        """
        k = checked_number(k, "k")
        at = k if k >= 0 else k + self.ndim + 1
        if not 0 <= at <= self.ndim - 2:
            raise InputIndexError(f"axis {k} is not a leading axis of shape {list(self.shape)}.")
        return type(self)(self._ops.unsqueeze(self.A, at), self._ops.unsqueeze(self.B, at))

    def get_corner(self, k: int = 3) -> Array:
        """The first ``k`` entries along every axis.

        Args:
            k: How many entries of each axis, 0 or more.

        Returns:
            [min(k, n) of each axis n]: leading axes too.
        """
        k = checked_number(k, "k", least=0)
        corner: Array = (self.A[..., :k, :] @ self.B[..., :, :k])[(slice(k),) * self.ndim]
        return corner

    def __getitem__(self, idx: Index | tuple[Index, ...]) -> Self:
        """Indexes leading axes as NumPy indexes an array; then rows, then columns, where an integer keeps an axis of one.

        Args:
            idx: Along leading axes whatever an array takes, together. Along rows and along columns an integer, a slice,
                or a list, array or tensor of integers or bools with one axis, each by itself: NumPy would pair two lists.

        Returns:
            The part of both factors.

        Raises:
            InputIndexError: For an index outside the matrix.
            InputError: For an index of another form.
        """
        index = [_entry(item, idx) for item in (idx if isinstance(idx, tuple) else (idx,))]
        missing = self.ndim - sum(map(_axes_of, index))
        at = next((place for place, item in enumerate(index) if item is Ellipsis), len(index))
        index[at : at + 1] = [slice(None)] * missing
        if missing < 0 or any(item is Ellipsis for item in index):
            raise InputIndexError(f"{idx!r} is too long an index for a FactoredMatrix of shape {list(self.shape)}.")
        leading: list[Entry] = []
        axis = 0
        while axis < self.ndim - 2 or (len(leading) < len(index) and not _axes_of(index[len(leading)])):
            axis += _axes_of(index[len(leading)])
            leading.append(index[len(leading)])
        matrix = index[len(leading) :]
        if axis > self.ndim - 2 or any(getattr(item, "ndim", 1) != 1 or not _axes_of(item) for item in matrix):
            raise InputError(
                f"{idx!r}: along rows and columns of a FactoredMatrix of shape {list(self.shape)} an index is an integer, a "
                "slice, or a list with one axis, each by itself."
            )
        try:
            a, b = (self._ops.leading(factor, tuple(leading)) for factor in (self.A, self.B))
            rows, columns = map(_keeping, matrix, self.shape[-2:])
            return type(self)(self._ops.along(a, -2, rows), self._ops.along(b, -1, columns))
        except (IndexError, TypeError, ValueError, OverflowError) as error:  # the last: of an integer beyond int64
            raise InputIndexError(
                f"{idx!r} is outside a FactoredMatrix of shape {list(self.shape)}: {error}"
            ) from error

    def __len__(self) -> int:
        return int(self.shape[0])

    def __iter__(self) -> Iterator[Self]:
        return (self[i] for i in range(len(self)))


def _entry(item: Index, whole: object) -> Entry:
    """One entry of an index, lists and tensors as arrays: NumPy takes a tensor with one element for an integer."""
    if item is None or item is Ellipsis or isinstance(item, slice):
        return item
    try:
        array = as_array(cast("ArrayInput", list(item) if isinstance(item, range) else item))
    except (TypeError, ValueError) as error:
        raise InputError(f"{whole!r} is no index: {error}") from error
    if array.size == 0 and array.dtype.kind == "f":  # of an empty list
        array = array.astype(np.int64)
    if array.dtype.kind not in "iub":
        raise InputError(f"{whole!r} is no index: it takes integers, slices, bools, None and ..., not {array.dtype}.")
    return int(array) if array.ndim == 0 and array.dtype.kind != "b" else array


def _axes_of(item: Entry) -> int:
    """How many axes of an array an entry of an index takes."""
    if item is None or item is Ellipsis:
        return 0
    return item.ndim if isinstance(item, np.ndarray) and item.dtype == bool else 1


def _keeping(item: Entry, size: int) -> slice | Array:
    """An index of an axis of ``size``, where an integer keeps the axis."""
    if isinstance(item, int):
        if not -size <= item < size:
            raise IndexError(f"index {item} of an axis of {size}")
        return np.asarray([item])
    return cast("slice | Array", item)


class Factors(Protocol[ArrayT_co]):
    """A product kept as its two factors, as the FactoredMatrix of either face is."""

    @property
    def pair(self) -> tuple[ArrayT_co, ArrayT_co]:
        """(A [..., l, m], B [..., m, r])."""


def composition_scores(left: Factors[ArrayT], right: Factors[ArrayT], broadcast_dims: bool = True) -> ArrayT:
    """How much ``right`` reads of what ``left`` writes (TransformerLens: ``utils.composition_scores``).

    |L R| / (|L| |R|) in Frobenius norms (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

    Args:
        left: A FactoredMatrix, [..., l, m].
        right: A FactoredMatrix, [..., m, r].
        broadcast_dims: Scores of every matrix of ``left`` with every one of ``right``; False pairs the leading axes.

    Returns:
        [*left leading, *right leading], or the common leading axes; a tensor for tensors.

    Raises:
        InputError: Unless left.rdim == right.ldim.
    """
    first, second = FactoredMatrix(*left.pair), FactoredMatrix(*right.pair)
    if first.rdim != second.ldim:
        raise InputShapeError(f"{first!r} and {second!r} do not compose: left.rdim must be right.ldim.")
    if broadcast_dims:
        many_first, many_second = first.ndim - 2, second.ndim - 2
        for axis in range(many_first):
            second = second.unsqueeze(axis)
        for axis in range(many_second):
            first = first.unsqueeze(many_first + axis)
    # The orthogonal outer factors change no norm, so what is multiplied is small.
    composed = first.collapse_l() @ second.collapse_r()
    scores = np.sqrt((composed**2).sum((-2, -1))) / first.norm() / second.norm()
    return like(left.pair[0], scores)
