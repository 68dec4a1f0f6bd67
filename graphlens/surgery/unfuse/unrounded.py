"""Knows how static quantisers are taken out of a graph, so that the arithmetic between its activations shows to the last bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphlens.surgery.unfuse.kinds import constant_of, dtype_of

# What moves integers and computes nothing: it moves the numbers that they stand for as well.
_MOVES = frozenset(
    {
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split", "Slice"),
        *("Gather", "GatherElements", "Expand", "Tile", "Identity"),
    }
)
_VIEWS = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze"})  # of a constant: its numbers stay


@dataclass
class _Group:
    """Quantisers and dequantisers between which there are integers alone.

    Attributes:
        nodes: They, QuantizeLinear and DequantizeLinear.
        whole: False where something else reads the integers, or not all of them stand for the same numbers.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    whole: bool = True


def unrounded(model: ir.Model) -> ir.Model:
    """A copy of a model in which activations are not rounded: each QuantizeLinear hands on the numbers that it is given.

    The weights are those of the model, also where they are integers. An activation is left rounded where its integers are
    computed with, or become numbers by another scale than they were made with. Dynamic quantisation stays as it is.

    Args:
        model: A model with standard operators, as ``unfuse`` makes it. Its graph is sorted.

    Returns:
        The copy. Its values have their names; those that were integers are numbers.
    """
    model = model.clone()
    groups, fixed = dict[ir.Value, _Group](), set(model.graph.initializers.values())
    found: list[_Group] = []
    for node in model.graph:
        given = [value for value in node.inputs if value is not None]
        if all(value in fixed for value in given):  # a weight, whatever was made of it
            fixed.update(node.outputs)
        elif node.op_type == "QuantizeLinear" and node.domain in ("", "ai.onnx"):
            if node.inputs[0] in groups:
                groups[node.inputs[0]].whole = False
            groups[node.outputs[0]] = _Group([node])
            found.append(groups[node.outputs[0]])
        else:
            _follow(node, groups)
    for group in found:
        _close(group, groups)
    for group in found:
        if group.whole:
            for node in group.nodes:
                _let_through(node)
            group.nodes = []
    for value, group in groups.items():
        if group.whole:
            value.type = None
    return model


def _follow(node: ir.Node, groups: dict[ir.Value, _Group]) -> None:
    """Adds what a node makes of integers to their group."""
    places = [place for place, value in enumerate(node.inputs) if value in groups]
    if not places:
        return
    first = groups[_at(node, places[0])]
    if node.op_type == "DequantizeLinear" and places == [0]:
        first.nodes.append(node)
        return
    if node.op_type == "Concat":
        fits = len(places) == len(node.inputs)
    elif node.op_type == "Where":
        fits = places == [1, 2]
    else:
        fits = node.op_type in _MOVES and places == [0]
    for place in places[1:]:
        first = _joined(first, groups[_at(node, place)], groups)
    first.whole &= fits and node.domain in ("", "ai.onnx")
    for value in node.outputs:
        groups[value] = first


def _at(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None, "it was looked for"
    return value


def _joined(one: _Group, other: _Group, groups: dict[ir.Value, _Group]) -> _Group:
    """One group in place of two."""
    if one is not other:
        one.nodes += other.nodes
        one.whole &= other.whole
        other.nodes, other.whole = [], False
        for value, group in groups.items():
            if group is other:
                groups[value] = one
    return one


def _close(group: _Group, groups: dict[ir.Value, _Group]) -> None:
    """Looks whether all members of a group round alike, and whether nothing else reads its integers."""
    makers = [node for node in group.nodes if node.op_type == "QuantizeLinear"]
    group.whole &= all(_alike(makers[0], node) for node in group.nodes)
    for value in [value for value, own in groups.items() if own is group]:
        group.whole &= not value.is_graph_output()
        group.whole &= all(node.graph is group.nodes[0].graph for node, _ in value.uses()) if group.nodes else True


def _alike(one: ir.Node, other: ir.Node) -> bool:
    """True if two nodes have the same scale and zero point.

    Scales count as the same where they differ by one step at most over all integers that there are: the pattern of ONNX
    Runtime's QLinearSoftmax is made with 1 / 254 and read with 1 / 255.
    """
    scales = [_numbers(node.inputs[1]) for node in (one, other)]
    zeros = [_numbers(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(()) for node in (one, other)]
    if one.inputs[1] is not other.inputs[1]:
        if scales[0] is None or scales[1] is None or scales[0].shape != scales[1].shape:
            return False
        levels = 255 if _bits(one) <= 8 else 65535
        if not (levels * np.abs(scales[0] - scales[1]) <= 1.001 * np.maximum(scales[0], scales[1])).all():
            return False
    if zeros[0] is None or zeros[1] is None or not np.array_equal(*np.broadcast_arrays(*zeros)):
        return len(one.inputs) > 2 and len(other.inputs) > 2 and one.inputs[2] is other.inputs[2]
    axes = [node.attributes["axis"].as_int() if "axis" in node.attributes else 1 for node in (one, other)]
    return axes[0] == axes[1] or scales[0] is None or scales[0].size == 1


def _bits(node: ir.Node) -> int:
    """How many bits the integers have that a quantiser makes; 8 where it is not known."""
    dtype = dtype_of(node.inputs[2]) if len(node.inputs) > 2 else None
    return 8 if dtype is None else int(dtype.itemsize * 8)


def _numbers(value: ir.Value | None) -> np.ndarray | None:
    """The content of a scale or zero point, without axes of one row; None where a run computes it."""
    while value is not None:
        tensor = constant_of(value)
        if tensor is not None:
            return np.squeeze(tensor.numpy().astype(np.float64))
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type in _VIEWS else None
    return None


def _let_through(node: ir.Node) -> None:
    """Makes a node hand on what it is given."""
    for place in range(len(node.inputs) - 1, 0, -1):
        node.replace_input_with(place, None)
    node.resize_inputs(1)
    node.op_type = "Identity"
    node.attributes.clear()
