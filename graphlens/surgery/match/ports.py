"""Which inputs and outputs of a graph are what: told by what reads and gives them, not by their names."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.match.parts import Found
from graphlens.surgery.match.records import Ports
from graphlens.surgery.match.wires import Wires

_PICKED = frozenset({"GatherND", "GatherElements", "Gather", "Slice"})


def ports_of(found: Found) -> Ports:
    """The inputs and outputs of a graph.

    Args:
        found: The transformer in it.
    """
    wires, begin = found.wires, found.beginning
    tokens = begin.pixels or begin.tokens.input
    past: dict[tuple[int, str], str] = {}
    present: dict[tuple[int, str], str] = {}
    for layer, block in enumerate(found.blocks):
        for what, operand in (("key", block.attention.k), ("value", block.attention.v)):
            if operand.past is not None:
                past[layer, what] = str(operand.past.name)
            output = None if operand.joined is None else _output(wires, operand.joined)
            if output is not None:
                present[layer, what] = str(output.name)
    types = None if begin.types is None else begin.types.input
    taken = {str(value.name) for value in (tokens, types) if value is not None} | set(past.values())
    rest = [
        value
        for value in wires.graph.inputs
        if value.const_value is None and str(value.name) not in taken and len(wires.shape(value) or ()) == 2
    ]
    positions = _positions(found, rest)
    masks = _masks(found, [value for value in rest if value is not positions])
    ending = found.ending
    return Ports(
        input=str(tokens.name) if tokens is not None else "",
        attention_mask=str(masks.name) if masks is not None else None,
        position_ids=str(positions.name) if positions is not None else None,
        token_type_ids=str(types.name) if types is not None else None,
        past=past,
        present=present,
        logits=str(ending.logits.name) if ending.logits is not None else None,
        hidden=str(ending.hidden.name) if ending.hidden is not None else None,
    )


def _output(wires: Wires, value: ir.Value) -> ir.Value | None:
    """The output that a value is, rows of it picked or cut perhaps."""
    waiting = [wires.first(value)]
    while waiting:
        one = waiting.pop(0)
        found = next((output for output in wires.graph.outputs if wires.first(output) is one), None)
        if found is not None:
            return found
        for node, index in wires.uses(one):
            if index == 0 and node.op_type in _PICKED:
                waiting.append(wires.first(node.outputs[0]))
    return None


def inputs_behind(wires: Wires, values: list[ir.Value]) -> set[ir.Value]:
    """The inputs of a graph whose content some values depend on, activations aside.

    Args:
        wires: The graph.
        values: The values.
    """
    waiting, seen, found = list(values), set[ir.Value](), set[ir.Value]()
    while waiting:
        value = waiting.pop()
        if value in seen or wires.is_live(value):
            continue
        seen.add(value)
        if value.is_graph_input():
            found.add(value)
        node = value.producer()
        if node is not None and node.op_type not in ("Shape", "Size"):
            waiting += [one for one in node.inputs if one is not None]
    return found


def _positions(found: Found, rest: list[ir.Value]) -> ir.Value | None:
    """The input of positions: what the angles of a rotation, or rows of a table of positions, depend on."""
    wires = found.wires
    asked: list[ir.Value] = []
    for block in found.blocks[:1]:
        for operand in (block.attention.q, block.attention.k):
            asked += operand.rotation.angles if operand.rotation is not None else ()
    if found.beginning.positions is not None and found.beginning.positions.index is not None:
        asked.append(found.beginning.positions.index)
    behind = inputs_behind(wires, asked)
    masks = inputs_behind(wires, [value for block in found.blocks[:1] for value in block.attention.core.added])
    candidates = [value for value in rest if value in behind]
    only = [value for value in candidates if value not in masks] or candidates
    direct = found.beginning.positions.input if found.beginning.positions is not None else None
    if direct is not None and direct in only:
        return direct
    # Positions that are counted in a mask come from the mask alone.
    return only[0] if len(only) == 1 and (only[0] not in masks or len(rest) > 1) else None


def _masks(found: Found, rest: list[ir.Value]) -> ir.Value | None:
    """The input that says which tokens are no padding."""
    wires = found.wires
    behind = inputs_behind(wires, [value for block in found.blocks[:1] for value in block.attention.core.added])
    candidates = [value for value in rest if value in behind]
    if len(candidates) == 1:
        return candidates[0]
    return rest[0] if len(rest) == 1 and not candidates else None
