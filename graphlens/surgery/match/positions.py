"""Which rows of a table of positions are those of the first tokens."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.match.parts import Table
from graphlens.surgery.match.wires import Wires

_STEPS = 60


def offset_of(wires: Wires, table: Table) -> int | None:
    """The row of the first position: 2 in OPT and RoBERTa, 0 in most models; None if it cannot be told.

    Args:
        wires: The graph.
        table: The embedding of positions.
    """
    if table.index is None:
        return 0
    known = wires.shapes.integers(table.index)
    if known is not None:
        return min(known) if known else None
    # Where tokens are counted the count begins with 1, and numbers are added to it.
    value, offset = wires.first(table.index), 0
    for _ in range(_STEPS):
        node = value.producer()
        if node is None:
            return offset if offset >= 0 else None
        if node.op_type == "CumSum":
            return offset + 1 if offset + 1 >= 0 else None
        numbers = [(index, wires.number(one)) for index, one in enumerate(node.inputs)]
        added = [(index, number) for index, number in numbers if number is not None]
        if node.op_type in ("Add", "Sub") and added:
            index, number = added[0]
            if node.op_type == "Sub" and index == 0:
                return None
            offset += int(number) if node.op_type == "Add" else -int(number)
            source = wires.operand(node, 1 - index)
        elif node.op_type in ("Mul", "Where", "Add", "Max", "Clip"):
            # A count times a mask, or another number at padding: the count is what has more behind it.
            found = [one for one in wires.loose_operands(node) if _counts(wires, one)]
            source = found[0] if found else wires.operand(node, 0)
        else:
            source = wires.operand(node, 0)
        if source is None:
            return None
        value = source
    return None


def _counts(wires: Wires, value: ir.Value) -> bool:
    """True if a value is computed from a sum over tokens, a few nodes back."""
    waiting, seen = [value], set[ir.Value]()
    while waiting and len(seen) < _STEPS:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        node = wires.producer(one)
        if node is None:
            continue
        if node.op_type in ("CumSum", "Range"):
            return True
        waiting += wires.loose_operands(node)
    return False
