"""How vectors of the residual stream are read: divided by a norm's scale, projected, matched to prompts and positions."""

from __future__ import annotations

from dataclasses import dataclass

from graphlens.analysis.arrays import Array
from graphlens.errors import InputShapeError


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


@dataclass(frozen=True)
class RunAxes:
    """The prompts and positions of a run, which are the last axes of a stack [..., *b, p, D] before D.

    Attributes:
        sizes: Their sizes: [b, p], [b], [p] or [].
        batched: Whether the first of them is that of prompts.
    """

    sizes: tuple[int, ...]
    batched: bool

    @property
    def _positioned(self) -> bool:
        """True if the last of them is that of positions."""
        return len(self.sizes) > self.batched

    def ensure_fits(self, stack: Array) -> None:
        """Refuses a stack whose vectors would be divided by the scale of another prompt or position.

        Args:
            stack: Vectors [..., *b, p, D]. Axes before those of the run are anything; axes of the run may be missing or 1.

        Raises:
            InputShapeError: For axes of another size; where a run of one position would serve others; and for vectors
                [k, D] in a run of k prompts of k positions, which may be either.
        """
        given = stack.shape[:-1]
        for place, (size, found) in enumerate(zip(given[::-1], self.sizes[::-1], strict=False)):
            # One prompt's scale serves a batch; one position's never serves the others.
            serves = found == 1 and not (place == 0 and self._positioned)
            if size not in (1, found) and not serves:
                raise InputShapeError(
                    f"residual_stack has shape {list(stack.shape)} where the cached norm's scale is of {self}: its last axes "
                    "must be the same prompts and positions. Give the pos_slice that the stack was made with."
                )
        square = self.sizes[0] if len(self.sizes) == 2 and len(set(self.sizes)) == 1 else 1
        if square > 1 and given in ((square,), (1, square)):
            raise InputShapeError(
                f"residual_stack has shape {list(stack.shape)} in a run of {self}: these may be its prompts or its positions. "
                "Give the pos_slice that the stack was made with, or for positions the vectors of all prompts."
            )

    def aligned(self, directions: Array, stack: Array) -> Array:
        """Directions [..., D] with the axes of a stack's prompts and positions.

        Args:
            directions: One direction for each token given, [D], [k, D] or [b, p, D].
            stack: The vectors [..., *b, p, D] that they are multiplied by.

        Returns:
            Directions that broadcast to the stack.

        Raises:
            InputShapeError: Where it is open which direction belongs to which prompt or position, and where nothing fits.
        """
        given, axes = directions.shape[:-1], stack.shape[:-1]
        if len(given) == 1 and len(self.sizes) == 2 and self.sizes[0] > 1 and given[0] == self.sizes[0]:
            if given[0] == self.sizes[1]:
                raise InputShapeError(
                    f"{given[0]} tokens for {self}: say which by a shape of [{given[0]}, 1] (a token a prompt) or "
                    f"[1, {given[0]}] (a token a position)."
                )
            return directions[:, None]
        if any(1 not in (size, axis) and size != axis for size, axis in zip(given[::-1], axes[::-1], strict=False)):
            raise InputShapeError(
                f"tokens have shape {list(given)} and the stack {list(stack.shape)}, of {self}: give one token, or one for each "
                "of them."
            )
        return directions

    def __str__(self) -> str:
        names = (["prompts"] if self.batched else []) + (["positions"] if self._positioned else [])
        said = " of ".join(f"{size} {name}" for size, name in zip(self.sizes, names, strict=True))
        return said or "one position of one prompt"
