"""The same graph under other names: values, nodes and initializers renamed and shuffled, metadata gone, in another order."""

from __future__ import annotations

import random
from pathlib import Path

import onnx


def scramble(source: Path, target: Path, seed: int = 0) -> dict[str, str]:
    """Writes a file that computes the same and shares no name with another.

    Args:
        source: The file.
        target: The file to write.
        seed: Of the names and of the order.

    Returns:
        Old name of a value -> its new one.
    """
    dice = random.Random(seed)
    model = onnx.load(source)
    names: dict[str, str] = {"": ""}
    _rename(model.graph, names, dice)
    graph = model.graph
    ordered = _in_another_order(graph, dice)
    del graph.node[:]
    graph.node.extend(ordered)
    for shuffled in (graph.initializer, graph.value_info):
        kept = list(shuffled)
        dice.shuffle(kept)
        del shuffled[:]
        shuffled.extend(kept)
    inputs = list(graph.input)
    dice.shuffle(inputs)
    del graph.input[:]
    graph.input.extend(inputs)
    del model.metadata_props[:]
    del graph.metadata_props[:]
    model.producer_name = model.producer_version = model.domain = model.doc_string = graph.doc_string = ""
    graph.name = "g"
    onnx.save(model, target)
    return names


def _rename(graph: onnx.GraphProto, names: dict[str, str], dice: random.Random) -> None:
    """Gives every value, node and initializer of a graph, and of the graphs in it, a name that says nothing."""

    def new(name: str) -> str:
        if name not in names:
            number = dice.getrandbits(40)
            while f"t{number}" in names.values():
                number = dice.getrandbits(40)
            names[name] = f"t{number}"
        return names[name]

    taken: set[str] = set()
    for value in (*graph.input, *graph.output, *graph.value_info, *graph.initializer):
        value.name = new(value.name)
        value.doc_string = ""
        if isinstance(value, onnx.ValueInfoProto):
            del value.metadata_props[:]
            for size in value.type.tensor_type.shape.dim:
                if size.dim_param:
                    size.dim_param = new(f"axis {size.dim_param}")
    for number, node in enumerate(graph.node):
        node.name = f"n{dice.getrandbits(24)}x{number}"
        assert node.name not in taken
        taken.add(node.name)
        node.doc_string = ""
        del node.metadata_props[:]
        node.input[:] = [new(name) for name in node.input]
        node.output[:] = [new(name) for name in node.output]
        for attribute in node.attribute:
            for inner in ([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs):
                _rename(inner, names, dice)


def _read(node: onnx.NodeProto) -> set[str]:
    """The values that a node reads, those that graphs in it read from outside among them."""
    found = {name for name in node.input if name}
    for attribute in node.attribute:
        for inner in ([attribute.g] if attribute.type == onnx.AttributeProto.GRAPH else attribute.graphs):
            made = {name for each in inner.node for name in each.output} | {each.name for each in inner.initializer}
            found |= {name for each in inner.node for name in _read(each)} - made - {each.name for each in inner.input}
            found |= {each.name for each in inner.output} - made
    return found


def _in_another_order(graph: onnx.GraphProto, dice: random.Random) -> list[onnx.NodeProto]:
    """The nodes in a topological order that is drawn."""
    maker = {name: number for number, node in enumerate(graph.node) for name in node.output if name}
    waits = [{maker[name] for name in _read(node) if name in maker} for node in graph.node]
    readers: dict[int, list[int]] = {}
    for number, needed in enumerate(waits):
        for before in needed:
            readers.setdefault(before, []).append(number)
    ready = [number for number, needed in enumerate(waits) if not needed]
    left = [len(needed) for needed in waits]
    ordered = []
    while ready:
        number = ready.pop(dice.randrange(len(ready)))
        ordered.append(graph.node[number])
        for after in readers.get(number, ()):
            left[after] -= 1
            if not left[after]:
                ready.append(after)
    assert len(ordered) == len(graph.node), "the graph has a circle"
    return ordered
