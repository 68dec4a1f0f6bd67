"""The element types and sizes of values: what is known of them, and the content of small constants."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir

Size = int | str | None
"""A size: a number, the name of one that a run decides, or not known."""
Sizes = tuple[Size, ...]

MICROSOFT = "com.microsoft"


def dtype_of(value: ir.Value | None) -> ir.DataType | None:
    """The element type of a value; None if not known."""
    if value is None:
        return None
    if value.type is not None:
        return value.type.dtype
    return None if value.const_value is None else value.const_value.dtype


def sizes_of(value: ir.Value | None) -> Sizes | None:
    """The sizes of a value; None if not even their number is known."""
    if value is None:
        return None
    shape = value.shape
    if shape is None and value.const_value is not None:
        shape = ir.Shape(value.const_value.shape.numpy())
    if shape is None:
        return None
    return tuple(size if isinstance(size, int) else size.value for size in shape)


def rank_of(value: ir.Value | None) -> int | None:
    """How many axes a value has; None if not known."""
    sizes = sizes_of(value)
    return None if sizes is None else len(sizes)


def last_size(value: ir.Value | None) -> int | None:
    """The size of a value's last axis; None where only a run knows it."""
    sizes = sizes_of(value)
    return sizes[-1] if sizes and isinstance(sizes[-1], int) else None


def numbers_of(value: ir.Value | None) -> list[int] | None:
    """The content of a small integer constant; None for anything else."""
    tensor = None if value is None else constant_of(value)
    if tensor is None or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32) or tensor.size > 64:
        return None
    return [int(number) for number in tensor.numpy().reshape(-1)]


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """The content of an initializer that no run may replace, or of a Constant node."""
    if value.const_value is not None and not value.is_graph_input():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    attributes = node.attributes
    if "value" in attributes:
        return cast(
            "ir.TensorProtocol", attributes["value"].value
        )  # as_tensor asks whether it is one, which takes long
    if "value_int" in attributes:
        return ir.tensor(attributes["value_int"].as_int(), ir.DataType.INT64)
    if "value_ints" in attributes:
        return ir.tensor(list(attributes["value_ints"].as_ints()), ir.DataType.INT64)
    if "value_float" in attributes:
        return ir.tensor(attributes["value_float"].as_float(), ir.DataType.FLOAT)
    if "value_floats" in attributes:
        return ir.tensor(list(attributes["value_floats"].as_floats()), ir.DataType.FLOAT)
    return None
