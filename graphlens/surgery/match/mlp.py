"""MLPs: from what one writes back to its activation function, and to the projections that read its input."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.match.activations import activation_of
from graphlens.surgery.match.layout import MOVES
from graphlens.surgery.match.linear import Linears
from graphlens.surgery.match.norms import Norms
from graphlens.surgery.match.parts import Branch, Linear, Mlp
from graphlens.surgery.match.wires import Wires

_STEPS = 40


class Mlps:
    """Finds MLPs.

    Args:
        wires: The graph.
        linears: Its products with weights.
        norms: Its norms.
    """

    def __init__(self, wires: Wires, linears: Linears, norms: Norms) -> None:
        self._wires, self._linears, self._norms = wires, linears, norms

    def of(self, branch: Branch) -> Mlp | None:
        """The MLP that writes a branch; None if it is computed in another way.

        Args:
            branch: The branch.
        """
        wires = self._wires
        post = branch.linear.source
        sides = self._sides(post)
        if sides is None:
            return None
        pre, act_fn, pre_linear = sides
        first = self._projection(pre)
        second = None if pre_linear is None else self._projection(pre_linear)
        if first is None or (pre_linear is not None and second is None):
            return None
        if second is not None and second.source is not first.source:
            return None
        return Mlp(
            branch,
            post,
            pre,
            pre_linear,
            first,
            second,
            act_fn,
            first.source,
            self._norms.giving(wires.first(first.source)),
        )

    def _sides(self, post: ir.Value) -> tuple[ir.Value, str | None, ir.Value | None] | None:
        """(what an activation function is of, the function, what it is multiplied by) of an MLP's inner result."""
        wires = self._wires
        node = post.producer()
        while node is not None and node.op_type in MOVES:
            source = wires.operand(node, 0)
            node = None if source is None else source.producer()
        if node is not None and node.op_type == "Mul":
            live = wires.live_operands(node)
            if len(live) == 2 and live[0] is not live[1]:
                for gate, other in ((live[0], live[1]), (live[1], live[0])):
                    if self._projection(other) is None:
                        continue
                    found = self._activated(gate)
                    if found is not None and not self._same(found[0], other):
                        return found[0], found[1], other
        found = self._activated(post)
        return None if found is None else (found[0], found[1], None)

    def _same(self, one: ir.Value, other: ir.Value) -> bool:
        return self._wires.first(one) is self._wires.first(other)

    def _activated(self, post: ir.Value) -> tuple[ir.Value, str | None] | None:
        """(what, which function) an activation is the function of: the walk back ends at results of projections."""
        wires = self._wires
        nodes, starts, waiting, seen = dict[ir.Node, None](), dict[ir.Value, None](), [post], {post}
        while waiting:
            value = waiting.pop()
            if value is not post and self._projection(value) is not None:
                starts[value] = None
                continue
            node = value.producer()
            if node is None or len(nodes) > _STEPS or node.op_type in ("MatMul", "Softmax", "Gemm", "ReduceMean"):
                return None
            nodes[node] = None
            for one in wires.live_operands(node):
                if one not in seen:
                    seen.add(one)
                    waiting.append(one)
        if len(starts) != 1:
            return None
        pre = next(iter(starts))
        return pre, activation_of(wires, sorted(nodes, key=lambda node: wires.place[node]), pre)

    def _projection(self, value: ir.Value) -> Linear | None:
        """The projection that gives an activation, or a part of it."""
        wires = self._wires
        found: ir.Value | None = wires.first(value)
        for _ in range(6):
            if found is None:
                return None
            linear = self._linears.by_out.get(found)
            if linear is not None:
                return linear
            node = found.producer()
            if node is None or node.op_type not in MOVES | {"Split", "Slice", "Gather"}:
                return None
            found = wires.operand(node, 0)
        return None
