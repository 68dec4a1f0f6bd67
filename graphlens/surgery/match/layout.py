"""Which logical axis each axis of a value is, followed over nodes that only move numbers, and the view that it becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphlens.surgery.known import Shape
from graphlens.surgery.match.records import View
from graphlens.surgery.match.wires import Wires

Axis = tuple[str, ...]  # the logical axes that one axis of a value holds, the outer one first
Axes = tuple[Axis, ...]
RESHAPES = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten"})
MOVES = RESHAPES | {"Transpose"}
_OF_RUN = frozenset({"b", "p"})  # axes whose size a run chooses


@dataclass(frozen=True)
class Layout:
    """The logical axes of a value.

    Attributes:
        axes: For each axis of the value the logical axes that it holds; none for an axis of size 1.
        sizes: Logical axis -> its size in the imagined run.
    """

    axes: Axes
    sizes: Mapping[str, int]

    @property
    def held(self) -> list[str]:
        """All logical axes, in the order in which they lie."""
        return [name for axis in self.axes for name in axis]

    def size(self, axis: Axis) -> int:
        """The size of an axis."""
        return math.prod(self.sizes[name] for name in axis)

    def permuted(self, order: Sequence[int]) -> Layout:
        """The layout after a Transpose."""
        return Layout(tuple(self.axes[place] for place in order), self.sizes)

    def regrouped(self, shape: Shape) -> Layout | None:
        """The layout of the same numbers in another shape; None if a logical axis would have to be cut unevenly.

        Args:
            shape: The other shape.
        """
        waiting, sizes, axes = self.held, dict(self.sizes), list[Axis]()
        for size in shape:
            axis, left = list[str](), size
            while left > 1:
                if not waiting:
                    return None
                name = waiting.pop(0)
                whole = sizes[name]
                if whole <= left and left % whole == 0:
                    axis.append(name)
                    left //= whole
                elif whole % left == 0:  # the axis holds the outer part of a logical axis
                    outer, inner = f"{name}<", f"{name}>"
                    sizes[outer], sizes[inner] = left, whole // left
                    axis.append(outer)
                    waiting.insert(0, inner)
                    left = 1
                else:
                    return None
            while waiting and sizes[waiting[0]] == 1 and size == 1 and not axis:
                axis.append(waiting.pop(0))
            axes.append(tuple(axis))
        if any(sizes[name] != 1 for name in waiting):
            return None
        return Layout(tuple(axes), sizes)._joined()

    def _joined(self) -> Layout:
        """The layout with halves of a logical axis that lie side by side joined again."""
        sizes, axes = dict(self.sizes), list[Axis]()
        for axis in self.axes:
            names = list[str]()
            for name in axis:
                if names and names[-1].endswith("<") and name == f"{names[-1][:-1]}>":
                    names[-1] = names[-1][:-1]
                else:
                    names.append(name)
            axes.append(tuple(names))
        return Layout(tuple(axes), sizes)

    def without(self, place: int) -> Layout:
        """The layout where one axis has size 1 instead."""
        return Layout(tuple(() if index == place else axis for index, axis in enumerate(self.axes)), self.sizes)

    def resized(self, shape: Shape) -> Layout | None:
        """The layout of a value of as many axes, whose sizes differ where an axis holds one logical axis."""
        if len(shape) != len(self.axes):
            return None
        sizes = dict(self.sizes)
        for axis, size in zip(self.axes, shape, strict=True):
            if len(axis) == 1:
                sizes[axis[0]] = size
            elif self.size(axis) != size:
                return None
        return Layout(self.axes, sizes)


def before(wires: Wires, node: ir.Node, layout: Layout) -> Layout | None:
    """The layout of what a node moves, from that of its output; None if it cannot be told."""
    source = wires.shape(node.inputs[0])
    if node.op_type == "Transpose":
        order = _order(node, len(layout.axes))
        back = [order.index(place) for place in range(len(order))]
        return layout.permuted(back) if len(order) == len(layout.axes) else None
    return None if source is None else layout.regrouped(source)


def after(wires: Wires, node: ir.Node, layout: Layout) -> Layout | None:
    """The layout of a node's output, from that of what it moves; None if it cannot be told."""
    if node.op_type == "Transpose":
        order = _order(node, len(layout.axes))
        return layout.permuted(order) if len(order) == len(layout.axes) else None
    shape = wires.shape(node.outputs[0])
    return None if shape is None else layout.regrouped(shape)


def _order(node: ir.Node, rank: int) -> list[int]:
    return list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else list(range(rank))[::-1]


def view_of(value: ir.Value, layout: Layout, wanted: Sequence[str], joint: int = 0) -> View | None:
    """A value as a view that has some logical axes in their order; None if no reshape and permutation says it.

    Args:
        value: The value.
        layout: Its layout.
        wanted: The logical axes in the order that the view is to have.
        joint: How many of the first of them the view has as one axis; 0 for none.
    """
    held = layout.held
    if sorted(held) != sorted(wanted):
        missing = [name for name in wanted if name not in held]
        if any(layout.sizes.get(name, 1) != 1 for name in missing) or len(held) + len(missing) != len(wanted):
            return None
    if joint:
        return _joint_view(value, layout, wanted, joint)
    places = _split(layout, wanted)
    if places is None:
        return None
    names, shape = places
    order = tuple(names.index(name) for name in wanted)
    plain = len(names) == len(layout.axes) and all(len(axis) == 1 for axis in layout.axes)
    return View(
        str(value.name),
        None if plain else shape,
        None if order == tuple(range(len(order))) else order,
        None if plain else _back(layout, names),
    )


def _split(layout: Layout, wanted: Sequence[str]) -> tuple[list[str], tuple[int, ...]] | None:
    """The logical axes in the order in which they lie, each of them an axis, and the sizes of the reshape that makes it so."""
    names, shape = list[str](), list[int]()
    absent = [name for name in wanted if name not in layout.held]
    for place, axis in enumerate(layout.axes):
        held = list(axis) or ([absent.pop(0)] if absent else [])
        for name in held:
            same = len(names) == place and len(held) == 1
            size = 0 if same else -1 if name in _OF_RUN else layout.sizes.get(name, 1)
            names.append(name)
            shape.append(size)
    if absent or shape.count(-1) > 1:
        return None
    return names, tuple(shape)


def _back(layout: Layout, names: Sequence[str]) -> tuple[int, ...] | None:
    """The sizes of the reshape back; None if only a run tells them."""
    shape = list[int]()
    for place, axis in enumerate(layout.axes):
        same = len(axis) == 1 and place < len(names) and names[place] == axis[0]
        fixed = not _OF_RUN & set(axis)
        shape.append(0 if same else layout.size(axis) if fixed else -1)
    return None if shape.count(-1) > 1 else tuple(shape)


def _joint_view(value: ir.Value, layout: Layout, wanted: Sequence[str], joint: int) -> View | None:
    """A view in which the first logical axes are one axis, as they lie."""
    inner = [name for name in wanted[joint:] if layout.sizes.get(name, 1) != 1]
    order = [place for name in wanted for place, axis in enumerate(layout.axes) if axis and axis[0] == name]
    names = [name for place in order for name in layout.axes[place]]
    if names != [name for name in wanted if name in names] or any(
        layout.sizes.get(n, 1) != 1 for n in wanted if n not in names
    ):
        return None
    order += [place for place, axis in enumerate(layout.axes) if not axis]
    size = math.prod(layout.sizes[name] for name in inner)
    return View(
        str(value.name),
        (-1, size),
        None,
        None,
        first=None if order == sorted(order) else tuple(order),
    )
