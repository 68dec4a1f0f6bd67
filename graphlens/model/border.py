"""How arrays cross to the user and back: everything in which ``graphlens.torch`` differs from ``graphlens``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

import numpy as np

from graphlens.analysis import numerics
from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.factored_matrix import FactoredMatrix
from graphlens.errors import InputError

if TYPE_CHECKING:
    from graphlens.model.config import HookedTransformerConfig
    from graphlens.model.request import Request
    from graphlens.model.runner import Runner


class Border(ABC, Generic[ArrayT]):
    """One kind of array in and out of a model.

    Attributes:
        backward_later: True if results have a ``backward()`` that calls the backward hooks of their run; False if
            only a call that itself runs backward does.
    """

    backward_later = False

    @abstractmethod
    def to_user(self, array: Array) -> ArrayT:
        """An array as the user's kind of array, over the same memory.

        Args:
            array: What a run gave.
        """

    @abstractmethod
    def from_user(self, value: object) -> Array:
        """The NumPy array of what a user handed in.

        Args:
            value: The user's kind of array.

        Raises:
            TypeError: For anything that is no array.
        """

    @abstractmethod
    def toggle_autodiff(self, mode: bool) -> None:
        """Turns automatic differentiation of this kind of array on or off, everywhere.

        Args:
            mode: True turns it on.

        Raises:
            InputError: Where it cannot be on.
        """

    @abstractmethod
    def weight_to_user(self, array: Array, name: str) -> ArrayT:
        """A weight as the user's kind of array, which refuses to be written into.

        Args:
            array: The weight: read-only, or a copy that nobody else has.
            name: What the user calls it.
        """

    @abstractmethod
    def factored(self, left: Array, right: Array) -> FactoredMatrix:
        """The product of two weights, kept as its factors.

        Args:
            left: [..., m, r].
            right: [..., r, n].
        """

    @abstractmethod
    def finish(self, output: Array, request: Request, runner: Runner[ArrayT]) -> ArrayT:
        """The result of a forward as the user gets it.

        Args:
            output: Logits [b, p, V], or a residual stream [b, p, d_model].
            request: The run that gave it.
            runner: What ran it, for a result whose ``backward()`` runs it again.

        Returns:
            The same numbers, with a ``backward()`` where this kind of array has one and backward hooks are active.
        """

    @abstractmethod
    def loss(self, result: ArrayT, output: Array, request: Request, per_token: bool) -> ArrayT:
        """The next-token loss of a forward: a scalar, or [b, p-1] with ``per_token``.

        Args:
            result: The logits as the user gets them.
            output: The same logits as an array.
            request: The run; its tokens are predicted, and its mask says which of them count.
            per_token: True keeps one loss for each position.
        """

    @abstractmethod
    def config(self, cfg: HookedTransformerConfig) -> HookedTransformerConfig:
        """The configuration as code for this kind of array expects it (a torch.dtype as ``dtype``, say).

        Args:
            cfg: The configuration with NumPy's names.
        """


@dataclass(frozen=True)
class NumpyBorder(Border[Array]):
    """NumPy arrays, handed over as they are."""

    def to_user(self, array: Array) -> Array:
        """The array itself."""
        return array

    def from_user(self, value: object) -> Array:
        """The array itself."""
        if not isinstance(value, np.ndarray):
            raise TypeError(type(value).__name__)
        return value

    def toggle_autodiff(self, mode: bool) -> None:
        """Nothing: arrays have no automatic differentiation. Raises InputError where it is to be on."""
        if mode:
            raise InputError(
                "arrays have no automatic differentiation: take model.gradients(tokens, metric), or graphlens.torch."
            )

    def weight_to_user(self, array: Array, name: str) -> Array:
        """The array itself, read-only."""
        array.flags.writeable = False
        return array

    def factored(self, left: Array, right: Array) -> FactoredMatrix:
        """A FactoredMatrix of arrays."""
        return FactoredMatrix(left, right)

    def finish(self, output: Array, request: Request, runner: Runner[Array]) -> Array:
        """The output itself."""
        return output

    def loss(self, result: Array, output: Array, request: Request, per_token: bool) -> Array:
        """The loss as an array; see ``utils.lm_cross_entropy_loss``."""
        return numerics.lm_cross_entropy_loss(output, request.need_tokens(), request.mask, per_token)

    def config(self, cfg: HookedTransformerConfig) -> HookedTransformerConfig:
        """The configuration itself."""
        return cfg
