"""What all attention operators share once they are written out: heads, masks, and from queries to what heads hand on.

Queries, keys and values have the axes [b, heads, s, d_head]; there is one Softmax, between the product of queries and keys
and the product with the values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx_ir as ir

from graphlens.surgery.unfusing.building import Builder
from graphlens.surgery.unfusing.kinds import dtype_of, last_size, sizes_of


@dataclass(frozen=True)
class Scoring:
    """How scores are made from products of queries and keys, in this order.

    Attributes:
        scale: What they are multiplied by; None for 1 / sqrt(d_head).
        softcap: Bends them with tanh to stay below it; 0 for not at all.
        added: Values that are added to them, each of a shape that broadcasts to [b, heads, s, t].
        allowed: Which are kept, bool; the others become the least finite number. None for all.
        sink: A further logit of each head [1, heads, 1, 1], that takes a part of the attention and gives nothing.
        empty: True if a query that may read no key reads nothing; otherwise it reads all of them alike.
        wide: True if they are computed in 32 bits where queries have 16.
    """

    scale: float | None = None
    softcap: float = 0.0
    added: tuple[ir.Value, ...] = ()
    allowed: ir.Value | None = None
    sink: ir.Value | None = None
    empty: bool = False
    wide: bool = False


@dataclass(frozen=True)
class Attended:
    """What attention computed on its way.

    Attributes:
        products: Products of queries and keys, scaled.
        capped: The same after the softcap.
        scores: The same with what is added and masked.
        pattern: The attention pattern.
        z: [b, heads, s, d_head].
    """

    products: ir.Value
    capped: ir.Value
    scores: ir.Value
    pattern: ir.Value
    z: ir.Value


def attend(b: Builder, q: ir.Value, k: ir.Value, v: ir.Value, scoring: Scoring) -> Attended:
    """Attention written out.

    Args:
        b: Takes the nodes.
        q: Queries [b, heads, s, d_head].
        k: Keys [b, heads, t, d_head].
        v: Values [b, heads, t, d_value].
        scoring: How scores are made.
    """
    dtype = b.dtype(q)
    wide = ir.DataType.FLOAT if scoring.wide else dtype
    products = b.op("MatMul", b.cast(q, wide), b.cast(b.transpose(k, 0, 1, 3, 2), wide))
    products = _scaled(b, products, q, scoring.scale)
    capped = products
    if scoring.softcap:
        cap = b.number(scoring.softcap, products)
        capped = b.op("Mul", b.op("Tanh", b.op("Div", products, cap)), cap)
    scores = capped
    for value in scoring.added:
        scores = b.op("Add", scores, b.cast(value, wide))
    if scoring.allowed is not None:
        scores = b.op("Where", scoring.allowed, scores, b.lowest(scores))
    pattern = b.op("Softmax", scores, axis=-1) if scoring.sink is None else _with_sink(b, scores, scoring.sink)
    if scoring.empty:
        reads = b.op("Greater", b.op("ReduceMax", scores, b.integers([-1]), keepdims=1), b.lowest(scores))
        pattern = b.op("Where", reads, pattern, b.number(0, pattern))
    z = b.op("MatMul", b.cast(pattern, dtype), v)
    return Attended(products, capped, scores, pattern, z)


def _scaled(b: Builder, products: ir.Value, q: ir.Value, scale: float | None) -> ir.Value:
    width = last_size(q)
    if scale is None and width is None:
        return b.op("Div", products, b.op("Sqrt", b.cast(b.scalar(b.size(q, 3)), b.dtype(products))))
    factor = 1 / math.sqrt(width or 1) if scale is None else scale
    return b.op("Mul", products, b.number(factor, products))


def _with_sink(b: Builder, scores: ir.Value, sink: ir.Value) -> ir.Value:
    """The pattern where a logit beside the scores takes its part."""
    rows = b.op("Concat", b.op("Shape", scores, start=0, end=3), b.integers([1]), axis=0)
    joined = b.op("Concat", scores, b.op("Expand", b.cast(sink, b.dtype(scores)), rows), axis=-1)
    pattern = b.op("Softmax", joined, axis=-1)
    return b.op("Slice", pattern, b.integers([0]), b.integers([-1]), b.integers([-1]))


def split_heads(b: Builder, x: ir.Value, heads: int) -> ir.Value:
    """[b, s, heads d] as [b, heads, s, d]."""
    return b.transpose(b.reshape(x, 0, 0, heads, -1), 0, 2, 1, 3)


def joined_heads(b: Builder, z: ir.Value) -> ir.Value:
    """[b, heads, s, d] as [b, s, heads d]."""
    return b.reshape(b.transpose(z, 0, 2, 1, 3), 0, 0, -1)


def repeated(b: Builder, x: ir.Value, times: int) -> ir.Value:
    """Keys or values [b, groups, t, d] for queries in groups: each one as often as a group has queries, in a row."""
    if times == 1:
        return x
    spread = b.op("Expand", b.unsqueeze(x, 2), b.integers([1, 1, times, 1, 1]))
    sizes = sizes_of(x)
    if sizes is not None and isinstance(sizes[1], int) and isinstance(sizes[3], int):
        return b.op(
            "Reshape", spread, b.op("Concat", b.size(x, 0), b.integers([sizes[1] * times, -1, sizes[3]]), axis=0)
        )
    ends = (b.op("Shape", x, start=0, end=1), b.integers([-1]), b.op("Shape", x, start=2, end=4))
    return b.op("Reshape", spread, b.op("Concat", *ends, axis=0))


def causal(
    b: Builder, queries: ir.Value, total: ir.Value, past: ir.Value | None, last_reads_all: bool = False
) -> ir.Value:
    """Which keys each query may read where it reads none after itself.

    Args:
        b: Takes the nodes.
        queries: How many queries there are, int64 [1].
        total: How many keys, int64 [1].
        past: How many keys come before the first query; None for none.
        last_reads_all: True if the last query may read all keys, however many there are.

    Returns:
        bool [queries, total].
    """
    last = queries if past is None else b.op("Add", past, queries)
    if last_reads_all:
        one = b.integers([1])
        places = b.op("Concat", b.count(past, b.op("Sub", last, one)), b.op("Sub", total, one), axis=0)
    else:
        places = b.count(past, last)
    return b.op("LessOrEqual", b.unsqueeze(b.count(None, total), 0), b.unsqueeze(places, 1))


def both(b: Builder, first: ir.Value | None, second: ir.Value | None) -> ir.Value | None:
    """What two masks allow; None allows all."""
    if first is None or second is None:
        return first if second is None else second
    return b.op("And", first, second)


def floating(value: ir.Value) -> bool:
    """True for a value of floating-point numbers, or of a type that is not known."""
    dtype = dtype_of(value)
    return dtype is None or dtype.is_floating_point()
