"""What a graph is made of, as far as that tells which kind of network it is: operators, attentions, what values depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

STANDARD = frozenset({"", "ai.onnx"})
"""The names of ONNX's own domain."""
_FUSED = """
    Attention DecoderAttention DecoderMaskedMultiHeadAttention DecoderMaskedSelfAttention GroupQueryAttention
    LongformerAttention MultiHeadAttention PackedAttention PackedMultiHeadAttention PagedAttention QAttention
    QOrderedAttention SparseAttention
"""
FUSED_ATTENTION = frozenset(_FUSED.split())
"""Operators that compute a whole attention, whatever their domain."""
_PRODUCTS: Mapping[str, tuple[int, int]] = {  # operator -> the places of its two operands
    **dict.fromkeys(("Einsum", "FusedMatMul", "MatMul", "MatMulInteger", "TransposeMatMul"), (0, 1)),
    **{"QLinearMatMul": (0, 3), "MatMulIntegerToFloat": (0, 1)},
}
# What stands between a product of queries and keys and its Softmax, or between that and the product with values.
_PASSED = """
    Add Cast CastLike Clip DequantizeLinear Div Dropout DynamicQuantizeLinear Identity Max Min Mul QuantizeLinear
    Reshape Slice Squeeze Sub Tanh Transpose Unsqueeze Where
"""
_BETWEEN = frozenset(_PASSED.split())
SOFTMAXES = frozenset({"Softmax", "QLinearSoftmax", "BiasSoftmax", "BiasSplitSoftmax"})
"""Operators that make a pattern of scores."""
_FAR = 24  # nodes that are followed from a Softmax: mask, scale, cap and their casts are fewer


@dataclass(frozen=True)
class Core:
    """Where a graph computes an attention.

    Attributes:
        node: The Softmax, or the fused operator.
        query: What is multiplied by the keys.
        key: The keys.
    """

    node: ir.Node
    query: ir.Value
    key: ir.Value


@dataclass(frozen=True)
class Anatomy:
    """What a graph is made of, as far as that tells which kind of network it is.

    Attributes:
        operators: How many nodes there are of each operator, ``domain::name`` outside of ONNX's own domain; branches and
            functions included.
        cores: The attentions of the main graph, in its order.
        hidden_cores: How many Softmax and fused attentions lie in branches of an If and in bodies of loops.
        reads: Value of the main graph -> the inputs whose content it depends on, a bit for each.
    """

    operators: Mapping[str, int]
    cores: tuple[Core, ...]
    hidden_cores: int
    reads: Mapping[ir.Value, int] = field(repr=False)


def anatomy(model: ir.Model) -> Anatomy:
    """Looks at what a graph is made of, in time linear in its nodes.

    Args:
        model: Any model whose structure was checked.
    """
    operators: Counter[str] = Counter()
    hidden = 0
    for node, depth in _all_nodes(model):
        operators[shown_operator(node)] += 1
        hidden += depth > 0 and (node.op_type == "Softmax" or node.op_type in FUSED_ATTENTION)
    reads = _reads(model.graph)
    return Anatomy(dict(operators.most_common()), tuple(_cores(model.graph, reads)), hidden, reads)


def shown_operator(node: ir.Node) -> str:
    """An operator as people and this package write it: ``MatMul``, ``com.microsoft::Attention``.

    Args:
        node: A node of the operator.
    """
    return node.op_type if node.domain in STANDARD else f"{node.domain}::{node.op_type}"


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The graphs among a node's attributes: the branches of an If, the body of a loop.

    Args:
        node: A node.
    """
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()


def _all_nodes(model: ir.Model) -> Iterator[tuple[ir.Node, int]]:
    """Every node of a model with how deep it is nested; those of functions count as the graph's own."""
    waiting: list[tuple[Iterable[ir.Node], int]] = [(model.graph, 0), *((each, 0) for each in model.functions.values())]
    while waiting:
        nodes, depth = waiting.pop()
        for node in nodes:
            yield node, depth
            waiting += [(graph, depth + 1) for graph in subgraphs(node)]


def _reads(graph: ir.Graph) -> dict[ir.Value, int]:
    """For each value the inputs whose content it depends on: what is known of their shapes alone does not count."""
    found = {value: 0 if value.name in graph.initializers else 1 << index for index, value in enumerate(graph.inputs)}
    for node in graph:
        bits = 0
        if node.op_type not in ("Shape", "Size"):
            for value in (*node.inputs, *(outer for inner in subgraphs(node) for outer in _outer(inner))):
                bits |= 0 if value is None else found.get(value, 0)
        found.update(dict.fromkeys(node.outputs, bits))
    return found


def _outer(graph: ir.Graph) -> Iterator[ir.Value]:
    """What the nodes of a subgraph read; the values of the graphs around it are among that."""
    for node in graph:
        yield from (value for value in node.inputs if value is not None)
        for inner in subgraphs(node):
            yield from _outer(inner)


def _cores(graph: ir.Graph, reads: Mapping[ir.Value, int]) -> Iterator[Core]:
    """The attentions of a graph: fused ones, and each Softmax between two products of computed values."""
    for node in graph:
        if node.op_type in FUSED_ATTENTION and node.inputs and node.inputs[0] is not None:
            packed = (
                node.op_type in ("Attention", "QAttention") and node.domain not in STANDARD
            )  # the second is a weight
            key = node.inputs[1] if len(node.inputs) > 1 and not packed else None
            yield Core(node, node.inputs[0], node.inputs[0] if key is None else key)
        elif node.op_type in SOFTMAXES and node.inputs and node.inputs[0] is not None:
            operands = _product_before(node.inputs[0], reads)
            if operands is not None and _reaches_product(node.outputs[0], reads):
                yield Core(node, *operands)


def _product_before(scores: ir.Value, reads: Mapping[ir.Value, int]) -> tuple[ir.Value, ir.Value] | None:
    """The two operands of the product of computed values that scores come from; None where there is none near."""
    waiting, seen = [scores], set[ir.Node]()
    while waiting and len(seen) < _FAR:
        node = waiting.pop(0).producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type in _PRODUCTS:
            given = [node.inputs[place] for place in _PRODUCTS[node.op_type] if place < len(node.inputs)]
            pair = [value for value in given if value is not None and reads.get(value)]
            if len(pair) == 2:
                return pair[0], pair[1]
        elif _plain(node) in _BETWEEN:
            waiting += [value for value in node.inputs if value is not None and reads.get(value)]
    return None


def _plain(node: ir.Node) -> str:
    """A node's operator, a quantised one (QLinearAdd) as the one that it stands for."""
    return node.op_type.removeprefix("QLinear")


def _reaches_product(pattern: ir.Value, reads: Mapping[ir.Value, int]) -> bool:
    """True if what a Softmax gives is multiplied, as a matrix, by something that is computed."""
    waiting, seen = [pattern], set[ir.Node]()
    while waiting and len(seen) < _FAR:
        value = waiting.pop(0)
        for node, _ in value.uses():
            if node in seen or len(seen) >= _FAR:
                continue
            seen.add(node)
            if node.op_type in _PRODUCTS:
                others = [node.inputs[place] for place in _PRODUCTS[node.op_type] if place < len(node.inputs)]
                if all(other is not None and reads.get(other, 0) for other in others):
                    return True
            elif _plain(node) in _BETWEEN:
                waiting += node.outputs
    return False


def source_of(value: ir.Value | None) -> ir.Value | None:
    """The value that another one is but for its shape, type and scale.

    Args:
        value: A value of a graph.
    """
    for _ in range(_FAR):
        node = None if value is None else value.producer()
        if node is None or _plain(node) not in _BETWEEN or not node.inputs:
            return value
        value = node.inputs[0]
    return value
