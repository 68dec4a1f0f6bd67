"""From an operand of attention back to the projection that made it: queries, keys and values before and after rotation."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from graphlens.surgery.match.layout import MOVES, Layout, before
from graphlens.surgery.match.linear import Linears
from graphlens.surgery.match.norms import Norms
from graphlens.surgery.match.parts import Normed, Operand, Spot
from graphlens.surgery.match.rotary import rotation_of
from graphlens.surgery.match.wires import Wires

_STEPS = 40
_PARTS = frozenset({"Split", "Slice", "Gather", "GatherND"})
_CLIPS = frozenset({"Clip", "Min", "Max"})


class Heads:
    """Walks back from operands of attention.

    Args:
        wires: The graph.
        linears: Its products with weights.
        norms: Its norms.
    """

    def __init__(self, wires: Wires, linears: Linears, norms: Norms) -> None:
        self._wires, self._linears, self._norms = wires, linears, norms

    def operand(self, value: ir.Value, axes: Sequence[str], sizes: dict[str, int]) -> Operand | None:
        """What an operand is, back to its projection.

        Args:
            value: The operand.
            axes: Its logical axes, one each, but for the first of three, which then holds prompts and heads.
            sizes: Their sizes.

        Returns:
            What was found; None where the layout of the operand itself is not understood.
        """
        shape = self._wires.shape(value)
        if shape is None:
            return None
        layout = _whole(shape, axes, sizes)
        if layout is None:
            return None
        found = Operand()
        found.plain = [(value, layout)]
        if len(shape) == len(axes) and shape[1] == 1:  # one head, which all queries share
            found.repeats = sizes["h"]
        self._walk(found, value, layout)
        return found

    def _walk(self, found: Operand, value: ir.Value, layout: Layout) -> None:
        for _ in range(_STEPS):
            if (linear := self._linears.by_out.get(value)) is not None:
                found.linear, found.source = linear, value
                return
            normed = self._norms.giving(value)
            if normed is not None and self._normalises_heads(normed):
                found.normed = (normed, layout)
                value = normed.norm.x
                found.plain = [(value, layout)]
                continue
            node = value.producer()
            if node is None:
                found.end = value
                return
            step = self._step(found, node, value, layout)
            if step is None:
                step = self._turned(found, value, layout)
            if step is None:
                self._part(found, node, value)
                return
            value, layout = step
        found.end = value

    def _normalises_heads(self, normed: Normed) -> bool:
        """True for a norm of queries or keys: what it normalises comes from a projection, and is no residual stream."""
        value = normed.norm.x
        for _ in range(8):
            if value in self._linears.by_out:
                return True
            node = value.producer()
            if node is None or node.op_type not in MOVES | _PARTS:
                return False
            source = self._wires.operand(node, 0)
            if source is None:
                return False
            value = source
        return False

    def _step(self, found: Operand, node: ir.Node, value: ir.Value, layout: Layout) -> Spot | None:
        """One step back over a node that moves, scales, repeats or joins; None for any other."""
        wires = self._wires
        source = wires.operand(node, 0)
        if node.op_type in MOVES and source is not None:
            earlier = before(wires, node, layout)
            if earlier is not None:
                found.plain.append((source, earlier))
                return source, earlier
            return None
        if node.op_type in ("Mul", "Div"):
            return self._scaled(found, node, layout)
        if node.op_type in _CLIPS:
            live = wires.live_operands(node)
            if len(live) == 1 and all(
                wires.number(one) is not None for one in node.inputs if one is not None and not wires.is_live(one)
            ):
                found.clipped = True
                found.plain = [(live[0], layout)]
                return live[0], layout
            return None
        if node.op_type in ("Expand", "Tile", "Gather", "Concat"):
            return self._repeated(found, node, layout) or self._joined(found, node, layout)
        return None

    def _scaled(self, found: Operand, node: ir.Node, layout: Layout) -> Spot | None:
        wires = self._wires
        live = wires.live_operands(node)
        others = [one for one in node.inputs if one is not None and not wires.is_live(one)]
        number = wires.number(others[0]) if len(others) == 1 else None
        if len(live) != 1 or number is None or (node.op_type == "Div" and wires.operand(node, 0) is not live[0]):
            return None
        found.scale *= number if node.op_type == "Mul" else 1 / number
        found.plain = [(live[0], layout)]
        return live[0], layout

    def _repeated(self, found: Operand, node: ir.Node, layout: Layout) -> Spot | None:
        """Over a node that repeats each key and value head for several queries."""
        wires = self._wires
        source = wires.operand(node, 0)
        whole = None if source is None else wires.shape(source)
        shape = wires.shape(node.outputs[0])
        if source is None or whole is None or shape is None or len(whole) != len(shape):
            return None
        if node.op_type == "Concat" and len({wires.operand(node, index) for index in range(len(node.inputs))}) != 1:
            return None
        changed = [axis for axis, (a, b) in enumerate(zip(whole, shape, strict=True)) if a != b]
        if node.op_type == "Gather":
            return self._gathered(found, node, layout, whole, changed)
        if not changed:  # it repeats nothing
            found.plain.append((source, layout))
            return source, layout
        if len(changed) != 1 or whole[changed[0]] != 1:
            return None
        found.repeats *= shape[changed[0]]
        earlier = layout.without(changed[0])
        found.plain = [(source, earlier)]
        return source, earlier

    def _gathered(
        self, found: Operand, node: ir.Node, layout: Layout, whole: tuple[int, ...], changed: list[int]
    ) -> Spot | None:
        wires = self._wires
        places = wires.shapes.integers(node.inputs[1])
        axis = node.attributes["axis"].as_int() % len(whole) if "axis" in node.attributes else 0
        source = wires.operand(node, 0)
        if places is None or source is None or changed not in ([], [axis]) or len(layout.axes[axis]) != 1:
            return None
        each = len(places) // max(1, whole[axis])
        if places != [head for head in range(whole[axis]) for _ in range(each)]:
            return None
        found.repeats *= each
        resized = layout.resized(whole)
        if resized is None:
            return None
        found.plain = [(source, resized)]
        return source, resized

    def _joined(self, found: Operand, node: ir.Node, layout: Layout) -> Spot | None:
        """Over the node that puts earlier tokens before the new ones."""
        wires = self._wires
        live = wires.live_operands(node)
        others = [wires.first(one) for one in node.inputs if one is not None and not wires.is_live(one)]
        kept = None if node.op_type != "Concat" or len(live) != 1 or len(others) != 1 else self._kept(others[0])
        if kept is None:
            return None
        shape = wires.shape(live[0])
        earlier = None if shape is None else layout.resized(shape)
        if earlier is None:
            return None
        found.past, found.joined = kept, wires.first(node.outputs[0])
        found.plain = [(live[0], earlier)]
        return live[0], earlier

    def _kept(self, value: ir.Value) -> ir.Value | None:
        """The input of the graph that earlier tokens come from, cut or put together with nothing perhaps."""
        wires = self._wires
        for _ in range(6):
            if value.is_graph_input():
                return value
            node = value.producer()
            if node is None or node.op_type not in ("Concat", "Slice", "Gather", "Cast", "Identity"):
                return None
            loose = (
                wires.loose_operands(node)
                if node.op_type == "Concat"
                else [wires.first(one) for one in node.inputs[:1] if one]
            )
            if len(loose) != 1:
                return None
            value = loose[0]
        return None

    def _turned(self, found: Operand, value: ir.Value, layout: Layout) -> Spot | None:
        """Over a rotation by position."""
        wires = self._wires
        if found.rotation is not None:
            return None
        ends = self._ends(value)
        rotation = rotation_of(wires, value, ends)
        if rotation is None or wires.shape(rotation.before) != wires.shape(value):
            return None
        found.rotation, found.rotated = rotation, [*found.plain]
        found.plain = [(rotation.before, layout)]
        return rotation.before, layout

    def _ends(self, value: ir.Value) -> set[ir.Value]:
        """Results of products with weights and of norms of heads, a few nodes back from an activation."""
        wires, found, waiting, seen = self._wires, set[ir.Value](), [value], set[ir.Value]()
        while waiting and len(seen) < 200:
            one = waiting.pop()
            if one in seen:
                continue
            seen.add(one)
            if one in self._linears.by_out or self._norms.giving(one) is not None:
                found.add(one)
                continue
            node = one.producer()
            if node is not None:
                waiting += wires.live_operands(node)
        return found

    def _part(self, found: Operand, node: ir.Node, value: ir.Value) -> None:
        """From a part of a projection's result on to the projection."""
        wires = self._wires
        current: ir.Value | None = value
        for _ in range(8):
            if current is None:
                break
            if current in self._linears.by_out:
                found.linear, found.source = self._linears.by_out[current], current
                return
            maker = current.producer()
            if maker is None or maker.op_type not in MOVES | _PARTS:
                break
            current = wires.operand(maker, 0)
        found.end = value


def _whole(shape: tuple[int, ...], axes: Sequence[str], sizes: dict[str, int]) -> Layout | None:
    """The layout of an operand."""
    if len(shape) == len(axes):
        held = tuple((name,) if size != 1 else () for name, size in zip(axes, shape, strict=True))
        return Layout(held, {**sizes, **dict(zip(axes, shape, strict=True))})
    if len(shape) == len(axes) - 1 and shape[0] % sizes["b"] == 0:
        known = {**sizes, axes[1]: shape[0] // sizes["b"], **dict(zip(axes[2:], shape[1:], strict=True))}
        return Layout(((axes[0], axes[1]), *((name,) for name in axes[2:])), known)
    return None
