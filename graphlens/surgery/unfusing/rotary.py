"""How rotary embeddings are written out: halves or pairs of each head, turned by the cosines and sines of their positions."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.unfusing.building import Builder, Kept, given, integer, real, refuse, taken
from graphlens.surgery.unfusing.kinds import last_size, rank_of
from graphlens.surgery.unfusing.table import SCHEMA, rule


def turned(
    b: Builder, x: ir.Value, cos: ir.Value, sin: ir.Value, width: int | None, interleaved: bool = False
) -> ir.Value:
    """What rotary embedding makes of heads.

    Args:
        b: Takes the nodes.
        x: The heads, [..., d_head].
        cos: The cosines, [..., r / 2], which broadcast to x.
        sin: The sines.
        width: How much of each head turns (r), the rest is passed on; None where only a run knows it.
        interleaved: True if neighbours turn together; otherwise the first half with the second.

    Returns:
        Of x's shape.
    """
    whole, rest = last_size(x), None
    if width is not None and whole is not None and width != whole:
        x, rest = b.several("Split", 2, x, b.integers([width, whole - width]), axis=-1)
    elif width is None or whole is None:
        end = b.op("Mul", b.size(cos, -1 % (rank_of(cos) or 1)), b.integers([2]))
        most, axes = b.integers([2**62]), b.integers([-1])
        x, rest = b.op("Slice", x, b.integers([0]), end, axes), b.op("Slice", x, end, most, axes)
    if interleaved:
        pairs = b.op("Reshape", x, b.integers([0, 0, 0, -1, 2]))
        first, second = (
            b.op("Squeeze", part, b.integers([-1])) for part in b.several("Split", 2, pairs, axis=-1, num_outputs=2)
        )
    else:
        first, second = b.several("Split", 2, x, axis=-1, num_outputs=2)
    real_part = b.op("Sub", b.op("Mul", first, cos), b.op("Mul", second, sin))
    other = b.op("Add", b.op("Mul", second, cos), b.op("Mul", first, sin))
    if interleaved:
        pairs = b.op("Concat", b.unsqueeze(real_part, -1), b.unsqueeze(other, -1), axis=-1)
        found = b.op("Reshape", pairs, b.integers([0, 0, 0, -1]))
        return found if rest is None else b.op("Concat", found, rest, axis=-1)
    return b.op("Concat", real_part, other, *(() if rest is None else (rest,)), axis=-1)


def looked_up(b: Builder, cache: ir.Value, positions: ir.Value) -> ir.Value:
    """The rows of a cache of cosines or sines for positions [b, s], [b, 1, s, r / 2]."""
    return b.unsqueeze(b.op("Gather", cache, positions, axis=0), 1)


def _rotated(b: Builder, node: ir.Node, x: ir.Value, cos: ir.Value, sin: ir.Value) -> ir.Value:
    """The output of a rotary node, whose cosines have the axes [b, 1, s, r / 2]."""
    rank, heads = rank_of(x), integer(node, "num_heads")
    if rank not in (3, 4):
        raise Kept(f"is left as it is where the number of axes of {x.name!r} is not known.")
    half = last_size(cos)
    width = integer(node, "rotary_embedding_dim") or (None if half is None else 2 * half)
    if rank == 4:
        return turned(b, x, cos, sin, width, bool(integer(node, "interleaved")))
    if heads == 0:  # each head is as wide as the cosines are
        refuse(node, "neither a number of heads nor a width of cosines", half is None)
        split = b.reshape(x, 0, 0, -1, 2 * (half or 0))
    else:
        split = b.reshape(x, 0, 0, heads, -1)
    found = turned(b, b.transpose(split, 0, 2, 1, 3), cos, sin, width, bool(integer(node, "interleaved")))
    return b.reshape(b.transpose(found, 0, 2, 1, 3), 0, 0, -1)


@rule(
    "com.microsoft::RotaryEmbedding",
    variants="[b, s, h d] and [b, h, s, d], positions by row or from an offset, interleaved, part of a head",
)
def _microsoft(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    x, positions, cos, sin = (taken(node, place) for place in range(4))
    refuse(node, "a ragged batch (is_packed_batching)", bool(integer(node, "is_packed_batching")))
    refuse(node, "a scale that its kernels ignore", real(node, "scale", 1.0) != 1.0)
    rank = rank_of(positions)
    if rank is None:
        raise Kept(f"is left as it is where the number of axes of {positions.name!r} is not known.")
    if rank == 1:  # the position of the first token
        length = b.size(x, 2 if rank_of(x) == 4 else 1)
        positions = b.unsqueeze(b.op("Add", b.count(None, length), positions), 0)
    return [_rotated(b, node, x, looked_up(b, cos, positions), looked_up(b, sin, positions))]


@rule(
    "RotaryEmbedding",
    variants="[b, s, h d] and [b, h, s, d], with and without positions, interleaved, part of a head",
)
def _standard(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    x, cos, sin, positions = taken(node, 0), taken(node, 1), taken(node, 2), given(node, 3)
    if positions is None:
        return [_rotated(b, node, x, b.unsqueeze(cos, 1), b.unsqueeze(sin, 1))]
    return [_rotated(b, node, x, looked_up(b, cos, positions), looked_up(b, sin, positions))]


@rule("com.microsoft::GemmaRotaryEmbedding", variants="all", checked=SCHEMA)
def _gemma(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    angles, *states = (taken(node, place) for place in range(5))
    dtype = b.dtype(states[0])
    cos, sin = (b.unsqueeze(b.cast(b.op(kind, angles), dtype), 1) for kind in ("Cos", "Sin"))
    return [
        b.op("Add", b.op("Mul", state, cos), b.op("Mul", rotated, sin)) for state, rotated in (states[:2], states[2:])
    ]
