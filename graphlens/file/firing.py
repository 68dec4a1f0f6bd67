"""The order in which the hook points of a graph fire."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

import onnx_ir as ir

from graphlens.file.names import firing_order


def graph_order(graph: ir.Graph, values: Mapping[str, ir.Value], n_layers: int) -> list[str]:
    """Hook names in an order in which none comes before one that it is computed from, as near as can be to the table's.

    The table of names has the order of most architectures. In some a norm comes after what it comes before in others
    (after attention in OLMo 2), and only the graph tells.

    Args:
        graph: A graph whose nodes are sorted.
        values: Hook name -> its value in the graph.
        n_layers: The number of blocks.

    Returns:
        The names of ``values`` that the table knows: a hook point that two names share fires at all of them before what is
        computed from it.
    """
    table = firing_order(values, n_layers)
    carried: dict[ir.Value, list[int]] = {}
    for place, name in enumerate(table):
        carried.setdefault(values[name], []).append(place)
    waits: list[set[int]] = [set() for _ in table]  # for each hook point, the nearest ones that it is computed from
    nearest: dict[ir.Value, frozenset[int]] = {}
    for node in graph:
        found = frozenset[int]()
        for value in node.inputs:
            if value is not None:
                found |= frozenset(carried[value]) if value in carried else nearest.get(value, frozenset())
        for output in node.outputs:
            nearest[output] = found
            for place in carried.get(output, ()):
                waits[place] |= found
    readers: list[list[int]] = [[] for _ in table]
    for place, before in enumerate(waits):
        for other in before:
            readers[other].append(place)
    counts = [len(before) for before in waits]
    ready = [place for place, count in enumerate(counts) if not count]  # sorted, so a heap
    order = []
    while ready:
        place = heapq.heappop(ready)
        order.append(table[place])
        for reader in readers[place]:
            counts[reader] -= 1
            if not counts[reader]:
                heapq.heappush(ready, reader)
    return order
