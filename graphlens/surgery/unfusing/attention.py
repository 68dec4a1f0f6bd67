"""How ONNX Runtime's Attention and MultiHeadAttention are written out: their projections, pasts and kinds of mask."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.unfusing.building import (
    Builder,
    Kept,
    given,
    integer,
    real,
    refuse,
    refuse_inputs,
    taken,
    wanted,
)
from graphlens.surgery.unfusing.kinds import last_size, rank_of
from graphlens.surgery.unfusing.scores import Scoring, attend, causal, joined_heads, split_heads
from graphlens.surgery.unfusing.table import rule

_FILTER = -10000.0  # what is added to the scores of padding, unless an attribute says otherwise


def padding(
    b: Builder, node: ir.Node, mask: ir.Value, like: ir.Value, batch: ir.Value, queries: ir.Value, total: ir.Value
) -> ir.Value:
    """What a mask of padding adds to scores: nothing where it allows, a number where it does not.

    Args:
        b: Takes the nodes.
        node: The attention node.
        mask: Lengths [b], ends and starts [2 b], or zeros and ones [b, t], [b, s, t] or [b, 1, most, most].
        like: A value of the scores' type.
        batch: The size of the batch, int64 [1].
        queries: How many queries there are, int64 [1].
        total: How many keys, int64 [1].

    Returns:
        What broadcasts to [b, heads, s, t].

    Raises:
        Kept: The number of the mask's axes is not known.
    """
    rank = rank_of(mask)
    if rank == 4:  # of the longest text: the rows of these queries, and the columns of all keys
        first = b.op("Sub", total, queries)
        window = b.op("Concat", first, b.integers([0]), axis=0), b.op("Concat", total, total, axis=0)
        mask, rank = b.op("Squeeze", b.op("Slice", mask, *window, b.integers([2, 3])), b.integers([1])), 3
    if rank == 1:
        allowed = _within(b, b.cast(mask, ir.DataType.INT64), batch, total)
    elif rank in (2, 3):
        zero = b.constant(ir.tensor(0, b.dtype(mask)).numpy())
        allowed = b.op("Greater", b.unsqueeze(mask, *((1, 2) if rank == 2 else (1,))), zero)
    else:
        raise Kept(f"is left as it is where its mask {mask.name!r} has {rank or 'an unknown number of'} axes.")
    value = real(node, "mask_filter_value", _FILTER)
    return b.op("Where", allowed, b.number(0, like), b.number(value, like))


def _within(b: Builder, mask: ir.Value, batch: ir.Value, total: ir.Value) -> ir.Value:
    """Which keys are no padding, by lengths [b] or by ends and starts [2 b]: bool [b, 1, 1, t]."""
    keys = b.count(None, total)
    one = b.integers([0])
    twice = b.op("Add", batch, batch)
    ends = b.op("Slice", mask, one, batch, one)
    # Only a mask of two numbers for each row has starts: lengths are followed by none.
    longer = b.op("Concat", mask, b.op("Expand", b.integers([0]), batch), axis=0)
    starts = b.op("Slice", longer, batch, twice, one)
    starts = b.op("Where", b.op("Equal", b.op("Shape", mask), twice), starts, b.integers([0]))
    below = b.op("Less", keys, b.op("Reshape", ends, b.integers([-1, 1, 1, 1])))
    above = b.op("GreaterOrEqual", keys, b.op("Reshape", starts, b.integers([-1, 1, 1, 1])))
    return b.op("And", below, above)


def _scoring(
    b: Builder,
    node: ir.Node,
    q: ir.Value,
    k: ir.Value,
    past: ir.Value | None,
    mask: ir.Value | None,
    bias: ir.Value | None,
) -> Scoring:
    """How scores are made: a bias, then padding, then what comes later."""
    queries, total = b.size(q, 2), b.size(k, 2)
    added = () if bias is None else (bias,)
    if mask is not None:
        added = (*added, padding(b, node, mask, q, b.size(q, 0), queries, total))
    allowed = None
    if integer(node, "unidirectional"):
        # The kernel lets the last query read all keys: the same, unless keys are those of another text.
        allowed = causal(b, queries, total, past, last_reads_all=node.op_type == "MultiHeadAttention")
    return Scoring(real(node, "scale") or None, added=added, allowed=allowed)


@rule(
    "com.microsoft::Attention",
    variants="past and present, values of another width, masks of lengths, of ends and starts, [b, t], [b, s, t] and "
    "[b, 1, most, most] (that one against NumPy), unidirectional, mask_filter_value, scale, attention bias",
)
def _attention(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    refuse_inputs(node, (6, "a past length"))
    bias = given(node, 2)
    projected = b.op("MatMul", taken(node, 0), taken(node, 1))
    if bias is not None:
        projected = b.op("Add", projected, bias)
    return attended(b, node, projected, given(node, 3), given(node, 4), given(node, 5))


def attended(
    b: Builder,
    node: ir.Node,
    projected: ir.Value,
    mask: ir.Value | None,
    past: ir.Value | None,
    bias: ir.Value | None,
) -> list[ir.Value | None]:
    """The outputs of an attention node that makes queries, keys and values by one product.

    Args:
        b: Takes the nodes.
        node: The node.
        projected: What the product gave, [b, s, queries + keys + values].
        mask: A mask of padding; None for none.
        past: Keys and values of earlier tokens [2, b, heads, p, d_head]; None for none.
        bias: What is added to scores; None for nothing.

    Returns:
        What heads hand on [b, s, heads d_value], and keys and values as a past for later tokens.
    """
    refuse(node, "a buffer shared by past and present", bool(integer(node, "past_present_share_buffer")))
    refuse(node, "rotary embedding inside (do_rotary)", bool(integer(node, "do_rotary")))
    heads = integer(node, "num_heads")
    sizes = node.attributes["qkv_hidden_sizes"].as_ints() if "qkv_hidden_sizes" in node.attributes else ()
    if not sizes and (width := last_size(projected)) is not None:
        sizes = (width // 3,) * 3
    if sizes:
        parts = b.several("Split", 3, projected, b.integers(list(sizes)), axis=-1)
    else:
        parts = b.several("Split", 3, projected, axis=-1, num_outputs=3)
    q, k, v = (split_heads(b, part, heads) for part in parts)
    length = None
    if past is not None:
        length = b.size(past, 3)
        kept = [b.op("Squeeze", half, b.integers([0])) for half in b.several("Split", 2, past, axis=0, num_outputs=2)]
        k, v = (b.op("Concat", old, new, axis=2) for old, new in zip(kept, (k, v), strict=True))
    present = b.op("Concat", b.unsqueeze(k, 0), b.unsqueeze(v, 0), axis=0) if wanted(node, 1) else None
    found = attend(b, q, k, v, _scoring(b, node, q, k, length, mask, bias))
    return [joined_heads(b, found.z), present]


@rule(
    "com.microsoft::MultiHeadAttention",
    variants="keys and values [b, t, d], [b, heads, t, d] or packed, packed queries, bias, past and present, masks of "
    "lengths, [b, t] and [b, s, t], attention bias, unidirectional, mask_filter_value, scale; packed ones against NumPy",
)
def _multi_head(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    refuse_inputs(node, (8, "a past length"), (9, "a cache's indirection"))
    heads, bias = integer(node, "num_heads"), given(node, 3)
    q, k, v = _separate(b, node)
    if bias is not None:
        refuse(node, "a bias, but keys that are split into heads", rank_of(k) != 3)
        q, k, v = _biased(b, bias, q, k, v)
    q, k, v = (split_heads(b, part, heads) if rank_of(part) == 3 else part for part in (q, k, v))
    past_k, past_v = given(node, 6), given(node, 7)
    length = None
    if past_k is not None and past_v is not None:
        length = b.size(past_k, 2)
        k, v = b.op("Concat", past_k, k, axis=2), b.op("Concat", past_v, v, axis=2)
    found = attend(b, q, k, v, _scoring(b, node, q, k, length, given(node, 4), given(node, 5)))
    present = [k if wanted(node, 1) else None, v if wanted(node, 2) else None]
    return [joined_heads(b, found.z), *present, found.scores if wanted(node, 3) else None]


def _separate(b: Builder, node: ir.Node) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Queries, keys and values, each [b, s, heads d] or [b, heads, s, d], however they are packed."""
    q, k, v = taken(node, 0), given(node, 1), given(node, 2)
    if k is None:
        refuse(node, "no keys, but queries that are not packed with them", rank_of(q) != 5)
        first, second, third = _unpacked(b, q, 3)
        return first, second, third
    if v is None:
        refuse(node, "no values, but keys that are not packed with them", rank_of(k) != 5)
        first, second = _unpacked(b, k, 2)
        return q, first, second
    for value in (k, v):
        if rank_of(value) not in (3, 4):
            raise Kept(f"is left as it is where the number of axes of {value.name!r} is not known.")
    return q, k, v


def _unpacked(b: Builder, packed: ir.Value, count: int) -> list[ir.Value]:
    """The parts of [b, s, heads, count, d], each [b, s, heads d]."""
    parts = b.several("Split", count, packed, axis=3, num_outputs=count)
    return [b.reshape(part, 0, 0, -1) for part in parts]


def _biased(b: Builder, bias: ir.Value, *parts: ir.Value) -> list[ir.Value]:
    """Queries, keys and values with their parts of a bias."""
    widths = [last_size(part) for part in parts]
    known = [width for width in widths if width is not None]
    if len(known) == 3:
        biases = b.several("Split", 3, bias, b.integers(known), axis=0)
    elif widths[1:] == [None, None] or len(set(known)) < 2:
        sizes = [b.size(part, 2) for part in parts]
        biases = b.several("Split", 3, bias, b.op("Concat", *sizes, axis=0), axis=0)
    return [b.op("Add", part, one) for part, one in zip(parts, biases, strict=True)]
