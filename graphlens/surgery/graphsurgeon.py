"""The door to onnx-graphsurgeon: edit a hooked graph as a ``gs.Graph`` and come back with hooks and weights intact.

GraphSurgeon drops a model's metadata, forgets that an initializer can also be an input, and reorders nodes; what it
drops is put back from the model the graph came from. Weights are never loaded: their references pass through.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir

from graphlens.errors import RuntimeUnavailable
from graphlens.surgery.graph import ensure_hooks_resolve


def _graphsurgeon() -> Any:
    try:
        import onnx_graphsurgeon
    except ImportError as error:
        raise RuntimeUnavailable(
            "onnx-graphsurgeon is not installed: pip install 'graphlens-onnx[graphsurgeon]'."
        ) from error
    return onnx_graphsurgeon


def to_graphsurgeon(model: ir.Model) -> Any:
    """The model as an ``onnx_graphsurgeon.Graph``; its large weights stay references into their files.

    Raises RuntimeUnavailable when onnx-graphsurgeon is not installed.
    """
    return _graphsurgeon().import_onnx(ir.to_proto(model))


def from_graphsurgeon(graph: Any, like: ir.Model) -> ir.Model:
    """A hooked model from an edited ``gs.Graph`` that ``to_graphsurgeon(like)`` gave.

    The manifest, the optional inputs and the place of the weights come from ``like``. Raises ModelFileError when the
    edit lost a hook point's value, RuntimeUnavailable when onnx-graphsurgeon is not installed.
    """
    proto = _graphsurgeon().export_onnx(graph)
    model = ir.from_proto(proto)
    model.ir_version = like.ir_version
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    model.metadata_props.update(like.metadata_props)
    folders = {
        str(value.const_value.location): value.const_value.base_dir
        for value in like.graph.initializers.values()
        if isinstance(value.const_value, ir.ExternalTensor)
    }
    inputs = {value.name for value in model.graph.inputs}
    optional = {v.name: v for v in like.graph.inputs if v.name in like.graph.initializers}
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and str(tensor.location) in folders:
            tensor.base_dir = folders[str(tensor.location)]
        if value.name in optional and value.name not in inputs:
            value.shape = optional[value.name].shape
            model.graph.inputs.append(value)
    model.graph.sort()
    return ensure_hooks_resolve(model)
