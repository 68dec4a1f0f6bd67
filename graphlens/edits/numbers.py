"""How numbers that a user gave, as lists, arrays or tensors of torch, become float32 arrays."""

from __future__ import annotations

from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from graphlens.edits.selection import Tensor, of_tensor
from graphlens.errors import InputError
from graphlens.file.safetensors import Array


def numbers_of(value: npt.ArrayLike, what: str) -> Array:
    """An array of its own, float32.

    Args:
        value: A list, an array or a tensor of torch.
        what: How an error calls it.

    Raises:
        InputError: It holds no numbers.
    """
    if hasattr(value, "detach"):
        value = of_tensor(cast(Tensor, value), what)
    try:
        if np.iscomplexobj(value):
            raise TypeError("complex numbers have no place in it")
        with np.errstate(over="ignore"):  # what is too large becomes infinite, which those refuse that cannot have it
            return np.array(value, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: an array of numbers is wanted ({error}).") from error


class _Factory(Protocol):
    """What is known here of a tensor of torch: it makes others of its kind."""

    def new_tensor(self, data: Array) -> Array:
        """A tensor of its dtype, on its device."""


def as_given(made: Array, given: npt.ArrayLike) -> Array:
    """A result as a user gave the input: a tensor of torch for a tensor, of its dtype and on its device.

    Args:
        made: The result.
        given: The input.
    """
    return cast(_Factory, given).new_tensor(made) if hasattr(given, "new_tensor") else made
