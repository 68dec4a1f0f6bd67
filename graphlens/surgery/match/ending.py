"""How a model ends: the last norm, a head, and which output the logits or the last hidden states are."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.match.activations import activation_of
from graphlens.surgery.match.layout import MOVES
from graphlens.surgery.match.linear import Linears
from graphlens.surgery.match.norms import Norms
from graphlens.surgery.match.parts import Ending, Linear, Normed
from graphlens.surgery.match.wires import Wires

_STEPS = 16
_ACTIVATION = frozenset({"Mul", "Add", "Div", "Erf", "Tanh", "Pow", "Gelu", "Sigmoid", "Relu", "Swish"})


def ending_of(wires: Wires, linears: Linears, norms: Norms, stream: ir.Value) -> Ending:
    """How the residual stream becomes the outputs of a graph.

    Args:
        wires: The graph.
        linears: Its products with weights.
        norms: Its norms.
        stream: The residual stream after the last block.
    """
    found = Ending()
    after = norms.of(stream)
    last = stream
    if len(after) == 1:
        found.norm = Normed(after[0], after[0].affines[0])
        last = found.norm.affine.out
    found.hidden = _output(wires, last)
    for value, picked in _read(wires, last):
        for linear in linears.reading(value):
            if _finish(wires, linear, found):
                found.unembed, found.read, found.picked = linear, value, picked
                return found
            for last_one in [] if picked else linears.reading(linear.out):  # OPT makes the stream narrower first
                if _finish(wires, last_one, found):
                    found.unembed, found.read = last_one, linear.out
                    return found
            if not picked and _masked_head(wires, linears, norms, linear, found):
                return found
    return found


def _output(wires: Wires, value: ir.Value) -> ir.Value | None:
    """The output of the graph that an activation is."""
    chain = wires.chain(value)
    return next((output for output in wires.graph.outputs if any(output is one for one in chain)), None)


def _read(wires: Wires, last: ir.Value) -> list[tuple[ir.Value, bool]]:
    """(an activation, True if it is of some tokens only) of what the heads of a model read."""
    found, waiting = [(last, False)], [(last, False)]
    for _ in range(_STEPS):
        if not waiting:
            break
        value, picked = waiting.pop()
        for node, index in wires.uses(value):
            if index == 0 and node.op_type in ("Slice", "Gather", "Squeeze", "Reshape", "GatherND"):
                out = wires.first(node.outputs[0])
                fewer = picked or (
                    node.op_type not in ("Reshape", "Squeeze") and wires.shape(out) != wires.shape(value)
                )
                found.append((out, fewer))
                waiting.append((out, fewer))
    return found


def _finish(wires: Wires, linear: Linear, found: Ending) -> bool:
    """True if a projection's result becomes an output as logits do; what happens on the way is noted."""
    value, times, cap = linear.out, 1.0, None
    for _ in range(_STEPS):
        output = _output(wires, value)
        if output is not None:
            found.logits, found.soft_cap = output, cap
            found.times = times
            return True
        node = wires.only_use(value)
        if node is None:
            return False
        others = [one for one in node.inputs if one is not None and wires.first(one) is not value]
        number = wires.number(others[0]) if len(others) == 1 else None
        if (
            node.op_type in ("Mul", "Div")
            and number is not None
            and wires.operand(node, 0 if node.op_type == "Div" else _at(wires, node, value)) is value
        ):
            factor = number if node.op_type == "Mul" else 1 / number
            if cap is None:
                times *= factor
            elif abs(cap - factor) > 1e-6 * abs(cap):
                return False
        elif node.op_type == "Tanh":
            # tanh(x * t / cap) * cap: the bound is what multiplies afterwards.
            after = wires.only_use(wires.first(node.outputs[0]))
            numbers = [n for one in (after.inputs if after is not None else ()) if (n := wires.number(one)) is not None]
            if after is None or after.op_type != "Mul" or len(numbers) != 1:
                return False
            cap = numbers[0]
            times *= cap
        elif node.op_type not in MOVES | {"Slice"}:
            return False
        value = wires.first(node.outputs[0])
    return False


def _at(wires: Wires, node: ir.Node, value: ir.Value) -> int:
    return next(index for index in range(len(node.inputs)) if wires.operand(node, index) is value)


def _masked_head(wires: Wires, linears: Linears, norms: Norms, dense: Linear, found: Ending) -> bool:
    """True if a projection begins a head of masked tokens: projection, activation function, norm, projection."""
    value, nodes, waiting = dense.out, dict[ir.Node, None](), [dense.out]
    normed = None
    while waiting and len(nodes) < _STEPS:
        value = waiting.pop()
        own = norms.of(value)
        if own:
            normed = Normed(own[0], own[0].affines[0])
            break
        for node, _ in wires.uses(value):
            if node.op_type not in _ACTIVATION | MOVES:
                return False
            if node not in nodes:
                nodes[node] = None
                waiting.insert(0, wires.first(node.outputs[0]))
    if normed is None:
        return False
    for linear in linears.reading(normed.affine.out):
        if _finish(wires, linear, found):
            found.unembed, found.read = linear, normed.affine.out
            found.dense, found.dense_norm = dense, normed
            ordered = sorted(nodes, key=lambda node: wires.place[node])
            found.dense_act = activation_of(wires, ordered, dense.out)
            return True
    return False
