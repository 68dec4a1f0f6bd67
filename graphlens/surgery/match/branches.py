"""What a sublayer writes to the residual stream: from its last projection, over multipliers and a norm, to the sum."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.match.layout import MOVES, Layout, after
from graphlens.surgery.match.linear import Linears
from graphlens.surgery.match.norms import Norms
from graphlens.surgery.match.parts import Branch, Linear, Normed
from graphlens.surgery.match.wires import Wires

_STEPS = 12


class Branches:
    """Finds what sublayers write.

    Args:
        wires: The graph.
        linears: Its products with weights.
        norms: Its norms.
    """

    def __init__(self, wires: Wires, linears: Linears, norms: Norms) -> None:
        self._wires, self._linears, self._norms = wires, linears, norms

    def after_heads(self, z: ir.Value, layout: Layout) -> tuple[list[tuple[ir.Value, Layout]], Linear] | None:
        """The values from z to the projection of attention's result, and that projection.

        Args:
            z: The product of pattern and values.
            layout: Its layout.
        """
        wires, trail = self._wires, [(z, layout)]
        for _ in range(_STEPS):
            linears = [linear for linear in self._linears.reading(z) if linear.x is z or linear.source is z]
            if linears:
                return (trail, linears[0]) if len(linears) == 1 else None
            node = wires.only_use(z)
            if node is None:
                return None
            z = wires.first(node.outputs[0])
            if node.op_type not in MOVES:
                return None
            later = after(wires, node, layout)
            if later is None:  # tokens and all heads in few axes; what follows is the projection
                shape = wires.shape(z)
                if shape is None:
                    return None
                later = Layout(tuple(() for _ in shape), layout.sizes)
            layout = later
            trail.append((z, layout))
        return None

    def onward(self, linear: Linear) -> Branch:
        """What a projection's result becomes until it is added to something or read otherwise.

        Args:
            linear: The projection.
        """
        wires = self._wires
        value, times, post, layer_scale = linear.out, 1.0, None, None
        for _ in range(_STEPS):
            node = wires.only_use(value)
            norms = self._norms.of(value)
            if len(norms) == 1 and post is None and self._is_all_read_by(value):
                affine = norms[0].affines[0]
                post, value = Normed(norms[0], affine), affine.out
                continue
            if node is None:
                break
            if node.op_type == "Add" and len(wires.loose_operands(node)) == 2:
                return Branch(linear, post, value, times, layer_scale, node)
            source = wires.operand(node, 0)
            if node.op_type in MOVES and source is value:
                value = wires.first(node.outputs[0])
                continue
            if node.op_type in ("Mul", "Div"):
                others = [one for one in node.inputs if one is not None and wires.first(one) is not value]
                number = wires.number(others[0]) if len(others) == 1 else None
                if number is not None and (node.op_type == "Mul" or source is value):
                    times *= number if node.op_type == "Mul" else 1 / number
                    value = wires.first(node.outputs[0])
                    continue
                if len(others) == 1 and node.op_type == "Mul" and wires.is_fixed(others[0]):
                    layer_scale, value = others[0], wires.first(node.outputs[0])
                    continue
            break
        return Branch(linear, post, value, times, layer_scale, None)

    def _is_all_read_by(self, value: ir.Value) -> bool:
        """True if nothing but its norm reads an activation."""
        return all(self._norms.reads(node, value) for node, _ in self._wires.uses(value))

    def back(self, written: ir.Value) -> Branch | None:
        """The sublayer that wrote something to the residual stream.

        Args:
            written: What is added.
        """
        wires = self._wires
        value = wires.first(written)
        for _ in range(_STEPS):
            linear = self._linears.by_out.get(value)
            if linear is not None:
                found = self.onward(linear)
                return found if found.written is wires.first(written) else None
            normed = self._norms.giving(value)
            if normed is not None:
                value = normed.norm.x
                continue
            node = value.producer()
            if node is None or node.op_type not in MOVES | {"Mul", "Div"}:
                return None
            live = wires.live_operands(node)
            if len(live) != 1:
                return None
            value = live[0]
        return None
