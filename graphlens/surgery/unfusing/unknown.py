"""What is said of operators that have no rule: those that need none, and those that hide what happens inside."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.unfusing.table import name_of

_LINEAR = "is left as it is: it is a matrix product, or looks up rows, with weights that are stored in fewer bits."
_BLOCKS = "has no rule: its cache is in blocks that a table in its inputs orders."
_RAGGED = "has no rule: its rows are packed without padding."
_NO_RULE = "has no rule that writes it out, so what it computes inside has no names."
KEPT = {
    "com.microsoft::MatMulNBits": _LINEAR,
    "com.microsoft::MatMulBnb4": _LINEAR,
    "com.microsoft::MatMulFpQ4": _LINEAR,
    "com.microsoft::GatherBlockQuantized": _LINEAR,
    "com.microsoft::QuantizeLinear": "is left as it is: it turns numbers into integers.",
    "com.microsoft::DequantizeLinear": "is left as it is: it turns integers into numbers.",
    "com.microsoft::DecoderMaskedMultiHeadAttention": (
        "has no rule: it writes into a buffer that a generation loop shares with it. Export the model without that loop."
    ),
    "com.microsoft::DecoderMaskedSelfAttention": (
        "has no rule: it writes into a buffer that a generation loop shares with it. Export the model without that loop."
    ),
    "com.microsoft::MoE": "has no rule: which experts a token goes to is decided inside it.",
    "com.microsoft::QMoE": "has no rule: which experts a token goes to is decided inside it.",
    **dict.fromkeys(("com.microsoft::PagedAttention", "com.microsoft::SparseAttention"), _BLOCKS),
    **dict.fromkeys(("com.microsoft::PackedAttention", "com.microsoft::PackedMultiHeadAttention"), _RAGGED),
    "com.microsoft::LongformerAttention": "has no rule: it attends to a band and to chosen tokens.",
    "com.microsoft::DecoderAttention": "has no rule: it attends to an encoder, or to a cache, as an input says.",
    "com.microsoft::RelativePositionBias": "has no rule: it computes a T5 model's bias, and graphlens adopts no T5.",
    "com.microsoft::GatedRelativePositionBias": "has no rule: it computes the bias of models of speech.",
    "com.microsoft::SkipGroupNorm": "has no rule: it is an operator of models of images that have no attention blocks.",
    "com.microsoft::QOrderedAttention": "has no rule: its integers are in an order of one kind of processor.",
    "com.microsoft::QOrderedMatMul": "has no rule: its integers are in an order of one kind of processor.",
}
"""Operator -> why it stays as it is, as the end of a sentence that begins with its name."""


def why_kept(node: ir.Node) -> str | None:
    """Why a node without a rule stays as it is, in a sentence; None for a standard operator, of which nothing is said.

    Args:
        node: A node of an operator without a rule.
    """
    if node.domain in ("", "ai.onnx"):
        return None
    operator = name_of(node.domain, node.op_type)
    return f"{operator} {KEPT.get(operator, _NO_RULE)}"
