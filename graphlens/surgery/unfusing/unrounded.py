"""Knows how roundings are taken out of a graph, so that the arithmetic between its activations shows to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from graphlens.surgery.unfusing.kinds import constant_of, dtype_of

# What moves integers and computes nothing: it moves the numbers that they stand for as well.
MOVES = frozenset(
    {
        *("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Split", "Slice"),
        *("Gather", "GatherElements", "Expand", "Tile", "Identity"),
    }
)
DOMAINS = ("", "ai.onnx", "com.microsoft")  # of QuantizeLinear: ONNX Runtime's own has 16 and 4 bits in older opsets
_VIEWS = frozenset({"Identity", "Reshape", "Squeeze", "Unsqueeze"})  # of a constant: its numbers stay


@dataclass
class _Group:
    """Quantisers and dequantisers between which there are integers alone.

    Attributes:
        nodes: They, QuantizeLinear and DequantizeLinear.
        integers: What lies between them.
        whole: False where something else reads the integers, or not all of them stand for the same numbers.
    """

    nodes: list[ir.Node]
    integers: list[ir.Value]
    whole: bool = True


def unrounded(model: ir.Model) -> ir.Model:
    """A copy of a model in which activations are not rounded: each QuantizeLinear hands on the numbers that it is given.

    The weights are those of the model, also where they are integers. An activation is left rounded where its integers are
    computed with, or become numbers by another scale than they were made with. Of dynamic quantisation, which rounds while the
    model runs, products of two activations (queries and keys) are computed in numbers, and those with weights stay as they are.

    Args:
        model: A model with standard operators, as ``unfuse`` makes it. Its graph is sorted.

    Returns:
        The copy. Its values have their names; those that were integers are numbers.
    """
    model = model.clone()
    groups = dict[ir.Value, _Group]()
    fixed = {value for value in model.graph.initializers.values() if not value.is_graph_input()}
    for node in model.graph:
        given = [value for value in node.inputs if value is not None]
        if all(value in fixed for value in given):  # a weight, whatever was made of it
            fixed.update(node.outputs)
            continue
        _follow(node, groups)
        if node.op_type == "QuantizeLinear" and node.domain in DOMAINS:
            groups[node.outputs[0]] = _Group([node], [node.outputs[0]])
    for group in {id(group): group for group in groups.values()}.values():
        if _is_whole(group):
            number = group.nodes[0].inputs[0]
            for value in group.integers:
                value.type = None if number is None else number.type
                value.shape = value.shape if value.type is not None else None
            for node in group.nodes:
                _let_through(node)
    for last, operands in list(_dynamic_products(model)):
        last.op_type = "MatMul"
        for place, operand in enumerate(operands):
            last.replace_input_with(place, operand)
    return model


def rounds_products(model: ir.Model) -> bool:
    """True if a graph multiplies two activations that it rounds to integers while it runs, as optimum's dynamic quantiser does.

    Args:
        model: A model with standard operators.
    """
    return next(_dynamic_products(model), None) is not None


def _dynamic_products(model: ir.Model) -> Iterator[tuple[ir.Node, list[ir.Value]]]:
    """(the node that gives the product as numbers, both activations) of each product of two activations in integers."""
    for node in model.graph:
        if node.op_type != "MatMulInteger":
            continue
        makers = [None if value is None else value.producer() for value in node.inputs[:2]]
        rounding = [one for one in makers if one is not None and one.op_type == "DynamicQuantizeLinear"]
        operands = [value for one in rounding if (value := one.inputs[0]) is not None]
        cast = _reader(node.outputs[0], "Cast")
        last = None if cast is None else _reader(cast.outputs[0], "Mul")
        if cast is None or last is None or len(operands) != 2:
            continue
        # With other zero points than its operands were rounded with it is another product.
        if list(node.inputs) != [each.outputs[place] for place in (0, 2) for each in rounding]:
            continue
        scale = next(
            (value.producer() for value in last.inputs if value is not None and value is not cast.outputs[0]), None
        )
        if scale is None or scale.op_type != "Mul" or set(scale.inputs) != {one.outputs[1] for one in rounding}:
            continue
        yield last, operands


def _reader(value: ir.Value, operator: str) -> ir.Node | None:
    """The one node that reads a value, if it is of an operator."""
    readers = {node for node, _ in value.uses()}
    node = next(iter(readers)) if len(readers) == 1 else None
    return node if node is not None and node.op_type == operator else None


def _follow(node: ir.Node, groups: dict[ir.Value, _Group]) -> None:
    """Adds what a node makes of integers to their group."""
    own = {place: groups[value] for place, value in enumerate(node.inputs) if value in groups}
    if not own:
        return
    places, (first, *others) = list(own), own.values()
    known = node.domain in DOMAINS
    if node.op_type == "DequantizeLinear" and known and places == [0]:
        first.nodes.append(node)
        return
    if node.op_type == "Concat":
        fits = len(places) == len(node.inputs)
    elif node.op_type == "Where":
        fits = places == [1, 2]
    else:
        fits = node.op_type in MOVES and places == [0]
    for other in others:
        if other is not first:
            first.nodes += other.nodes
            first.integers += other.integers
            first.whole &= other.whole
            groups |= dict.fromkeys(other.integers, first)
    first.whole &= fits and known
    if fits:
        first.integers += node.outputs
        groups |= dict.fromkeys(node.outputs, first)


def _is_whole(group: _Group) -> bool:
    """True if all members of a group round alike, and nothing else reads its integers."""
    maker, graph = group.nodes[0], group.nodes[0].graph
    return (
        group.whole
        and all(_alike(maker, node) for node in group.nodes)
        and not any(value.is_graph_output() for value in group.integers)
        and all(node.graph is graph for value in group.integers for node, _ in value.uses())
    )


def _alike(one: ir.Node, other: ir.Node) -> bool:
    """True if two nodes have the same scale and zero point.

    Scales count as the same where they differ by one step at most over all integers that there are: the pattern of ONNX
    Runtime's QLinearSoftmax is made with 1 / 254 and read with 1 / 255.
    """
    if not _same(one.inputs[1], other.inputs[1], 1 / (255 if _bits(one) <= 8 else 65535)):
        return False
    if not _same(_zero_point(one), _zero_point(other)):
        return False
    scales = content_of(one.inputs[1])
    return _axis(one) == _axis(other) or (scales is not None and scales.size == 1)


def _same(one: ir.Value | None, other: ir.Value | None, share: float = 0.0) -> bool:
    """True if two scales or zero points hold the same numbers, or numbers as near as ``share`` says; None is 0."""
    if one is other:
        return True
    left, right = content_of(one), content_of(other)
    if left is None or right is None or (left.shape != right.shape and left.size != 1 and right.size != 1):
        return False
    return bool((np.abs(left - right) <= 1.01 * share * np.maximum(left, right)).all())


def _zero_point(node: ir.Node) -> ir.Value | None:
    return node.inputs[2] if len(node.inputs) > 2 else None


def _axis(node: ir.Node) -> int:
    return node.attributes["axis"].as_int() if "axis" in node.attributes else 1


def _bits(node: ir.Node) -> int:
    """How many bits the integers have that a quantiser makes; 8 where it is not known."""
    dtype = dtype_of(_zero_point(node))
    return 8 if dtype is None else int(dtype.itemsize * 8)


def content_of(value: ir.Value | None) -> npt.NDArray[np.float64] | None:
    """The content of a scale or zero point in float64, without axes of one row; 0 for none.

    Args:
        value: An input of QuantizeLinear or DequantizeLinear.

    Returns:
        It; None where a run computes it.
    """
    if value is None:
        return np.zeros(())
    while True:
        tensor = constant_of(value)
        if tensor is not None:
            return np.squeeze(tensor.numpy().astype(np.float64))
        node = value.producer()
        if node is None or node.op_type not in _VIEWS or node.inputs[0] is None:
            return None
        value = node.inputs[0]


def _let_through(node: ir.Node) -> None:
    """Makes a node hand on what it is given."""
    for place in range(len(node.inputs) - 1, 0, -1):
        node.replace_input_with(place, None)
    node.resize_inputs(1)
    node.op_type, node.domain = "Identity", ""
    node.attributes.clear()
