"""Knows how convolutions are written out whose channels ONNX Runtime put into blocks (NCHWc), or that have a sum inside."""

from __future__ import annotations

import onnx_ir as ir

from graphlens.surgery.graph import Attribute
from graphlens.surgery.unfusing.building import Builder, Kept, given, integer, refuse, taken
from graphlens.surgery.unfusing.kinds import sizes_of
from graphlens.surgery.unfusing.table import rule

BLOCKED = "com.microsoft.nchwc"
BLOCKS = (8, 16)  # channels that ONNX Runtime takes at once, by the processor
_WINDOWS = ("dilations", "kernel_shape", "pads", "strides")
# Activation -> the names of its operator's attributes, in the order of activation_params.
_ACTIVATIONS = {"HardSigmoid": ("alpha", "beta"), "LeakyRelu": ("alpha",), "Relu": (), "Sigmoid": (), "Tanh": ()}


def window(node: ir.Node) -> dict[str, Attribute]:
    """What a convolution says of its window, its groups included.

    Args:
        node: A convolution of any kind.
    """
    found: dict[str, Attribute] = {
        name: list(node.attributes[name].as_ints()) for name in _WINDOWS if name in node.attributes
    }
    if "auto_pad" in node.attributes:
        found["auto_pad"] = node.attributes["auto_pad"].as_string()
    return found | {"group": integer(node, "group", 1)}


def _activated(b: Builder, node: ir.Node, x: ir.Value) -> ir.Value:
    """The activation function that a convolution has inside."""
    name = node.attributes["activation"].as_string() if "activation" in node.attributes else ""
    if not name:
        return x
    numbers = list(node.attributes["activation_params"].as_floats()) if "activation_params" in node.attributes else []
    if name == "Clip" and len(numbers) == 2:
        return b.op("Clip", x, b.number(numbers[0], x), b.number(numbers[1], x))
    refuse(node, f"the activation {name}", name not in _ACTIVATIONS)
    return b.op(name, x, **dict(zip(_ACTIVATIONS[name], numbers, strict=False)))


@rule("com.microsoft::FusedConv", variants="each activation that Conv is fused with, a sum, bias, groups")
def _fused(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    found = b.op("Conv", taken(node, 0), taken(node, 1), given(node, 2), **window(node))
    added = given(node, 3)
    return [_activated(b, node, found if added is None else b.op("Add", found, added))]


@rule(
    "com.microsoft.nchwc::Conv",
    variants="of an image whose channels are in no blocks yet, with its result put in order next",
)
def _of_blocks(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    readers = {reader for reader, _ in node.outputs[0].uses()}
    counts = {integer(reader, "channels") for reader in readers}
    orders = all(reader.op_type == "ReorderOutput" for reader in readers) and not node.outputs[0].is_graph_output()
    refuse(node, "a result that other nodes read in blocks of channels", not orders or len(counts) != 1)
    refuse(node, "several groups", integer(node, "group", 1) != 1)
    refuse(node, "a sum inside", given(node, 3) is not None)
    weight, channels = taken(node, 1), counts.pop()
    sizes = sizes_of(weight)
    if sizes is None or not all(isinstance(size, int) for size in sizes) or len(sizes) != 4:
        raise Kept(f"is left as it is where the sizes of its weights {weight.name!r} are not known.")
    whole, inner, height, width = (int(str(size)) for size in sizes)
    pixels = sizes_of(taken(node, 0))
    refuse(node, "an image whose channels are in blocks", pixels is None or pixels[1] not in (inner, None))
    block = _block(b, node, whole, channels)
    # [blocks, inner, height, width, block] -> [channels, inner, height, width]
    weight = b.reshape(weight, whole // block, inner, height, width, block)
    weight = b.reshape(b.transpose(weight, 0, 4, 1, 2, 3), whole, inner, height, width)
    bias = given(node, 2)
    if channels != whole:
        weight, bias = _first(b, weight, channels), None if bias is None else _first(b, bias, channels)
    return [_activated(b, node, b.op("Conv", taken(node, 0), weight, bias, **window(node)))]


def _block(b: Builder, node: ir.Node, whole: int, channels: int) -> int:
    """How many channels a block has: what their number tells, or else what the caller knows."""
    fitting = [block for block in BLOCKS if -(-channels // block) * block == whole]
    if len(fitting) == 1:
        return fitting[0]
    if b.shop.block not in fitting:
        raise Kept(
            f"is left as it is where nothing tells how many channels a block has ({node.name!r}): its file was optimised for "
            "one kind of processor."
        )
    return b.shop.block


def _first(b: Builder, value: ir.Value, count: int) -> ir.Value:
    """The first rows of a value."""
    return b.op("Slice", value, b.integers([0]), b.integers([count]), b.integers([0]))


@rule("com.microsoft.nchwc::ReorderOutput", variants="behind a convolution that is expanded")
def _ordered(b: Builder, node: ir.Node) -> list[ir.Value | None]:
    x = taken(node, 0)
    maker = x.producer()
    refuse(node, "channels in blocks", maker is None or maker.domain not in ("", "ai.onnx"))
    return [b.transpose(x, 0, 2, 3, 1) if integer(node, "channels_last") else b.op("Identity", x)]
