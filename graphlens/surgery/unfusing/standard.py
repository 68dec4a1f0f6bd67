"""How the standard Attention operator of opset 23 and later is written out."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.unfusing.building import HALVES, Builder, given, integer, real, refuse, taken, wanted
from graphlens.surgery.unfusing.kinds import Size, dtype_of, rank_of, sizes_of
from graphlens.surgery.unfusing.scores import Scoring, attend, both, causal, joined_heads, repeated, split_heads
from graphlens.surgery.unfusing.table import rule


@rule(
    "Attention",
    variants="[b, s, h d] and [b, h, s, d], grouped keys, is_causal, softcap, scale, past, masks of booleans and numbers, "
    "lengths of keys, each qk_matmul_output_mode, softmax in 32 bits",
)
def _attention(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    parts, heads, groups = _parts(b, node)
    q, k, v = parts
    flat = rank_of(taken(node, 0)) == 3
    past_k, past_v = given(node, 4), given(node, 5)
    length = None
    if past_k is not None and past_v is not None:
        length = b.size(past_k, 2)
        k, v = b.op("Concat", past_k, k, axis=2), b.op("Concat", past_v, v, axis=2)
    total = b.size(k, 2)
    mask = given(node, 3)
    is_boolean = mask is not None and dtype_of(mask) == ir.DataType.BOOL
    allowed = mask if is_boolean else None
    ends = given(node, 6)
    if integer(node, "is_causal") and ends is None:
        allowed = both(b, causal(b, b.size(q, 2), total, length), allowed)
    if ends is not None:
        allowed = both(b, allowed, _before(b, node, ends, b.size(q, 2), total))
    wide = integer(node, "softmax_precision") == ir.DataType.FLOAT and b.dtype(q) in HALVES
    scoring = Scoring(
        real(node, "scale") or None,
        max(real(node, "softcap"), 0.0),
        () if mask is None or is_boolean else (mask,),
        allowed,
        empty=mask is not None or ends is not None,
        wide=wide,
    )
    times = 1 if heads is None or groups is None else heads // groups
    found = attend(b, q, repeated(b, k, times), repeated(b, v, times), scoring)
    shown = None
    if wanted(node, 3):
        mode = integer(node, "qk_matmul_output_mode")
        refuse(node, f"the qk_matmul_output_mode {mode}", not 0 <= mode <= 3)
        shown = b.cast((found.products, found.capped, found.scores, found.pattern)[mode], b.dtype(q))
    present = [value if wanted(node, place) else None for place, value in ((1, k), (2, v))]
    return [joined_heads(b, found.z) if flat else found.z, *present, shown]


def _parts(b: Builder, node: ir.Node) -> tuple[list[ir.Value], int | None, int | None]:
    """Queries, keys and values [b, heads, s, d], and how many heads queries and keys have."""
    q, k, v = (taken(node, place) for place in range(3))
    rank = rank_of(q)
    refuse(node, f"queries {q.name!r} with an unknown number of axes", rank not in (3, 4))
    heads, groups = integer(node, "q_num_heads"), integer(node, "kv_num_heads")
    if rank == 3:
        refuse(node, "no number of heads", not heads or not groups)
        return [split_heads(b, part, count) for part, count in ((q, heads), (k, groups), (v, groups))], heads, groups
    of_q, of_k = _heads(q) or heads or None, _heads(k) or groups or None
    refuse(
        node, "an unknown number of heads", (not isinstance(of_q, int) or not isinstance(of_k, int)) and of_q != of_k
    )
    if not isinstance(of_q, int) or not isinstance(of_k, int):
        refuse(node, "an unknown number of heads", of_q is None)
        return [q, k, v], None, None
    return [q, k, v], of_q, of_k


def _heads(value: ir.Value) -> Size:
    sizes = sizes_of(value)
    return None if sizes is None or len(sizes) < 2 else sizes[1]


def _before(b: Builder, node: ir.Node, ends: ir.Value, queries: ir.Value, total: ir.Value) -> ir.Value:
    """Which keys are there, by the lengths of rows [b]; if causal, the last query is the last of them. Bool [b, 1, s, t]."""
    keys, ends = b.count(None, total), b.reshape(b.cast(ends, ir.DataType.INT64), -1, 1, 1, 1)
    within = b.op("Less", keys, ends)
    if not integer(node, "is_causal"):
        return within
    places = b.op("Add", b.op("Sub", ends, queries), b.unsqueeze(b.count(None, queries), 1))
    return b.op("And", within, b.op("LessOrEqual", keys, places))
