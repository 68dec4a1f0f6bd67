"""Which operators a model file may contain: one table, by who wrote the file, and why the best known others may not."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

FileKind = Literal["exported", "edited", "adopted"]

# What this package writes: the export, surgery, gates, gradients, baking, processing, lower precision, KV caches.
_EXPORTED = """
    Abs Add And Cast Clip Concat Constant ConstantOfShape Cos CumSum Div Equal Erf Exp Expand Gather GatherElements
    GatherND Gelu Gemm Greater GreaterOrEqual Identity If IsInf IsNaN Less LessOrEqual Log MatMul Max Min Mod Mul Neg
    Not OneHot Or Pow Range Reciprocal ReduceMax ReduceMean ReduceSum Relu Reshape ScatterElements Shape Sigmoid Sign
    Sin Size Slice Softmax Split Sqrt Squeeze Sub Tanh TopK Transpose Unsqueeze Where
"""
# What a user may put in besides with onnx-graphsurgeon or surgery: standard operators on tensors of numbers whose output
# is no larger than their inputs, their attributes or their constants say. None that repeats a part of the graph, holds
# sequences, optional values or text, looks things up in tables of its own, or reads files.
_ADDED_BY_USERS = """
    Acos Acosh ArgMax ArgMin Asin Asinh Atan Atanh Attention BatchNormalization Bernoulli BitShift BitwiseAnd
    BitwiseNot BitwiseOr BitwiseXor CastLike Ceil Celu Compress Cosh DequantizeLinear Det Dropout DynamicQuantizeLinear
    Einsum Elu EyeLike Flatten Floor GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization
    LayerNormalization LeakyRelu LogSoftmax LpNormalization MatMulInteger Mean MeanVarianceNormalization Mish NonZero
    PRelu Pad QuantizeLinear RMSNormalization RandomNormalLike RandomUniformLike ReduceL1 ReduceL2 ReduceLogSum
    ReduceLogSumExp ReduceMin ReduceProd ReduceSumSquare ReverseSequence RotaryEmbedding Round ScatterND Selu Shrink
    Sinh Softplus Softsign Sum Swish Tan TensorScatter ThresholdedRelu Tile Trilu Unique Xor
"""
# What an adopted file may contain besides, in which fused operators were written out: convolutions of image patches, and
# products, rows and numbers that are stored in fewer bits; gradients bring the convolutions' transpose. Their output is as
# large as their inputs and attributes say.
_LEFT = """
    Conv ConvInteger ConvTranspose GlobalAveragePool com.microsoft::DequantizeLinear com.microsoft::GatherBlockQuantized
    com.microsoft::MatMulBnb4 com.microsoft::MatMulFpQ4 com.microsoft::MatMulNBits com.microsoft::QuantizeLinear
"""
# Fused operators that can be written out, and stay where a user asks for that: those of unfuse's table. What has no rule
# there (experts, ragged batches, buffers of a generation loop) is not among them.
_FUSED = """
    QLinearConv QLinearMatMul SimplifiedLayerNormalization com.microsoft::Attention com.microsoft::BiasAdd
    com.microsoft::BiasGelu com.microsoft::BiasSoftmax com.microsoft::DynamicQuantizeMatMul
    com.microsoft::EmbedLayerNormalization com.microsoft::FastGelu com.microsoft::FusedConv com.microsoft::FusedGemm
    com.microsoft::FusedMatMul com.microsoft::Gelu com.microsoft::GemmFastGelu com.microsoft::GemmaRotaryEmbedding
    com.microsoft::GroupQueryAttention com.microsoft::MatMulIntegerToFloat com.microsoft::MultiHeadAttention
    com.microsoft::QAttention com.microsoft::QGemm com.microsoft::QLinearAdd com.microsoft::QLinearConcat
    com.microsoft::QLinearGlobalAveragePool com.microsoft::QLinearLeakyRelu com.microsoft::QLinearMul
    com.microsoft::QLinearReduceMean com.microsoft::QLinearSigmoid com.microsoft::QLinearSoftmax
    com.microsoft::QLinearWhere com.microsoft::QuickGelu com.microsoft::RotaryEmbedding
    com.microsoft::SkipLayerNormalization com.microsoft::SkipSimplifiedLayerNormalization
    com.microsoft::TransposeMatMul
"""
# Kind of file -> the operators that it may contain; those of ONNX Runtime's own domain have it in front.
OPERATORS: Mapping[FileKind, frozenset[str]] = MappingProxyType(
    {
        "exported": frozenset(_EXPORTED.split()),
        "edited": frozenset(f"{_EXPORTED} {_ADDED_BY_USERS}".split()),
        "adopted": frozenset(f"{_EXPORTED} {_ADDED_BY_USERS} {_LEFT} {_FUSED}".split()),
    }
)

_REPEATS = "which runs a part of the graph as often as its data say"
_REFUSED = {
    "EPContext": "which loads compiled foreign code",
    "Loop": _REPEATS,
    "Scan": _REPEATS,
    "SequenceMap": _REPEATS,
    "TfIdfVectorizer": "whose output is as large as a number in it says",
}
_STANDARD = frozenset({"", "ai.onnx"})


def is_allowed(domain: str, op_type: str, kind: FileKind) -> bool:
    """True if a file of a kind may contain an operator.

    Args:
        domain: The operator's domain; "" and "ai.onnx" are ONNX's own.
        op_type: The operator's name.
        kind: Who wrote the file.
    """
    return (op_type if domain in _STANDARD else f"{domain}::{op_type}") in OPERATORS[kind]


def is_reserved(domain: str) -> bool:
    """True for a domain whose operators are ONNX's or ONNX Runtime's: no function of a file may take such a name.

    Args:
        domain: A function's domain.
    """
    return domain in _STANDARD or domain.startswith(("ai.onnx.", "com.microsoft", "com.ms.", "org.pytorch"))


def why_not(domain: str, op_type: str) -> str:
    """Why an operator is not allowed, as the end of a sentence about a node.

    Args:
        domain: The operator's domain.
        op_type: The operator's name.
    """
    if op_type in _REFUSED:
        return f"uses the operator {op_type}, {_REFUSED[op_type]}. graphlens refuses to open such files."
    if domain in _STANDARD:
        return (
            f"uses the operator {op_type}, which is not among those that graphlens opens files with: tensor operators whose "
            "work and output are bounded. Write it with other operators, or run the file with ONNX Runtime itself."
        )
    return (
        f"needs the operator {domain}::{op_type}. graphlens opens files with standard operators only and never registers "
        "a custom operator library for a model."
    )
