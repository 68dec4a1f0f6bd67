"""How vectors of the residual stream are read: divided by a norm's scale, projected, matched to prompts and positions."""

from __future__ import annotations

from dataclasses import dataclass

from graphlens.analysis.arrays import Array
from graphlens.errors import InputError


@dataclass(frozen=True)
class Readout:
    """How a vector written to the residual stream is read: as it is, centred and scaled by a norm, projected, or both.

    The scale is the one that the norm had in the run, so reading is linear, and a direction can be read before anything
    is multiplied by it: that is what keeps neurons and heads from being expanded to d_model.

    Attributes:
        centre: Whether the norm subtracts the mean (LayerNorm).
        scale: What the norm divides by, [*b, p, 1]; None for no norm.
        onto: Directions [D] or [D, n] that the result is projected onto; None for none.
    """

    centre: bool = False
    scale: Array | None = None
    onto: Array | None = None

    def directions(self, written: Array) -> Array:
        """Written vectors [..., D] -> what is read of them but for the scale: [..., D], [..., n] or (1-D onto) [...]."""
        if self.centre:
            written = written - written.mean(-1, keepdims=True)
        return written if self.onto is None else written @ self.onto

    def coefficients(self, factors: Array) -> Array:
        """Activations [*b, p, k] that multiply directions -> the same, divided by the scale."""
        return factors if self.scale is None else factors / self.scale

    def vectors(self, written: Array) -> Array:
        """Written vectors [..., *b, p, D] at the scale's positions -> what is read of them."""
        read = self.directions(written)
        if self.scale is None:
            return read
        return read / (self.scale[..., 0] if self.onto is not None and self.onto.ndim == 1 else self.scale)


@dataclass(frozen=True)
class PostNorm:
    """The norm that a sublayer's output goes through before it is added to the residual stream, at the scale of the run.

    At that scale it is linear, so what heads and neurons write through it sums to what the sublayer wrote.

    Attributes:
        centre: Whether it subtracts the mean.
        scale: What it divides by, [*b, p, 1].
        weight: What it multiplies by then, [D]; None for nothing.
        bias: What it adds, [D]; None for nothing.
    """

    centre: bool
    scale: Array
    weight: Array | None
    bias: Array | None

    def directions(self, given: Array) -> Array:
        """Vectors [..., D] that a sublayer gives -> what is written of them but for the scale."""
        if self.centre:
            given = given - given.mean(-1, keepdims=True)
        return given if self.weight is None else given * self.weight

    def vectors(self, given: Array) -> Array:
        """Vectors [..., *b, p, D] that a sublayer gives -> what is written of them, without the bias."""
        return self.directions(given) / self.scale


def fitted(scale: Array, stack: Array, batched: bool) -> Array:
    """A norm's scale [*b, p, 1] ready to divide a stack [n, *b, p, D].

    Args:
        scale: What the norm divided by in the run.
        stack: What is to be divided.
        batched: Whether the scale has a batch axis.

    Raises:
        InputError: Where broadcasting would pair a prompt or position with the scale of another.
    """
    found, wanted = scale.shape[:-1], stack.shape[1:-1]
    if batched and len(found) == len(wanted) + 1 and found[0] == 1:
        scale, found = scale[0], found[1:]
    if not batched and len(wanted) == 2 and len(found) == 1:
        batched, found = True, (1, *found)
    # One prompt's scale serves a batch; one position's never serves the others.
    fits = len(found) == len(wanted) and all(
        size in (found_size, 1) or (batched and axis == 0 and found_size == 1)
        for axis, (found_size, size) in enumerate(zip(found, wanted, strict=True))
    )
    if not fits:
        raise InputError(
            f"residual_stack has shape {list(stack.shape)} where the cached norm's scale has {list(scale.shape)}: "
            "the axes between must be the same prompts and positions. Give the pos_slice that the stack was made with."
        )
    return scale


def aligned(directions: Array, axes: tuple[int, ...]) -> Array:
    """Directions [..., D] with the axes of a stack's prompts and positions.

    Args:
        directions: One direction for each token given.
        axes: The sizes of the stack's prompts and positions.

    Returns:
        Directions that broadcast to [*axes, D].

    Raises:
        InputError: Where it is open which direction belongs to which prompt or position.
    """
    given = directions.shape[:-1]
    if len(given) == 1 and len(axes) == 2 and axes[0] > 1:
        if given[0] == axes[0] == axes[1]:
            raise InputError(
                f"{given[0]} tokens for {axes[0]} prompts of {axes[1]} positions: say which by a shape of "
                f"[{given[0]}, 1] (a token a prompt) or [1, {given[0]}] (a token a position)."
            )
        if given[0] == axes[0]:
            return directions[:, None]
    if len(given) > len(axes) or any(
        size not in (1, axis) for size, axis in zip(given[::-1], axes[::-1], strict=False)
    ):
        raise InputError(
            f"tokens have shape {list(given)} and the stack's prompts and positions {list(axes)}: give one token, "
            "or one for each of them."
        )
    return directions
