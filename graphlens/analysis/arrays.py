"""Reads arrays, lists and torch tensors, and gives results of the same kind, without importing torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, TypeGuard, cast

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class UserArray(Protocol):
    """What NumPy's arrays and torch's tensors have in common: axes, and a part at an index."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The size of each axis."""

    @property
    def ndim(self) -> int:
        """The number of axes."""

    def __getitem__(self, index: Any, /) -> Any:
        """The part at an index."""

    def __array__(self) -> Array:
        """The numbers as a NumPy array."""


# The user's kind of array: NumPy's in graphlens, torch.Tensor in graphlens.torch.
if TYPE_CHECKING:
    from typing_extensions import TypeVar

    ArrayT = TypeVar("ArrayT", bound=UserArray, default=Array)
    ArrayT_co = TypeVar("ArrayT_co", bound=UserArray, default=Array, covariant=True)
else:  # a default is for type checkers alone, so typing_extensions need not be installed
    from typing import TypeVar

    ArrayT = TypeVar("ArrayT", bound=UserArray)
    ArrayT_co = TypeVar("ArrayT_co", bound=UserArray, covariant=True)


class Tensor(UserArray, Protocol):
    """A torch tensor, by those of its methods that are called here."""

    @property
    def dtype(self) -> object:
        """Its torch.dtype."""

    def detach(self) -> Tensor:
        """The same numbers without a gradient."""

    def cpu(self) -> Tensor:
        """The same numbers in main memory."""

    def float(self) -> Tensor:
        """The same numbers as float32."""

    def bool(self) -> Tensor:
        """True where a number is not 0."""

    def new_tensor(self, data: Array) -> Tensor:
        """A tensor of ``data`` with this one's dtype and device."""


# What a function takes that reads arrays: an array, a number, nested lists of numbers, a tensor.
ArrayInput = npt.ArrayLike | Tensor


class Border(Protocol[ArrayT_co]):
    """Converts arrays between NumPy and the user's kind; graphlens.model.border has the NumPy and the torch one."""

    def to_user(self, array: Array) -> ArrayT_co:
        """The user's kind of array, over the same memory where that is possible."""

    def from_user(self, value: object) -> Array:
        """The NumPy array of what a user handed in. Raises TypeError for anything that is no array."""

    def toggle_autodiff(self, mode: bool) -> None:
        """Turns automatic differentiation of the user's arrays on or off. Raises InputError where they have none."""


def is_tensor(value: object) -> TypeGuard[Tensor]:
    """True for a torch tensor, told by its methods: torch need not be installed."""
    return hasattr(value, "detach")


def as_array(value: ArrayInput) -> Array:
    """The array of an array, a number, a list, or a torch tensor on any device (bfloat16 as float32).

    Raises:
        InputError: For ragged lists, and for a tensor that has no such array: a sparse, quantised or meta one.
    """
    try:
        if is_tensor(value):
            value = value.detach().cpu()
            if str(value.dtype) == "torch.bfloat16":  # NumPy has none
                value = value.float()
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        from graphlens.errors import InputError

        raise InputError(f"what was given cannot be read as an array: {error}") from error


def like(given: ArrayT, result: npt.ArrayLike) -> ArrayT:
    """A result as the kind of array that was given.

    Args:
        given: What a user handed in: an array or a tensor.
        result: What was computed of it, an array or a number.

    Returns:
        For a tensor, a tensor of its device and dtype (bools stay bools); otherwise an array.
    """
    array = np.asarray(result)
    if not is_tensor(given):
        return cast(ArrayT, array)
    tensor = given.new_tensor(array)
    return cast(ArrayT, tensor.bool() if array.dtype == bool else tensor)


def working(array: Array) -> Array:
    """The array in a dtype to compute in: float32 at least, since half-precision sums lose what they add up."""
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)
