"""What is done to a graph of another exporter before anything else, and what kinds of it cannot be a hooked file."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.errors import ModelFileError
from graphlens.surgery.adoptable import STILL
from graphlens.surgery.anatomy import subgraphs
from graphlens.surgery.graph import drop_unused
from graphlens.surgery.match.records import Ports

_RANDOM = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def prepare(model: ir.Model) -> None:
    """Makes a graph's weights initializers of the main graph, and leaves out what no output needs, in place.

    Args:
        model: The model as it was read.
    """
    if model.functions:
        common_passes.InlinePass()(model)
    common_passes.LiftConstantsToInitializersPass()(model)
    for node in model.graph:
        for graph in subgraphs(node):
            _into_memory(graph)
    drop_unused(model)


def _into_memory(graph: ir.Graph) -> None:
    """Reads the weights of a branch that lie in files: branches are small, and have none of a file of ours."""
    for value in graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy(), name=value.name)
    for node in graph:
        for inner in subgraphs(node):
            _into_memory(inner)


def ensure_repeats(model: ir.Model, original: Path) -> None:
    """Refuses a graph that draws random numbers: hook points would hold other activations every time.

    Args:
        model: The graph.
        original: The file, for errors.

    Raises:
        ModelFileError: It was exported in training mode, with dropout, or draws random numbers otherwise.
    """
    for node in model.graph:
        if node.op_type in _RANDOM or (node.op_type == "Dropout" and _drops(node)):
            raise ModelFileError(
                f"{original}: its node {node.name!r} ({node.op_type}) draws random numbers: it was exported in training mode, so "
                f"no two runs are alike. Export it in evaluation mode (model.eval()). {STILL}"
            )


def _drops(node: ir.Node) -> bool:
    """True for a Dropout that is not known to be switched off."""
    mode = node.inputs[2] if len(node.inputs) > 2 else None
    if mode is None:
        return False
    tensor = mode.const_value
    return tensor is None or bool(tensor.numpy().any())


def ensure_dynamic(model: ir.Model, ports: Ports, original: Path) -> None:
    """Refuses a graph that runs on one size of input only, or that ends neither in logits nor in hidden states.

    Args:
        model: The graph.
        ports: What its inputs and outputs are.
        original: The file, for errors.

    Raises:
        ModelFileError: It does.
    """
    tokens = next(value for value in model.graph.inputs if value.name == ports.input)
    free = 2 if tokens.shape is not None and len(tokens.shape) == 2 else 1  # an image has a size of its own
    if tokens.shape is not None and any(isinstance(size, int) for size in list(tokens.shape)[:free]):
        sizes = " x ".join(str(size) for size in tokens.shape)
        raise ModelFileError(
            f"{original}: its input {tokens.name!r} is frozen to {sizes}, and hook points are read and edited at any number and "
            f"length of prompts. Export it with dynamic axes (dynamic_shapes). {STILL}"
        )
    if ports.logits is None and ports.hidden is None:
        raise ModelFileError(
            f"{original}: it gives neither logits nor the last hidden states, so what a run is for cannot be told. {STILL}"
        )
