"""How activation functions with a bias or a name of their own are written as standard ones."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.unfusing.building import Builder, given, real, taken
from graphlens.surgery.unfusing.table import rule


@rule("com.microsoft::FastGelu", variants="with and without bias")
def _fast_gelu(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    x, bias = taken(node, 0), given(node, 1)
    return [b.op("Gelu", x if bias is None else b.op("Add", x, bias), approximate="tanh")]


@rule("com.microsoft::BiasGelu", variants="all")
def _bias_gelu(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    return [b.op("Gelu", b.op("Add", taken(node, 0), taken(node, 1)))]


@rule("com.microsoft::Gelu", variants="all")
def _gelu(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    return [b.op("Gelu", taken(node, 0))]


@rule("com.microsoft::QuickGelu", variants="any alpha")
def _quick_gelu(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    x, alpha = taken(node, 0), real(node, "alpha", 1.702)
    slope = x if alpha == 1 else b.op("Mul", x, b.number(alpha, x))
    return [b.op("Mul", x, b.op("Sigmoid", slope))]
