"""Which columns of a projection's result each head's numbers are, found by moving the numbers of the columns themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphlens.surgery.match.layout import RESHAPES
from graphlens.surgery.match.records import View
from graphlens.surgery.match.wires import Wires

Numbers = npt.NDArray[np.int64]
_STEPS = 16


@dataclass(frozen=True)
class Stretch:
    """Heads among the columns of a matrix: units of d_head columns, in groups.

    Attributes:
        groups: How many groups there are.
        each: How many units a group has.
        first: The first unit of each group that is taken.
        heads: How many units are taken of each group.
        width: d_head.
    """

    groups: int
    each: int
    first: int
    heads: int
    width: int


def places_of(wires: Wires, start: ir.Value, end: ir.Value) -> Numbers | None:
    """The place that each number of a value has in another one that it is a moved part of.

    Args:
        wires: The graph.
        start: That other value.
        end: What was moved.

    Returns:
        Places among all numbers of ``start``, in the shape of ``end``; None where something else than moving happens.
    """
    path: list[tuple[ir.Node, ir.Value]] = []
    value, start = wires.first(end), wires.first(start)
    while value is not start:
        node = value.producer()
        source = None if node is None else wires.operand(node, 0)
        if node is None or source is None or len(path) > _STEPS:
            return None
        path.append((node, value))
        value = source
    shape = wires.shape(start)
    if shape is None:
        return None
    found: Numbers | None = np.arange(math.prod(shape), dtype=np.int64).reshape(shape)
    for node, value in reversed(path):
        found = None if found is None else _moved(wires, node, value, found)
    return found


def columns_of(wires: Wires, start: ir.Value, end: ir.Value, width: int) -> Numbers | None:
    """The column that each number of a value is, of a value [.., width] that it is a moved part of; see places_of."""
    places = places_of(wires, start, end)
    return None if places is None or not width else places % width


def _moved(wires: Wires, node: ir.Node, value: ir.Value, numbers: Numbers) -> Numbers | None:
    """What a node makes of numbers that lie as its first input."""
    shape = wires.shape(value)
    if node.op_type in RESHAPES:
        return None if shape is None else numbers.reshape(shape)
    if node.op_type == "Transpose":
        return numbers.transpose(list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else None)
    if node.op_type == "Split":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        sizes = [wires.shape(output) for output in node.outputs]
        if any(size is None for size in sizes):
            return None
        ends = np.cumsum([size[axis] for size in sizes if size is not None])
        place = next(index for index, output in enumerate(node.outputs) if wires.first(output) is value)
        return np.split(numbers, ends[:-1], axis)[place]
    if node.op_type == "Slice":
        return _sliced(wires, node, numbers)
    if node.op_type == "Gather":
        places = wires.shapes.known(node.inputs[1]).data if node.inputs[1] is not None else None
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
        return None if places is None else np.take(numbers, places.astype(np.int64), axis)
    if node.op_type == "GatherND" and (
        "batch_dims" not in node.attributes or not node.attributes["batch_dims"].as_int()
    ):
        places = wires.shapes.known(node.inputs[1]).data if node.inputs[1] is not None else None
        return None if places is None else numbers[tuple(np.moveaxis(places.astype(np.int64), -1, 0))]
    return None


def _sliced(wires: Wires, node: ir.Node, numbers: Numbers) -> Numbers | None:
    given = [wires.shapes.integers(one) for one in node.inputs[1:]]
    if len(given) < 2 or given[0] is None or given[1] is None:
        return None
    axes = given[2] if len(given) > 2 and given[2] is not None else list(range(len(given[0])))
    steps = given[3] if len(given) > 3 and given[3] is not None else [1] * len(axes)
    cut = [slice(None)] * numbers.ndim
    for start, end, axis, step in zip(given[0], given[1], axes, steps, strict=True):
        cut[axis] = slice(start, None if step < 0 and end < -(1 << 31) else end, step)
    return numbers[tuple(cut)]


def viewed(view: View, numbers: Numbers) -> Numbers:
    """Numbers that lie as a value, as a view of the value has them.

    Args:
        view: The view.
        numbers: The numbers.
    """
    if view.first is not None:
        numbers = numbers.transpose(view.first)
    if view.shape is not None:
        numbers = numbers.reshape(
            [numbers.shape[place] if size == 0 else size for place, size in enumerate(view.shape)]
        )
    return numbers if view.permute is None else numbers.transpose(view.permute)


def stretch_of(columns: Numbers, width: int) -> Stretch | None:
    """Heads' columns as units in groups; None where they lie in another way.

    Args:
        columns: [heads, d_head] the column of each.
        width: How many columns there are.
    """
    heads, size = columns.shape
    begin = columns[:, 0]
    if np.any(columns != begin[:, None] + np.arange(size)) or np.any(begin % size) or width % size:
        return None
    units, total = begin // size, width // size
    steps = np.diff(units)
    run = heads if not np.any(steps != 1) else int(np.argmax(steps != 1)) + 1
    if heads % run:
        return None
    groups = heads // run
    if groups == 1:
        return Stretch(1, total, int(units[0]), heads, size)
    each = int(units[run] - units[0])
    wanted = units[0] + (np.arange(heads) // run) * each + np.arange(heads) % run
    if np.any(units != wanted) or each * groups != total or each < run:
        return None
    return Stretch(groups, each, int(units[0]) % each, run, size) if int(units[0]) + run <= each else None
