"""How what a rule built takes the place of a node, so that every name that the file has stays where it was."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from graphlens.surgery.graph import replace_value
from graphlens.surgery.unfusing.building import Builder


def install(node: ir.Node, builder: Builder, found: Iterable[ir.Value | None]) -> None:
    """Puts what was built into a node's place; new values take over the names of the outputs that they replace.

    Args:
        node: A node of a graph, from which it is removed.
        builder: Holds the new nodes.
        found: What takes the place of each output; None for one that nothing reads.
    """
    graph = node.graph
    assert graph is not None, "what is rewritten stands in a graph"
    own = {value for new in builder.tape.nodes for value in new.outputs}
    seen: set[ir.Value] = set()
    ready = []
    for old, new in zip(node.outputs, found, strict=False):
        if new is None or not old.name:
            continue
        # A value has one name: what was there before, or has another output's name now, is handed on under this one.
        value = new if new in own and new not in seen else builder.op("Identity", new)
        seen.add(value)
        ready.append((old, value))
    graph.insert_before(node, builder.tape.nodes)
    for old, value in ready:
        replace_value(old, value, left=f"{old.name}/fused")
    graph.remove(node, safe=True)
