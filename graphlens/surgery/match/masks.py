"""What the masks of attention let a query see: earlier tokens only, a window, all; and what is added by position."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphlens.surgery.match.parts import Core
from graphlens.surgery.match.wires import Wires

_COMPARED = frozenset({"Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_NODES = 600
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
        windows = [number for node in nodes if (number := self._window(node)) is not None]
        causal = any(node.op_type == "Trilu" or self._compares_places(node) for node in nodes)
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

    def _compares_places(self, node: ir.Node) -> bool:
        """True for a comparison of tokens' places with one another, not with a number."""
        if node.op_type not in _COMPARED:
            return False
        shapes = [self._wires.shape(one) for one in node.inputs]
        whole = self._wires.shape(node.outputs[0])
        if whole is None or any(shape is None for shape in shapes):
            return False
        many = [shape for shape in shapes if shape is not None and any(size != 1 for size in shape)]
        return len(many) == 2 and many[0] != many[1] and len([size for size in whole if size > 1]) >= 2

    def _window(self, node: ir.Node) -> int | None:
        """The window that a comparison of places keeps: one side of it is shifted by a constant."""
        wires = self._wires
        if not self._compares_places(node):
            return None
        for index in (0, 1):
            shift = self._shift(node.inputs[index])
            if shift is None:
                continue
            # key > query - window, query - window < key, key + window > query, query < key + window.
            strict = node.op_type in ("Less", "Greater")
            size = abs(shift) if strict else abs(shift) + 1
            other = self._shift(node.inputs[1 - index])
            if other is None and size > 1 and self._is_far(node, index, shift):
                return size
        del wires
        return None

    def _is_far(self, node: ir.Node, index: int, shift: int) -> bool:
        """True if a comparison keeps what is near, and does not only look one token ahead."""
        less = node.op_type in ("Less", "LessOrEqual")
        smaller = index == (0 if less else 1)  # the side that is to be the smaller one
        return shift < 0 if smaller else shift > 0

    def _shift(self, value: ir.Value | None) -> int | None:
        """The number that is added to places, where one is."""
        wires = self._wires
        for _ in range(4):
            node = None if value is None else wires.producer(value)
            if node is None or value is None:
                return None
            if node.op_type in ("Add", "Sub"):
                number = wires.number(node.inputs[1])
                shape = wires.shape(node.inputs[0])
                if (
                    number is not None
                    and shape is not None
                    and any(size != 1 for size in shape)
                    and wires.is_fixed(node.inputs[1])
                ):
                    return int(number) if node.op_type == "Add" else -int(number)
                return None
            if node.op_type not in ("Unsqueeze", "Reshape", "Cast", "Squeeze", "Expand", "Transpose"):
                return None
            value = node.inputs[0]
        return None

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
        differs = [
            value
            for value in core.added
            if (shape := wires.shape(value)) is not None
            and len(shape) >= 3
            and shape[-3] == heads
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
        return not tables, bool(tables)
