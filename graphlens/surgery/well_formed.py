"""Whether each node of a graph is one that its operator's schema allows: so many inputs and outputs, attributes of such types."""

from __future__ import annotations

from functools import lru_cache

import onnx
import onnx_ir as ir

_STANDARD = ("", "ai.onnx")


def malformed(model: ir.Model) -> str | None:
    """The first node that is none its operator allows, in a sentence; None where all are in order.

    Nodes of other domains than ONNX's own have no schema here and count as in order.

    Args:
        model: Any model.
    """
    opset = next((model.opset_imports[domain] for domain in _STANDARD if domain in model.opset_imports), None)
    for node in model.graph:
        if opset is None or node.domain not in _STANDARD or node.op_identifier() in model.functions:
            continue
        schema = _schema(node.op_type, opset)
        why = None if schema is None else _misfit(node, schema)
        if why is not None:
            return f"node {node.name!r} ({node.op_type}) {why}: the file is damaged, or no ONNX Runtime opens it."
    return None


@lru_cache(maxsize=512)
def _schema(operator: str, opset: int) -> onnx.defs.OpSchema | None:
    """An operator's schema in an opset; None where ONNX has no such operator."""
    try:
        return onnx.defs.get_schema(operator, opset, "")
    except onnx.defs.SchemaError:
        return None


def _misfit(node: ir.Node, schema: onnx.defs.OpSchema) -> str | None:
    """What a node has that its operator does not allow, or lacks."""
    inputs, outputs = len(node.inputs), len(node.outputs)
    if not schema.min_input <= inputs <= schema.max_input:
        return f"has {inputs} inputs, and the operator takes {_range(schema.min_input, schema.max_input)}"
    if not schema.min_output <= outputs <= schema.max_output:
        return f"has {outputs} outputs, and the operator gives {_range(schema.min_output, schema.max_output)}"
    single = onnx.defs.OpSchema.FormalParameterOption.Single
    if any(
        given is None and formal.option == single for given, formal in zip(node.inputs, schema.inputs, strict=False)
    ):
        return "lacks an input that the operator needs"
    for name, attribute in node.attributes.items():
        known = schema.attributes.get(name)
        if known is None:
            return f"has an attribute {name!r}, which the operator does not have"
        wanted = str(known.type).rpartition(".")[2]
        if attribute.type.name != wanted and not attribute.is_ref():
            return f"has an attribute {name!r} of the type {attribute.type.name}, and the operator's is {wanted}"
    lost = [name for name, known in schema.attributes.items() if known.required and name not in node.attributes]
    if lost:
        return f"lacks the attribute {lost[0]!r}"
    if node.op_type == "Transpose" and "perm" in node.attributes:
        order = list(node.attributes["perm"].as_ints())
        if sorted(order) != list(range(len(order))):
            return f"has the order of axes {order[:8]}, which is none"
    return None


def _range(least: int, most: int) -> str:
    """How many there may be, in words."""
    if least == most:
        return str(least)
    return f"{least} or more" if most >= 2**31 - 1 else f"{least} to {most}"
