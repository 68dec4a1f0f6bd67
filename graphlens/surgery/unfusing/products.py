"""How matrix products with a transposition, a factor, a bias or an activation inside are written out."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.graph import Attribute
from graphlens.surgery.unfusing.building import Builder, Kept, given, integer, real, refuse, taken
from graphlens.surgery.unfusing.kinds import rank_of
from graphlens.surgery.unfusing.table import SCHEMA, rule


def _rank(value: ir.Value) -> int:
    rank = rank_of(value)
    if rank is None:
        raise Kept(f"is left as it is where the number of axes of {value.name!r} is not known.")
    return rank


def _operand(b: Builder, node: ir.Node, place: int, side: str) -> ir.Value:
    """A side of a product with its axes in order."""
    value = taken(node, place)
    batch, last = bool(integer(node, f"transBatch{side}")), bool(integer(node, f"trans{side}"))
    if not batch and not last:
        return value
    order = list(range(_rank(value)))
    if len(order) < 2:
        return value
    if batch:  # the first axis comes before the last
        order = [*order[1:-1], 0, order[-1]]
    if last:
        order = [*order[:-2], order[-1], order[-2]]
    return b.transpose(value, *order)


@rule(
    "com.microsoft::FusedMatMul",
    "com.microsoft::TransposeMatMul",
    variants="either side transposed, batch axes moved, alpha",
)
def _product(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    found = b.op("MatMul", _operand(b, node, 0, "A"), _operand(b, node, 1, "B"))
    alpha = real(node, "alpha", 1.0)
    return [found if alpha == 1 else b.op("Mul", found, b.number(alpha, found))]


# Activation -> the names of its operator's attributes, in the order of activation_alpha, activation_beta.
_ACTIVATIONS = {
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "LeakyRelu": ("alpha",),
    "Relu": (),
    "Selu": ("alpha", "gamma"),
    "Sigmoid": (),
    "Softplus": (),
    "Softsign": (),
    "Tanh": (),
    "ThresholdedRelu": ("alpha",),
}


@rule(
    "com.microsoft::FusedGemm", variants="each activation that Gemm is fused with, alpha, beta, either side transposed"
)
def _gemm(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    attributes: dict[str, Attribute] = {name: real(node, name, 1.0) for name in ("alpha", "beta")}
    attributes |= {name: integer(node, name) for name in ("transA", "transB")}
    found = b.op("Gemm", taken(node, 0), taken(node, 1), given(node, 2), **attributes)
    activation = node.attributes["activation"].as_string() if "activation" in node.attributes else ""
    if not activation:
        return [found]
    refuse(node, f"the activation {activation}", activation not in _ACTIVATIONS)
    names = _ACTIVATIONS[activation]
    set_to = {name: real(node, f"activation_{name}") for name in names if f"activation_{name}" in node.attributes}
    return [b.op(activation, found, **set_to)]


@rule("com.microsoft::GemmFastGelu", variants="with and without bias", checked=SCHEMA)
def _product_gelu(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    found, bias = b.op("MatMul", taken(node, 0), taken(node, 1)), given(node, 2)
    return [b.op("Gelu", found if bias is None else b.op("Add", found, bias), approximate="tanh")]


@rule("com.microsoft::BiasAdd", variants="all", checked=SCHEMA)
def _bias_add(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    return [b.op("Add", b.op("Add", taken(node, 0), taken(node, 1)), taken(node, 2))]


@rule("com.microsoft::BiasSoftmax", variants="over the last axis, a bias of as many axes", checked=SCHEMA)
def _bias_softmax(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    x, bias = taken(node, 0), taken(node, 1)
    rank = _rank(x)
    refuse(node, "a Softmax over several axes", integer(node, "axis", 1) % rank != rank - 1)
    refuse(node, "a bias of other axes", _rank(bias) != rank and bool(integer(node, "is_inner_broadcast")))
    return [b.op("Softmax", b.op("Add", x, bias), axis=-1)]
