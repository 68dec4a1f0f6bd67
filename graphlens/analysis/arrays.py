"""Arrays in and out of functions that belong to no model: tensors are read, and answered, without importing torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
# The user's kind of array: NumPy's in graphlens, torch.Tensor in graphlens.torch.
if TYPE_CHECKING:
    from typing_extensions import TypeVar

    ArrayT = TypeVar("ArrayT", default=Array)
    ArrayT_co = TypeVar("ArrayT_co", default=Array, covariant=True)
else:  # a default is for type checkers alone, so typing_extensions need not be installed
    from typing import TypeVar

    ArrayT = TypeVar("ArrayT")
    ArrayT_co = TypeVar("ArrayT_co", covariant=True)


class Border(Protocol[ArrayT_co]):
    """How arrays cross to the user and back; graphlens.model.border has the two ways there are."""

    def to_user(self, array: Array) -> ArrayT_co:
        """The user's kind of array, over the same memory where that is possible."""

    def from_user(self, value: object) -> Array:
        """The NumPy array of what a user handed in. Raises TypeError for anything that is no array."""


def as_array(value: Any) -> Array:
    """The array of an array, a number, a list, or a torch tensor on any device (bfloat16 as float32)."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        if str(value.dtype) == "torch.bfloat16":  # NumPy has none
            value = value.float()
    return np.asarray(value)


def like(given: Any, result: Any) -> Any:
    """``result`` as what ``given`` is: a tensor of its device and dtype (bools stay bools) for a tensor, else an array."""
    array = np.asarray(result)
    if not hasattr(given, "new_tensor"):
        return array
    tensor = given.new_tensor(array)
    return tensor.bool() if array.dtype == bool else tensor


def working(array: Array) -> Array:
    """The array in a dtype to compute in: float32 at least, since half-precision sums lose what they add up."""
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)
