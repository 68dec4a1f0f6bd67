"""The parts of a gate: what each does to an activation, as an operator of the graph and as a step of one map.

A part of one's own is a name in ``PartName``, its inputs in ``InputName`` and ``Change``, a step in the functions before
and after it, and a record in ``PARTS``. Kinds of intervention name the part that they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from graphlens.edits.record import Array

if TYPE_CHECKING:
    from graphlens.edits.selection import Mask

PartName = Literal["scale", "add", "patch"]
InputName = Literal["scale", "add", "where", "patch"]
Argument = TypeVar("Argument")


@dataclass(frozen=True)
class Change:
    """The map x -> where(where, patch, x * scale + add) of an activation; what is None changes nothing.

    Attributes:
        scale: The factor, in the activation's dtype. It broadcasts to the activation, as the other three do.
        add: The addend, in the activation's dtype.
        where: The elements that are replaced, a mask. None exactly where ``patch`` is.
        patch: Their new values, in the activation's dtype.
    """

    scale: Array | None = None
    add: Array | None = None
    where: Mask | None = None
    patch: Array | None = None

    def arrays(self) -> dict[str, Array]:
        """The arrays that there are, by their names, which are those of a gate's inputs."""
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: np.ascontiguousarray(array) for name, array in found.items() if array is not None}


@dataclass(frozen=True)
class Part:
    """A part of a gate: an operator of the graph, its inputs, and how it goes on with what is changed already.

    Attributes:
        name: The part's name, which kinds of intervention give as theirs.
        operator: The ONNX operator that computes it.
        inputs: The names of its inputs, in the operator's order and without the activation -> the number at which each
            changes nothing. The last is the operand; False is that of a mask of the elements that change.
        place: The place of the activation among the operator's arguments.
        then: (change, mask or None for all, operand) -> the change followed by this part. The operand is ``filled``.
    """

    name: PartName
    operator: str
    inputs: Mapping[InputName, float]
    place: int
    then: Callable[[Change, Mask | None, Array], Change]

    @property
    def masked(self) -> bool:
        """True if the operator itself takes a mask of the elements that change."""
        return "where" in self.inputs

    def filled(self, operand: Array, mask: Mask | None) -> Array:
        """The operand for all elements: unless the operator takes the mask, it changes nothing where that is False."""
        if mask is None or self.masked:
            return operand
        (nothing,) = self.inputs.values()
        return np.where(mask, operand, operand.dtype.type(nothing))

    def arguments(self, activation: Argument, given: Sequence[Argument]) -> list[Argument]:
        """The operator's arguments: the activation at its place among what is given for the inputs."""
        return [*given[: self.place], activation, *given[self.place :]]


def _then_scale(change: Change, mask: Mask | None, factor: Array) -> Change:
    return Change(
        scale=factor if change.scale is None else change.scale * factor,
        add=None if change.add is None else change.add * factor,
        where=change.where,
        patch=None if change.patch is None else change.patch * factor,
    )


def _then_add(change: Change, mask: Mask | None, addend: Array) -> Change:
    return Change(
        scale=change.scale,
        add=addend if change.add is None else change.add + addend,
        where=change.where,
        patch=None if change.patch is None else change.patch + addend,
    )


def _then_patch(change: Change, mask: Mask | None, value: Array) -> Change:
    where = np.ones((1,) * value.ndim, bool) if mask is None else mask
    return Change(
        scale=change.scale,
        add=change.add,
        where=where if change.where is None else change.where | where,
        patch=value if mask is None or change.patch is None else np.where(mask, value, change.patch),
    )


# The parts of a gate, in the order in which it applies them.
PARTS: Mapping[str, Part] = {
    part.name: part
    for part in (
        Part("scale", "Mul", {"scale": 1}, 0, _then_scale),
        Part("add", "Add", {"add": 0}, 0, _then_add),
        Part("patch", "Where", {"where": False, "patch": 0}, 2, _then_patch),
    )
}
# The inputs of a gate -> the part that each belongs to.
INPUTS: Mapping[str, Part] = {name: part for part in PARTS.values() for name in part.inputs}
