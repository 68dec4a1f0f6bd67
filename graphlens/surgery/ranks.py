"""What a graph from elsewhere does not tell of its values and differentiating needs: their types, and how many axes they have."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.surgery.sizes import Sizes

_UNBOUNDED = 1 << 80  # bytes: memory was looked at when the file was opened
# Operators that are not ONNX's, so that its inference stops there -> the input whose type their result has.
_FOREIGN = {"MatMulNBits": 0, "GatherBlockQuantized": 2}


def fill_in(model: ir.Model) -> None:
    """Gives the values of a graph the types and shapes that it leaves out, as far as they can be told, in place.

    What ONNX's own inference cannot follow, a shape that is computed or an operator that is not ONNX's, gets the number of
    its axes from a walk through the graph with sizes made up. A size that is not known has no name then.

    Args:
        model: A model.
    """
    if _is_complete(model):
        return
    known = Sizes(model, Path("this graph"), _UNBOUNDED).known
    _infer(model)
    foreign = [node for node in model.graph if node.op_type in _FOREIGN and node.outputs[0].type is None]
    for node in foreign:
        source = node.inputs[_FOREIGN[node.op_type]]
        kind = None if source is None else source.dtype
        node.outputs[0].type = None if kind is None else ir.TensorType(kind)
        if kind is None:  # what computes it comes after another such node
            weights = [each.dtype for each in node.inputs if each is not None and each.dtype is not None]
            floats = [each for each in weights if each.is_floating_point()]
            node.outputs[0].type = ir.TensorType(floats[0]) if floats else None
        shape = known[node.outputs[0]].shape
        node.outputs[0].shape = None if shape is None else ir.Shape([None] * len(shape))
    if foreign:
        _infer(model)
    for node in model.graph:
        for value in node.outputs:
            shape = known[value].shape if value in known else None
            if value.shape is None and shape is not None:
                value.shape = ir.Shape([None] * len(shape))


def _infer(model: ir.Model) -> None:
    # It reads no weights, and asks for no more than their shapes.
    common_passes.ShapeInferencePass(check_type=False, strict_mode=False)(model)


def _is_complete(model: ir.Model) -> bool:
    """True if every value that a node computes and something reads has a type and a shape."""
    return all(
        value.shape is not None and value.type is not None
        for node in model.graph
        for value in node.outputs
        if value.uses() or value.is_graph_output()
    )
