"""What the residual stream begins as: embeddings of tokens, positions and types of tokens, or patches of an image."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from graphlens.errors import ModelFileError
from graphlens.surgery.match.layout import MOVES
from graphlens.surgery.match.linear import Linears
from graphlens.surgery.match.norms import Norms
from graphlens.surgery.match.parts import Beginning, Normed, Table
from graphlens.surgery.match.wires import Wires

_STEPS = 24
_MANY = 300  # nodes that positions are computed by at the most
FEW = 16  # classes of a classifier, rows of a table of types of tokens
_FEWEST = 4  # labels of tokens, which no vocabulary is as few as
_GATHERS = frozenset({"Gather", "GatherBlockQuantized"})
_INDEX = MOVES | {"Cast", "Identity", "Clip", "Max", "Min"}


def beginning_of(
    wires: Wires, linears: Linears, norms: Norms, stream: ir.Value, vocabulary: int | None, rotated: bool
) -> Beginning:
    """The embeddings that a residual stream begins as.

    Args:
        wires: The graph.
        linears: Its products with weights.
        norms: Its norms.
        stream: What the first block reads.
        vocabulary: How many tokens there are, by the logits; None if that is not known.
        rotated: True if queries are rotated by their positions.

    Raises:
        ModelFileError: What the stream begins as is none that is known.
    """
    projected = linears.made(stream)
    whole = stream if projected is None else wires.first(projected.source)
    norm = norms.giving(whole)
    terms = _terms(wires, whole if norm is None else norm.norm.x)
    leaves = [_leaf(wires, one) or _of_sizes(wires, one) or _widened(wires, linears, one) for one in terms]
    tables = [leaf for leaf in leaves if leaf is not None]
    if len(tables) != len(leaves) or not tables:
        raise ModelFileError(
            f"the residual stream begins at {stream.name!r} with something that is neither an embedding nor patches of an "
            "image, so this is no decoder, encoder or vision transformer that graphlens knows. graphlens expose adds any "
            "values of the graph as outputs."
        )
    images = [table for table in tables if table.table is None]
    if images:
        return _of_image(wires, images, tables, norm, stream)
    direct = [table for table in tables if table.input is not None]
    if not direct:
        raise ModelFileError(
            f"no input of the graph has the tokens that the embeddings at {stream.name!r} are of: it may take embeddings "
            "instead. Export the model with input_ids."
        )
    tokens = _tokens(wires, direct, vocabulary)
    rest = [table for table in tables if table is not tokens]
    positions, types = _told_apart(wires, rest, stream, rotated)
    return Beginning(tokens, positions, types, norm, stream, projected)


def _told_apart(wires: Wires, rest: list[Table], stream: ir.Value, rotated: bool) -> tuple[Table | None, Table | None]:
    """(positions, types of tokens) among the embeddings besides that of tokens."""
    if len(rest) > 2:
        raise ModelFileError(
            f"the residual stream begins at {stream.name!r} as a sum that has the embedding {rest[-1].value.name!r} besides "
            "those of tokens, positions and types of tokens: graphlens knows no such model. graphlens expose adds any values "
            "of the graph as outputs."
        )
    # Types are an input, or all of them 0; positions are counted, or an input with more rows.
    rest = sorted(
        rest, key=lambda table: (not _all_zero(wires, table), table.input is None, rows_of(wires, table) or 0)
    )
    if not rest:
        return None, None
    first = rest[0]
    if len(rest) == 2:
        return rest[1], first
    # One table alone, however short: positions, unless queries have theirs by rotation.
    few = rotated and first.input is not None and (rows_of(wires, first) or FEW + 1) <= FEW
    return (None, first) if few or _all_zero(wires, first) else (first, None)


def _all_zero(wires: Wires, table: Table) -> bool:
    """True if the first row of a table is taken for every token."""
    places = None if table.index is None else wires.shapes.integers(table.index)
    return bool(places) and len(places or ()) > 1 and not any(places or ())


def _of_image(
    wires: Wires, images: list[Table], tables: list[Table], norm: Normed | None, stream: ir.Value
) -> Beginning:
    rest = [table for table in tables if table.table is not None]
    if len(images) != 1 or len(rest) > 1:
        raise ModelFileError(f"the residual stream begins at {stream.name!r} with patches and more than positions.")
    image = images[0]
    return Beginning(image, rest[0] if rest else None, None, norm, stream, None, image.input, image.node)


def _tokens(wires: Wires, direct: list[Table], vocabulary: int | None) -> Table:
    """Which of several embeddings of inputs is that of tokens."""
    known = [table for table in direct if vocabulary is not None and rows_of(wires, table) == vocabulary]
    if len(known) == 1 and (vocabulary or 0) > _FEWEST:
        return known[0]
    return max(direct, key=lambda table: rows_of(wires, table) or 0)


def rows_of(wires: Wires, table: Table) -> int | None:
    """How many rows a table has; None for patches.

    Args:
        wires: The graph.
        table: The table.
    """
    shape = wires.shape(table.table)
    return None if shape is None or len(shape) < 2 else shape[-2] if len(shape) == 3 else shape[0]


def _terms(wires: Wires, value: ir.Value) -> list[ir.Value]:
    """The terms of a sum, inner sums taken apart."""
    value = wires.first(value)
    node = value.producer()
    if node is None or node.op_type != "Add" or wires.is_fixed(value):
        return [value]
    return [term for one in node.inputs if one is not None for term in _terms(wires, one)]


def _leaf(wires: Wires, value: ir.Value) -> Table | None:
    """The embedding that a term is."""
    if wires.is_fixed(value):
        return _all_rows(wires, value)
    whole, times = value, 1.0
    for _ in range(_STEPS):
        node = value.producer()
        if node is None:
            return None
        if node.op_type in _GATHERS and wires.is_fixed(node.inputs[0]):
            index = node.inputs[1]
            if index is None or (wires.is_fixed(index) and wires.shape(index) == ()):
                return None
            return Table(whole, node.inputs[0], node, index, _input(wires, index), times)
        if node.op_type == "DequantizeLinear":
            source = node.inputs[0]
        elif node.op_type in ("Mul", "Div") and (number := _number(wires, node, value)) is not None:
            times *= number
            source = next(one for one in node.inputs if one is not None and not wires.is_fixed(one))
        elif (masked := _masked(wires, node)) is not None:
            source = masked
        elif node.op_type in ("Concat", "Conv", "ConvInteger", "Mul", "Add") or node.op_type in MOVES:
            patches = _patches(wires, value)
            if patches is not None:
                return Table(whole, None, patches, None, _pixels(wires, patches), times)
            source = node.inputs[0]
            if node.op_type not in MOVES:
                return None
        elif node.op_type in ("Slice", "Expand"):
            source = node.inputs[0]
        else:
            return None
        if source is None:
            return None
        if wires.is_fixed(source):
            found = _all_rows(wires, source)
            return None if found is None else Table(whole, found.table, None, None, None, times)
        value = wires.first(source)
    return None


def _widened(wires: Wires, linears: Linears, value: ir.Value) -> Table | None:
    """The embedding that a term is after a matrix has made it as wide as the residual stream (OPT)."""
    linear = linears.by_out.get(wires.first(value))
    found = None if linear is None else _leaf(wires, linear.source)
    return None if found is None else replace(found, value=wires.first(value))


def _masked(wires: Wires, node: ir.Node) -> ir.Value | None:
    """What a node sets to zero at padding, by a product with a mask or a choice."""
    if node.op_type == "Where":
        kept = [one for one in node.inputs[1:] if one is not None and not wires.is_fixed(one)]
    elif node.op_type == "Mul":
        whole = wires.shape(node.outputs[0])
        kept = [one for one in wires.loose_operands(node) if wires.shape(one) == whole]
        if len(kept) != 1 or len(wires.loose_operands(node)) != 2:
            return None
    else:
        return None
    return kept[0] if len(kept) == 1 and _is_looked_up(wires, kept[0]) else None


def _is_looked_up(wires: Wires, value: ir.Value) -> bool:
    """True for rows of a table."""
    node = wires.producer(value)
    return node is not None and node.op_type in _GATHERS and wires.is_fixed(node.inputs[0])


def _number(wires: Wires, node: ir.Node, value: ir.Value) -> float | None:
    numbers = [wires.number(one) for one in node.inputs if one is not None and wires.is_fixed(one)]
    if len(numbers) != 1 or numbers[0] is None:
        return None
    return numbers[0] if node.op_type == "Mul" else 1 / numbers[0]


def _all_rows(wires: Wires, value: ir.Value) -> Table | None:
    """An embedding of all positions at once: rows that the graph holds."""
    shape = wires.shape(value)
    if shape is None or len(shape) not in (2, 3):
        return None
    node = value.producer()
    if node is not None and node.op_type in _GATHERS:
        return Table(value, node.inputs[0], node, node.inputs[1], None, 1.0)
    return Table(value, value, None, None, None, 1.0)


def _of_sizes(wires: Wires, value: ir.Value) -> Table | None:
    """An embedding of positions that is computed from weights and sizes alone, as one fitted to an image's size is."""
    waiting, seen = [value], set[ir.Value]()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        node = one.producer()
        if one.is_graph_input() or wires.is_live(one) or len(seen) > _MANY:
            return None
        if node is not None and node.op_type not in ("Shape", "Size"):
            waiting += [given for given in node.inputs if given is not None]
    return _all_rows(wires, value)


def _input(wires: Wires, index: ir.Value) -> ir.Value | None:
    """The input of the graph that an index is, moved or cast perhaps."""
    value: ir.Value | None = wires.first(index)
    for _ in range(_STEPS):
        if value is None or value.is_graph_input():
            return value
        node = value.producer()
        if node is None or node.op_type not in _INDEX:
            return None
        value = wires.operand(node, 0)
    return None


def _patches(wires: Wires, value: ir.Value) -> ir.Node | None:
    """The convolution that patches come from, with one more token perhaps put before them."""
    waiting, seen = [value], set[ir.Value]()
    while waiting and len(seen) < _STEPS:
        one = waiting.pop()
        node = one.producer()
        if one in seen or node is None:
            continue
        seen.add(one)
        if node.op_type in ("Conv", "ConvInteger"):
            return node
        if node.op_type in MOVES | {"Concat", "Mul", "Add", "Cast", "Where", "Sub"}:
            waiting += wires.live_operands(node)
    return None


def _pixels(wires: Wires, node: ir.Node) -> ir.Value | None:
    """The input of pixels that a convolution reads."""
    value = wires.operand(node, 0)
    for _ in range(_STEPS):
        if value is None or value.is_graph_input():
            return value
        maker = value.producer()
        if maker is None:
            return None
        loose = wires.loose_operands(maker)
        value = loose[0] if loose else None
    return None
