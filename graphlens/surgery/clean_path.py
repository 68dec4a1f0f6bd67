"""What an SAE's error term is computed from: a reconstruction that edits of the SAE do not reach."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import onnx_ir as ir

from graphlens.file.sae_names import EDITABLE, ERROR

CLEAN = "sae/clean"  # under an SAE's hook point: the value that the error is taken of


def keep_clean(
    model: ir.Model, values: Mapping[str, ir.Value], carried: Mapping[str, str], edited: Collection[str]
) -> set[ir.Node]:
    """Gives the error terms of SAEs a reconstruction of their own where an edit would change the one that there is, in place.

    What is computed up to the first hook point that is edited stays one; what comes after it is there twice.

    Args:
        model: A hooked model.
        values: Its values by name.
        carried: Hook point -> the name of its value.
        edited: The hook points that are to be edited.

    Returns:
        The nodes that must go on reading the values of edited hook points as they are before the edit.
    """
    kept: set[ir.Node] = set()
    for name in carried:
        host, _, last = name.rpartition(".")
        if last != ERROR:
            continue
        first = next((f"{host}.{each}" for each in EDITABLE if f"{host}.{each}" in edited), None)
        if first is None:
            continue
        meeting = values[f"{host}/{CLEAN}"].producer()
        assert meeting is not None, "an Identity"
        source = meeting.inputs[0]
        assert source is not None, "what the SAE makes"
        nodes, end = _copied(model.graph, values[carried[first]], source)
        meeting.replace_input_with(0, end)
        kept |= {meeting, *nodes}
    return kept


def _copied(graph: ir.Graph, start: ir.Value, end: ir.Value) -> tuple[list[ir.Node], ir.Value]:
    """Puts a copy of what computes ``end`` from ``start`` into a graph: (its nodes, the copy of ``end``)."""
    between = _between(start, end)
    copies: dict[ir.Value, ir.Value] = {}
    nodes = []
    for node in [node for node in graph if node in between]:
        inputs = [None if value is None else copies.get(value, value) for value in node.inputs]
        outputs = [ir.Value(name=f"{o.name}/clean", shape=o.shape, type=o.type) for o in node.outputs]
        attributes = dict(node.attributes).values()
        nodes.append(ir.Node(node.domain, node.op_type, inputs, attributes, outputs=outputs, name=f"{node.name}/clean"))
        copies.update(zip(node.outputs, outputs, strict=True))
    last = end.producer()
    if nodes and last is not None:
        graph.insert_after(last, nodes)
    return nodes, copies.get(end, end)


def _between(start: ir.Value, end: ir.Value) -> set[ir.Node]:
    """The nodes on the ways from one value to another."""
    known: dict[ir.Value, bool] = {start: True}  # value -> whether it depends on the start
    found: set[ir.Node] = set()
    stack = [end]
    while stack:
        value = stack[-1]
        node = value.producer()
        if value in known or node is None:
            known.setdefault(value, False)
            stack.pop()
            continue
        inputs = [each for each in node.inputs if each is not None]
        missing = [each for each in inputs if each not in known]
        if missing:
            stack.extend(missing)
            continue
        known[value] = any(known[each] for each in inputs)
        if known[value]:
            found.add(node)
        stack.pop()
    return found
