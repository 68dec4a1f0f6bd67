"""What the masks of attention let a query see: earlier tokens only, a window, all; and what is added by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphlens.surgery.match.parts import Core
from graphlens.surgery.match.wires import Wires

_COMPARED = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_NODES = 600
_FEW = 8
_LAID = ("Unsqueeze", "Reshape", "Cast", "Squeeze", "Expand", "Transpose", "Identity")
_GATHERS = frozenset({"Gather", "GatherND", "GatherElements"})


@dataclass(frozen=True)
class Mask:
    """What a layer's masks say.

    Attributes:
        causal: True if queries see no later tokens.
        window: How many tokens back a query sees, itself included; None for all of them.
        sloped: True if something is added that differs by head and grows with distance (ALiBi).
        biased: True if rows of a table are added by distance (relative position bias).
    """

    causal: bool
    window: int | None
    sloped: bool
    biased: bool


class Masks:
    """Reads masks; layers share them, so each is read once.

    Args:
        wires: The graph.
    """

    def __init__(self, wires: Wires) -> None:
        self._wires = wires
        self._known: dict[tuple[ir.Value, ...], Mask] = {}

    def of(self, core: Core) -> Mask:
        """What the masks of a core say."""
        if core.added not in self._known:
            self._known[core.added] = self._read(core)
        return self._known[core.added]

    def _read(self, core: Core) -> Mask:
        nodes, fixed = self._behind(core.added)
        bounds = [bound for node in nodes if (bound := self._bound(node)) is not None]
        windows = [limit + 1 for kind, limit in bounds if kind == "<=" and limit > 0]
        causal = any(node.op_type == "Trilu" for node in nodes) or (">=", 0) in bounds
        for table in fixed:
            found = self._drawn(table)
            if found is not None:
                causal = causal or found[0]
                windows += [found[1]] if found[1] is not None else []
        sloped, biased = self._by_head(core, nodes)
        return Mask(causal, min(windows) if windows else None, sloped, biased)

    def _behind(self, values: tuple[ir.Value, ...]) -> tuple[list[ir.Node], list[ir.Value]]:
        """All nodes that masks are computed by, and the tensors that they begin with."""
        wires, nodes, fixed = self._wires, dict[ir.Node, None](), dict[ir.Value, None]()
        waiting = list(values)
        while waiting and len(nodes) < _NODES:
            value = waiting.pop()
            node = value.producer()
            if node is None:
                if value.const_value is not None:
                    fixed[value] = None
                continue
            if node in nodes or wires.is_live(value):
                continue
            if node.op_type == "Constant":
                fixed[node.outputs[0]] = None
                continue
            nodes[node] = None
            if node.op_type not in ("Shape", "Size"):
                waiting += [one for one in node.inputs if one is not None]
        return list(nodes), list(fixed)

    def _bound(self, node: ir.Node) -> tuple[str, int] | None:
        """What a comparison says of the distance from a key to its query: ("<=", 3) for a distance of at most 3.

        Either two places are compared, each perhaps with a number added, or their difference with a number.
        """
        if node.op_type not in _COMPARED or len(node.inputs) != 2:
            return None
        less, strict = node.op_type in ("Less", "LessOrEqual"), node.op_type in ("Less", "Greater")
        left, right = self._place(node.inputs[0]), self._place(node.inputs[1])
        if left is None or right is None:
            return None
        # left < right with both as queries * q + keys * k + shift: only a difference of places is a distance.
        sign, limit = left[0] - right[0], right[2] - left[2]
        if (sign, left[1] - right[1]) not in ((1, -1), (-1, 1)):
            return None
        positive = sign > 0
        limit = limit if positive else -limit
        at_most = less == positive
        if strict:
            limit += -1 if at_most else 1
        return "<=" if at_most else ">=", limit

    def _place(self, value: ir.Value | None) -> tuple[int, int, int] | None:
        """(how often a query's place is in a value, how often a key's place, the number that is added)."""
        wires, shift = self._wires, 0
        number = wires.number(value)
        if number is not None and wires.is_fixed(value):
            return 0, 0, int(number)
        for _ in range(_FEW):
            if value is None:
                return None
            kind = self._varies(value)
            node = wires.producer(value)
            if kind == 2 and node is not None and node.op_type == "Sub":
                kinds = [self._varies(one) for one in node.inputs if one is not None]
                return (1, -1, shift) if kinds == [1, -1] else (-1, 1, shift) if kinds == [-1, 1] else None
            if node is None or node.op_type not in ("Add", "Sub", *_LAID):
                return _one(kind, shift)
            if node.op_type in ("Add", "Sub"):
                found = self._shifted(node)
                if found is None:
                    return _one(kind, shift)
                value, number = found
                shift += number
            else:
                if kind in (1, -1) and self._varies(node.inputs[0]) not in (kind, 2):
                    # Nearer to where places are counted they lie on the last axis, whichever they are of.
                    rest = self._added(node.inputs[0])
                    return _one(kind, shift + rest)
                value = node.inputs[0]
        return None

    def _shifted(self, node: ir.Node) -> tuple[ir.Value | None, int] | None:
        """(what a number of the file is added to, the number); 0 for what a run adds: earlier tokens."""
        wires = self._wires
        for index in (0, 1):
            other = node.inputs[1 - index]
            number = wires.number(other)
            if number is not None and not (node.op_type == "Sub" and index == 1):
                kept = int(number) if wires.is_fixed(other) else 0
                return node.inputs[index], kept if node.op_type == "Add" else -kept
        return None

    def _added(self, value: ir.Value | None) -> int:
        """The numbers that are added to places before they are laid out."""
        total = 0
        for _ in range(_FEW):
            node = None if value is None else self._wires.producer(value)
            if node is None or node.op_type not in ("Add", "Sub", *_LAID):
                return total
            if node.op_type in ("Add", "Sub"):
                found = self._shifted(node)
                if found is None:
                    return total
                value, number = found
                total += number
            else:
                value = node.inputs[0]
        return total

    def _varies(self, value: ir.Value | None) -> int:
        """1 for a value that differs between queries only, -1 between keys only, 2 between both, 0 between neither."""
        shape = self._wires.shape(value) or ()
        keys = bool(shape) and shape[-1] != 1
        queries = len(shape) > 1 and shape[-2] != 1
        return 2 if keys and queries else 1 if queries else -1 if keys else 0

    def _drawn(self, value: ir.Value) -> tuple[bool, int | None] | None:
        """(causal, window) of a mask that is drawn in a tensor; None for a tensor that is no mask."""
        tensor = value.const_value
        node = value.producer()
        if tensor is None and node is not None and "value" in node.attributes:
            tensor = node.attributes["value"].as_tensor()
        if tensor is None or len(tensor.shape) < 2:
            return None
        rows, columns = int(str(tensor.shape[-2])), int(str(tensor.shape[-1]))
        if rows != columns or rows < 2:
            return None
        drawn = tensor.numpy().reshape(-1, rows, columns)[0]
        if drawn.dtype.kind not in "biuf":
            return None
        seen = drawn == drawn[0, 0]  # a token sees itself
        if not np.all(np.diagonal(seen)) or np.any(np.triu(seen, 1)):
            return None
        count = int(seen[-1].sum())
        return True, count if count < rows else None

    def _by_head(self, core: Core, nodes: list[ir.Node]) -> tuple[bool, bool]:
        """(ALiBi, relative position bias): whether what is added differs by head."""
        wires = self._wires
        scores = wires.shape(core.scores)
        if scores is None or len(scores) < 3 or scores[-3] == 1:
            return False, False
        heads = scores[-3]
        several = (heads, heads * scores[0])  # prompts and heads in one axis, for a product of three axes
        differs = [
            value
            for value in core.added
            if (shape := wires.shape(value)) is not None
            and len(shape) >= 3
            and shape[-3] in several
            and not wires.is_live(value)
        ]
        if not differs:
            return False, False
        tables = [
            node
            for node in nodes
            if node.op_type in _GATHERS
            and wires.is_fixed(node.inputs[0])
            and len(shape := wires.shape(node.inputs[0]) or ()) == 2
            and shape[-1] == heads
        ]
        # A bias that is the same for all inputs is one of a table, read before: slopes are multiplied with places in a run.
        drawn = all(wires.is_fixed(value) for value in differs)
        return not (tables or drawn), bool(tables or drawn)


def _one(kind: int, shift: int) -> tuple[int, int, int] | None:
    """A query's place, or a key's, with a number added."""
    return (1, 0, shift) if kind == 1 else (0, 1, shift) if kind == -1 else None
