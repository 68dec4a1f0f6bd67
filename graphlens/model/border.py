"""How arrays cross to the user and back: everything in which ``graphlens.torch`` differs from ``graphlens``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic

import numpy as np

from graphlens.analysis import numerics
from graphlens.analysis.arrays import Array, ArrayT
from graphlens.analysis.factored_matrix import FactoredMatrix
from graphlens.errors import InputError
from graphlens.model.sampling import GenerateOutput, Sampler, sampler

if TYPE_CHECKING:
    from graphlens.model.config import HookedTransformerConfig
    from graphlens.model.hooks import HookRegistry
    from graphlens.model.request import Request
    from graphlens.model.runner import Runner


class Border(ABC, Generic[ArrayT]):
    """One kind of array in and out of a model.

    Attributes:
        backward_later: True if results have a ``backward()`` that calls the backward hooks of their run; False if
            only a call that itself runs backward does.
    """

    backward_later = False

    def registry(self, runner: Runner[ArrayT]) -> HookRegistry | None:
        """What keeps a model's Python hooks, where hook points have other names than ours; None for the usual.

        Args:
            runner: What runs the model.
        """
        return None

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
    def finish(self, output: Array, request: Request, runner: Runner[ArrayT], learned: Sequence[str] = ()) -> ArrayT:
        """The result of a forward as the user gets it.

        Args:
            output: Logits [b, p, V], or a residual stream [b, p, d_model].
            request: The run that gave it.
            runner: What ran it, for a result whose ``backward()`` runs it again.
            learned: The hooks of the run whose results required a gradient (see ``wants_gradient``), as errors name them.

        Returns:
            The same numbers, with a ``backward()`` where this kind of array has one and backward hooks are active.
        """

    def wants_gradient(self, value: object) -> bool:
        """True for an array whose user expects gradients to reach it, which no run of a graph hands out.

        Args:
            value: What a hook returned, or what a part of the model was called with.
        """
        return False

    def computed(self, output: Array, given: Sequence[object], part: str, learned: Sequence[str] = ()) -> ArrayT:
        """What a part of the model gave when it was called by itself, as the user gets it.

        Args:
            output: The numbers.
            given: What it was called with.
            part: What the user calls the part.
            learned: As in ``finish``.

        Returns:
            The same numbers; where a gradient is expected (see ``wants_gradient``), with a ``backward()`` that says why there is
            none.
        """
        return self.to_user(output)

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
    def sampler(self, seed: int | None) -> Sampler:
        """What draws tokens while generating.

        Args:
            seed: The draws are those of this seed; None leaves them to the seed of NumPy or torch.
        """

    def generated(self, sequences: ArrayT, logits: Sequence[ArrayT]) -> object:
        """What ``generate`` gives with ``output_logits``.

        Args:
            sequences: Token ids [b, p].
            logits: [b, V] for each new token.
        """
        return GenerateOutput(sequences, logits)

    @property
    @abstractmethod
    def config_kind(self) -> type[HookedTransformerConfig]:
        """The class of configurations as code for this kind of array expects them: a torch.dtype as ``dtype``, say."""

    @abstractmethod
    def device_of(self, provider: str) -> str:
        """Where the user's arrays are: "cpu" or "cuda".

        Args:
            provider: The execution provider that computes them.
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

    def finish(self, output: Array, request: Request, runner: Runner[Array], learned: Sequence[str] = ()) -> Array:
        """The output itself."""
        return output

    def loss(self, result: Array, output: Array, request: Request, per_token: bool) -> Array:
        """The loss as an array; see ``utils.lm_cross_entropy_loss``."""
        return numerics.lm_cross_entropy_loss(output, request.need_tokens(), request.mask, per_token)

    def sampler(self, seed: int | None) -> Sampler:
        """NumPy's draws; see ``sampling.sampler``."""
        return sampler(seed)

    @property
    def config_kind(self) -> type[HookedTransformerConfig]:
        """graphlens.HookedTransformerConfig."""
        from graphlens.model.config import HookedTransformerConfig

        return HookedTransformerConfig

    def device_of(self, provider: str) -> str:
        """Where the session runs."""
        return "cuda" if provider.startswith("CUDA") else "cpu"
