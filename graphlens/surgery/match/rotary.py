"""Rotations by position: from what is rotated to what it was before, and how its dimensions are paired."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.match.layout import MOVES
from graphlens.surgery.match.parts import Rotation
from graphlens.surgery.match.wires import Wires

_PARTS = frozenset({"Split", "Slice", "Gather", "GatherND"})
_ALONE = frozenset({"Clip", "Expand", "Tile", "Min", "Max"})  # before a rotation, of one activation
_WORK = frozenset(
    {"Mul", "Add", "Sub", "Neg", "Concat", "ScatterND", "ScatterElements", "Expand", "Where", "Tile", "MatMul"}
)
_NODES = 60  # more than the largest rotation has


def rotation_of(wires: Wires, rotated: ir.Value, ends: frozenset[ir.Value] | set[ir.Value]) -> Rotation | None:
    """The rotation that an activation is the result of; None if it is computed in another way.

    Args:
        wires: The graph.
        rotated: The activation.
        ends: Where the walk back ends: results of products with weights and of norms.
    """
    found = _region(wires, rotated, ends)
    if found is None:
        return None
    region, start = found
    before = _branching(wires, start, region)
    if before is rotated or not _turns(wires, region):
        return None
    whole, part = wires.shape(rotated), wires.shape(before)
    if whole is None or part is None:
        return None
    angles = _angles(wires, region)
    if not angles:
        return None
    inner = [node for node in region if _comes_after(wires, node, before, region)]
    return Rotation(before, _dimensions(wires, inner, whole[-1]), _adjacent(wires, inner), angles)


def _region(
    wires: Wires, rotated: ir.Value, ends: frozenset[ir.Value] | set[ir.Value]
) -> tuple[list[ir.Node], ir.Value] | None:
    """The nodes between an activation and the one end that it is computed from, and that end."""
    nodes, waiting, seen, start = dict[ir.Node, None](), [rotated], {rotated}, set[ir.Value]()
    while waiting:
        value = waiting.pop()
        node = value.producer()
        if value in ends and value is not rotated:
            start.add(value)
            continue
        if node is None or len(nodes) > _NODES or node.op_type not in MOVES | _PARTS | _ALONE | _WORK:
            return None
        nodes[node] = None
        for one in wires.live_operands(node):
            if one not in seen:
                seen.add(one)
                waiting.append(one)
    if len(start) != 1:
        return None
    return sorted(nodes, key=lambda node: wires.place[node]), next(iter(start))


def _branching(wires: Wires, start: ir.Value, region: list[ir.Node]) -> ir.Value:
    """The last activation that all of a region is computed from: it is read by several nodes, or as several parts."""
    inside, value = set(region), start
    while True:
        readers = [node for node, _ in wires.uses(value) if node in inside]
        if len(set(readers)) != 1:
            return value
        node = readers[0]
        if node.op_type not in MOVES | _PARTS | _ALONE and not _is_scaling(wires, node):
            return value
        used = [out for out in node.outputs if any(reader in inside for reader, _ in wires.uses(out))]
        if len(used) != 1:
            return value
        value = wires.first(used[0])


def _is_scaling(wires: Wires, node: ir.Node) -> bool:
    return node.op_type in ("Mul", "Div") and any(wires.number(one) is not None for one in node.inputs)


def _turns(wires: Wires, region: list[ir.Node]) -> bool:
    """True if a region multiplies and adds, and negates or subtracts, as a rotation does."""
    operators = {node.op_type for node in region}
    return "Mul" in operators and ("Neg" in operators or "Sub" in operators or _is_turned_by_weights(wires, region))


def _is_turned_by_weights(wires: Wires, region: list[ir.Node]) -> bool:
    """True where the sign is in what it is multiplied by."""
    return any(node.op_type == "Mul" and wires.number(one) == -1 for node in region for one in node.inputs)


def _angles(wires: Wires, region: list[ir.Node]) -> tuple[ir.Value, ...]:
    """What is multiplied with an activation in a region and is no number."""
    found = dict[ir.Value, None]()
    for node in region:
        if node.op_type == "Mul" and len(wires.live_operands(node)) == 1:
            for one in node.inputs:
                if one is not None and not wires.is_live(one) and wires.number(one) is None:
                    found[wires.first(one)] = None
    return tuple(found)


def _comes_after(wires: Wires, node: ir.Node, before: ir.Value, region: list[ir.Node]) -> bool:
    maker = before.producer()
    return maker is None or wires.place[node] > wires.place[maker]


def _dimensions(wires: Wires, region: list[ir.Node], width: int) -> int:
    """How many dimensions of a head are rotated: what is left over is put beside the rotated ones as it was."""
    turned = {wires.first(node.outputs[0]) for node in region if node.op_type in ("Add", "Sub")}
    for node in reversed(region):
        if node.op_type != "Concat":
            continue
        parts = wires.live_operands(node)
        plain = [one for one in parts if not _is_turned(wires, one, turned, set(region))]
        rest = [shape[-1] for one in plain if (shape := wires.shape(one)) is not None]
        if plain and len(plain) < len(parts) and len(rest) == len(plain):
            whole = wires.shape(node.outputs[0])
            if whole is not None and whole[-1] == width:
                return width - sum(rest)
    return width


def _is_turned(wires: Wires, value: ir.Value, turned: set[ir.Value], inside: set[ir.Node]) -> bool:
    """True if a part is computed from a sum of products, and not moved only."""
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        one = waiting.pop()
        if one in turned:
            return True
        node = one.producer()
        if one in seen or node is None or node not in inside:
            continue
        seen.add(one)
        waiting += wires.live_operands(node)
    return False


def _adjacent(wires: Wires, region: list[ir.Node]) -> bool | None:
    """True if neighbours are rotated together: they are cut out by a step of two, or lie on an axis of two."""
    halves = None
    for node in region:
        if node.op_type == "Slice":
            steps = wires.shapes.integers(node.inputs[4]) if len(node.inputs) > 4 else None
            if steps is not None and steps[-1] == 2:
                return True
            halves = False
        elif node.op_type == "Split":
            shape = wires.shape(node.outputs[0])
            if shape is not None and shape[-1] == 1:
                return True
            halves = False
        elif node.op_type == "Gather":
            shape = wires.shape(node.inputs[0])
            if shape is not None and shape[-1] == 2:
                return True
    return halves
