"""The door to onnx-graphsurgeon: edit a hooked graph as a ``gs.Graph`` and come back with hooks and weights intact.

GraphSurgeon drops a model's metadata, forgets that an initializer can also be an input, and reorders nodes; what it
drops is put back from the model the graph came from. Weights are never loaded: their references pass through.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

import onnx_ir as ir

from graphlens.errors import RuntimeUnavailable
from graphlens.file.stored import in_files
from graphlens.surgery.graph import ensure_hooks_resolve

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs


def _graphsurgeon() -> ModuleType:
    """The package, where it is installed."""
    try:
        return importlib.import_module("onnx_graphsurgeon")
    except ImportError as error:
        raise RuntimeUnavailable(
            "onnx-graphsurgeon is not installed: pip install 'graphlens-onnx[graphsurgeon]'."
        ) from error


def to_graphsurgeon(model: ir.Model) -> gs.Graph:
    """A model as an ``onnx_graphsurgeon.Graph``, to edit there.

    Args:
        model: A hooked model.

    Returns:
        The graph. Its large weights stay references into their files.

    Raises:
        RuntimeUnavailable: onnx-graphsurgeon is not installed.
    """
    return _graphsurgeon().import_onnx(ir.to_proto(model))


def from_graphsurgeon(graph: gs.Graph, like: ir.Model) -> ir.Model:
    """A hooked model from a graph that was edited with onnx-graphsurgeon.

    Args:
        graph: What ``to_graphsurgeon(like)`` gave, edited.
        like: The model that it came from. The manifest, the optional inputs and the place of the weights are its.

    Returns:
        The hooked model.

    Raises:
        ModelFileError: The edit lost a hook point's value.
        RuntimeUnavailable: onnx-graphsurgeon is not installed.
    """
    proto = _graphsurgeon().export_onnx(graph)
    model = ir.from_proto(proto)
    model.ir_version = like.ir_version
    model.producer_name, model.producer_version = like.producer_name, like.producer_version
    model.metadata_props.update(like.metadata_props)
    folders = {str(tensor.location): tensor.base_dir for _, tensor in in_files(like)}
    inputs = {value.name for value in model.graph.inputs}
    optional = {v.name: v for v in like.graph.inputs if v.name in like.graph.initializers}
    for _, tensor in in_files(model):
        tensor.base_dir = folders.get(str(tensor.location), tensor.base_dir)
    for value in model.graph.initializers.values():
        if value.name in optional and value.name not in inputs:
            value.shape = optional[value.name].shape
            model.graph.inputs.append(value)
    model.graph.sort()
    return ensure_hooks_resolve(model)
