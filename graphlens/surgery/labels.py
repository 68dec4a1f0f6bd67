"""Labels for people who open a file in a viewer such as Netron: which node computes which hook point, and what the file is.

They are the file's alone: written with it, and left out when it is read, so that no graph in memory carries stale ones.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir

from graphlens.file import version
from graphlens.file.manifest import Manifest
from graphlens.file.names import split_name
from graphlens.file.written import PRODUCER

HOOK, LAYER = "hook", "layer"
_SINCE = 10  # the version of ONNX's format in which a node has metadata
_BEGINS = "graphlens: "


def write_labels(proto: onnx.ModelProto, manifest: Manifest) -> None:
    """Labels a graph that is about to be written, in place.

    Each node that computes a hook point gets the metadata ``hook`` (its name; several with commas) and ``layer`` (the number of
    the block, without one outside of blocks); the model gets a description and the version of graphlens, unless another
    program's are there.

    Args:
        proto: The graph. One of a format in which nodes have no metadata gets the description alone.
        manifest: What it says about itself, or what the hooked file said that it was made of.
    """
    if proto.producer_name == PRODUCER:
        proto.producer_version = version.__version__
    if not proto.doc_string or proto.doc_string.startswith(_BEGINS):
        proto.doc_string = described(manifest)
    if proto.ir_version < _SINCE:
        return
    hooks: dict[str, list[str]] = {}
    for name, entry in manifest.hooks.items():
        hooks.setdefault(entry.value, []).append(name)
    for node in proto.graph.node:
        names = [name for value in node.output for name in hooks.get(value, ())]
        layers = dict.fromkeys(layer for layer, _ in map(split_name, names) if layer is not None)
        for key, text in ((HOOK, ", ".join(names)), (LAYER, ", ".join(map(str, layers)))):
            for other in [entry for entry in node.metadata_props if entry.key == key and text]:
                node.metadata_props.remove(other)  # of the program that wrote the file which was adopted
            if text:
                entry = node.metadata_props.add()
                entry.key, entry.value = key, text


def described(manifest: Manifest) -> str:
    """What a file is, in a sentence or two."""
    config = manifest.config
    return (
        f"{_BEGINS}{manifest.source} ({config.original_architecture}), {config.n_layers} layers, {config.n_heads} heads, d_model "
        f"{config.d_model}. The node that computes a hook point of TransformerLens has its name and its layer in its metadata."
    )


def without_labels(model: ir.Model) -> ir.Model:
    """The model itself, after what ``write_labels`` wrote was taken off."""
    if (model.doc_string or "").startswith(_BEGINS):
        model.doc_string = None
    if model.producer_name == PRODUCER:
        model.producer_version = None
    for node in model.graph:
        if node.metadata_props:
            node.metadata_props.pop(HOOK, None)
            node.metadata_props.pop(LAYER, None)
    return model
