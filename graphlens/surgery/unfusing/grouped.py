"""How GroupQueryAttention is written out: groups that share keys, rows of different lengths in one cache, windows, sinks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphlens.surgery.unfusing.building import (
    HALVES,
    Builder,
    given,
    integer,
    real,
    refuse,
    refuse_inputs,
    taken,
    wanted,
)
from graphlens.surgery.unfusing.kinds import last_size
from graphlens.surgery.unfusing.norms import normalised
from graphlens.surgery.unfusing.rotary import looked_up, turned
from graphlens.surgery.unfusing.scores import Scoring, attend, both, joined_heads, repeated, split_heads
from graphlens.surgery.unfusing.table import rule


@dataclass(frozen=True)
class _Places:
    """Where queries and keys stand.

    A row's past may be shorter than the cache: its own past fills the first places, and the others hold nothing. New keys
    come after the whole cache in the graph, but after the row's own past in the text.

    Attributes:
        queries: The position of each query, int64 [s] or [b, s].
        keys: The position of each key, int64 [t] or [b, t].
        filled: Which keys are there, bool [b, t]; None for all.
        past: The length of each row's past, int64 [b, 1]; None without a past.
        first: The position of the first key in the cache, int64 [b, 1]: what came before was dropped. None for 0.
        cache: The length of the cache, int64 [1]; None without a past.
    """

    queries: ir.Value
    keys: ir.Value
    filled: ir.Value | None = None
    past: ir.Value | None = None
    first: ir.Value | None = None
    cache: ir.Value | None = None


def _places(b: Builder, node: ir.Node, q: ir.Value, cache: ir.Value | None, lengths: ir.Value) -> _Places:
    """Where queries and keys stand.

    Args:
        b: Takes the nodes.
        node: The attention node.
        q: Queries [b, s, ...].
        cache: Keys of the past [b, groups, p, d].
        lengths: The length of each row with its new tokens, int64 [b, 1].
    """
    count = b.size(q, 1)
    new = b.count(None, count)
    if cache is None:
        return _Places(new, new)
    length = b.size(cache, 2)
    said = given(node, 16)
    own = count if said is None else b.reshape(b.cast(said, ir.DataType.INT64), -1, 1)
    past = b.op("Max", b.op("Sub", lengths, own), b.integers([0]))  # 0: a prompt, that padding may follow
    old, after = b.count(None, length), b.op("Add", past, new)
    first = b.op("Sub", past, _resident(b, node, past, length)) if integer(node, "sliding_window_cache") else None
    zeros = b.op("Mul", past, b.integers([0]))
    before = b.op("Add", zeros if first is None else first, old)
    keys = b.op("Concat", before, after, axis=1)
    there = b.op("Concat", b.op("Less", before, past), b.op("GreaterOrEqual", after, zeros), axis=1)
    return _Places(after, keys, there, past, first, length)


def _resident(b: Builder, node: ir.Node, length: ir.Value, capacity: ir.Value) -> ir.Value:
    """How many tokens of a text a cache of a window holds: all while they fit, then those that blocks were dropped before."""
    one = b.integers([1])
    block = b.op("Max", b.op("Sub", capacity, b.integers([integer(node, "local_window_size") - 1])), one)
    over = b.op("Max", b.op("Sub", length, capacity), b.integers([0]))
    blocks = b.op("Div", b.op("Sub", b.op("Add", over, block), one), block)
    return b.op("Sub", length, b.op("Mul", blocks, block))


def _allowed(b: Builder, node: ir.Node, places: _Places, lengths: ir.Value) -> ir.Value | None:
    """Which keys each query may read, bool that broadcasts to [b, 1, s, t]."""
    many = places.past is not None
    queries = b.unsqueeze(places.queries, 1, 3) if many else b.unsqueeze(places.queries, 1)
    keys = b.unsqueeze(places.keys, 1, 2) if many else b.unsqueeze(places.keys, 0)
    found: ir.Value | None = None
    if integer(node, "causal", 1):
        found = b.op("LessOrEqual", keys, queries)
        window = integer(node, "local_window_size", -1)
        if window > 0:
            found = both(b, found, b.op("Less", b.op("Sub", queries, keys), b.integers(window)))
    else:  # what comes after a row's own tokens is padding
        found = b.op("Less", keys, b.unsqueeze(lengths, 1, 2))
    return both(b, found, None if places.filled is None else b.unsqueeze(places.filled, 1, 2))


@rule(
    "com.microsoft::GroupQueryAttention",
    variants="packed queries, rotary (halves and pairs, part of a head, given positions), window, softcap, smooth softmax, "
    "sinks, attention bias, past of rows of different lengths, caches of a window, padding on "
    "the right, lengths of queries, not causal, norms of queries and keys "
    "(those against NumPy)",
)
def _grouped(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    refuse_inputs(node, (12, "a quantised cache"), (13, "a quantised cache"))
    refuse(node, "a quantised cache", integer(node, "kv_cache_bit_width") not in (0, 16, 32))
    heads, groups = integer(node, "num_heads"), integer(node, "kv_num_heads")
    q, k, v = _parts(b, node, heads, groups)
    q, k = _normed(b, node, q, k)
    past_k, past_v = given(node, 3), given(node, 4)
    lengths = b.op("Add", b.reshape(b.cast(taken(node, 5), ir.DataType.INT64), -1, 1), b.integers([1]))
    places = _places(b, node, taken(node, 0), past_k, lengths)
    q, k = _turned(b, node, q, k, places)
    if past_k is not None and past_v is not None:
        k, v = b.op("Concat", past_k, k, axis=2), b.op("Concat", past_v, v, axis=2)
    scoring = Scoring(
        real(node, "scale") or None,
        max(real(node, "softcap"), 0.0),
        _bias(b, node, k, places),
        _allowed(b, node, places, lengths),
        _sink(b, node, q),
        wide=b.dtype(q) in HALVES,
    )
    found = attend(b, q, repeated(b, k, heads // groups), repeated(b, v, heads // groups), scoring)
    present = [
        _compact(b, node, value, places, lengths) if wanted(node, place) else None for place, value in ((1, k), (2, v))
    ]
    shown = {1: found.scores, 2: found.pattern}.get(integer(node, "qk_output")) if wanted(node, 3) else None
    return [joined_heads(b, found.z), *present, None if shown is None else b.cast(shown, b.dtype(q))]


def _parts(b: Builder, node: ir.Node, heads: int, groups: int) -> list[ir.Value]:
    """Queries, keys and values [b, heads, s, d]."""
    q, k, v = taken(node, 0), given(node, 1), given(node, 2)
    if k is None or v is None:
        width = last_size(q)
        if width is None:
            split = b.reshape(q, 0, 0, heads + 2 * groups, -1)
            parts = b.several("Split", 3, split, b.integers([heads, groups, groups]), axis=2)
            return [b.transpose(part, 0, 2, 1, 3) for part in parts]
        refuse(node, f"{width} numbers that are not as many for each head", width % (heads + 2 * groups) != 0)
        head = width // (heads + 2 * groups)
        q, k, v = b.several("Split", 3, q, b.integers([heads * head, groups * head, groups * head]), axis=-1)
    return [split_heads(b, part, count) for part, count in ((q, heads), (k, groups), (v, groups))]


def _normed(b: Builder, node: ir.Node, q: ir.Value, k: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Queries and keys, normalised where the node has weights for it."""
    weights = given(node, 14), given(node, 15)
    both_have = real(node, "qk_norm_epsilon", 1e-6)
    epsilons = real(node, "q_norm_epsilon", both_have), real(node, "k_norm_epsilon", both_have)
    q, k = (
        part if weight is None else normalised(b, part, weight, None, epsilon, simple=True)[0]
        for part, weight, epsilon in zip((q, k), weights, epsilons, strict=True)
    )
    return q, k


def _turned(b: Builder, node: ir.Node, q: ir.Value, k: ir.Value, places: _Places) -> tuple[ir.Value, ir.Value]:
    """Queries and keys with rotary embedding, where the node does that."""
    if not integer(node, "do_rotary"):
        return q, k
    caches, positions = (taken(node, 7), taken(node, 8)), given(node, 9)
    if positions is None:
        positions = places.queries if places.past is not None else b.unsqueeze(places.queries, 0)
    else:
        refuse(node, "positions and lengths of queries", given(node, 16) is not None)
        positions = _read(b, node, positions, q, places)
    cos, sin = (looked_up(b, cache, positions) for cache in caches)
    half, pairs = last_size(caches[0]), bool(integer(node, "rotary_interleaved"))
    width = None if half is None else 2 * half
    return turned(b, q, cos, sin, width, pairs), turned(b, k, cos, sin, width, pairs)


def _read(b: Builder, node: ir.Node, positions: ir.Value, q: ir.Value, places: _Places) -> ir.Value:
    """The positions that the kernel reads: in a prompt the first one only, from which it counts for all rows."""
    start, one = b.integers([0]), b.integers([1])
    new = b.size(q, 2)
    counted = b.op("Add", b.op("Slice", b.reshape(positions, -1), start, one), b.unsqueeze(b.count(None, new), 0))
    if places.past is None:
        return counted
    total = b.reshape(b.cast(taken(node, 6), ir.DataType.INT64), 1)
    return b.op("Where", b.op("Equal", total, new), counted, positions)


def _bias(b: Builder, node: ir.Node, k: ir.Value, places: _Places) -> tuple[ir.Value, ...]:
    """What is added to scores. Its columns are positions: where the cache has gaps, they are looked up."""
    bias = given(node, 10)
    if bias is None:
        return ()
    if places.past is None:
        return (bias,)
    # [b, n, s, positions] -> [b, n, s, t]
    most = b.op("Sub", b.size(bias, 3), b.integers([1]))
    columns = b.unsqueeze(b.op("Min", places.keys, most), 1, 2)
    rows = b.op("Concat", b.size(k, 0), b.op("Shape", bias, start=1, end=3), axis=0)
    spread = b.op("Expand", bias, b.op("Concat", rows, b.integers([1]), axis=0))
    wide = b.op("Expand", columns, b.op("Concat", rows, b.integers([1]), axis=0))
    return (b.op("GatherElements", spread, wide, axis=3),)


def _sink(b: Builder, node: ir.Node, q: ir.Value) -> ir.Value | None:
    """The logit beside the scores of each head, [1, heads, 1, 1]; None for none."""
    sink = given(node, 11)
    if sink is not None:
        return b.reshape(sink, 1, -1, 1, 1)
    if integer(node, "smooth_softmax") == 1:
        return b.constant(np.zeros((1, 1, 1, 1), b.dtype(q).numpy()))
    return None


def _compact(b: Builder, node: ir.Node, value: ir.Value, places: _Places, lengths: ir.Value) -> ir.Value:
    """Keys or values as a cache: each row's own past, or what a window leaves of it, then its new ones."""
    if places.past is None or places.cache is None:
        return value
    # The cache that the node hands on is as long as the longest row, or as the one it got.
    total = b.reshape(b.cast(taken(node, 6), ir.DataType.INT64), 1)
    size = b.op("Max", total, places.cache)
    where = b.count(None, size)
    if places.first is not None:
        # A cache of a window keeps its size. One that is too small for the window grows until it is not.
        window = b.integers([integer(node, "local_window_size")])
        size = b.op("Where", b.op("Less", places.cache, window), size, places.cache)
        dropped = b.op("Sub", lengths, _resident(b, node, lengths, size))
        where = b.op("Add", b.count(None, size), dropped)
    new = b.op("Sub", where, places.past)
    last = b.op("Sub", b.size(value, 2), b.integers([1]))
    old = where if places.first is None else b.op("Sub", where, places.first)
    source = b.op("Where", b.op("Less", new, b.integers([0])), old, b.op("Add", new, places.cache))
    # What is past a row's end may hold anything.
    rows = b.op("Concat", b.op("Shape", value, start=0, end=2), size, b.integers([1]), axis=0)
    index = b.op("Expand", b.unsqueeze(b.op("Min", source, last), 1, 3), rows)
    return b.op("GatherND", value, index, batch_dims=2)
