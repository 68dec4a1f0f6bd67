"""How the embedding layer of BERT-like models is written out."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.unfusing.building import Builder, given, integer, real, taken, wanted
from graphlens.surgery.unfusing.norms import normalised
from graphlens.surgery.unfusing.table import rule


@rule(
    "com.microsoft::EmbedLayerNormalization",
    variants="with and without segments, mask and positions; the mask's index and the sum as outputs",
)
def _embed(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    tokens, segments, words = taken(node, 0), given(node, 1), taken(node, 2)
    table, types = taken(node, 3), given(node, 4)
    mask, positions = given(node, 7), given(node, 8)
    if positions is None:
        positions = b.unsqueeze(b.count(None, b.size(tokens, 1)), 0)
    total = b.op("Add", b.op("Gather", words, tokens, axis=0), b.op("Gather", table, positions, axis=0))
    if segments is not None and types is not None:
        total = b.op("Add", total, b.op("Gather", types, segments, axis=0))
    found, _, _ = normalised(b, total, taken(node, 5), taken(node, 6), real(node, "epsilon", 1e-12), False)
    index = None
    if wanted(node, 1):
        index = _lengths(b, tokens, mask if integer(node, "mask_index_type", 1) else None)
    return [found, index, total if wanted(node, 2) else None]


def _lengths(b: Builder, tokens: ir.Value, mask: ir.Value | None) -> ir.Value:
    """How many tokens of each row the mask leaves, int32 [b]; zeros without a mask."""
    if mask is not None:
        return b.op("ReduceSum", b.cast(mask, ir.DataType.INT32), b.integers([1]), keepdims=0)
    zeros = ir.tensor([0], ir.DataType.INT32)
    return b.op("Expand", b.constant(zeros.numpy()), b.size(tokens, 0))
