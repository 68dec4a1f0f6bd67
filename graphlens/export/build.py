"""From a traced graph with marked hook points to the hooked graph: optimised, named, bound to the weights files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript import optimizer

from graphlens.errors import ExportError
from graphlens.export.alone import alone
from graphlens.export.decoder import MODEL_PREFIX
from graphlens.export.operations import FORK_OP, HOOK_DOMAIN, HOOK_OP
from graphlens.file.firing import graph_order
from graphlens.file.io_names import LOGITS
from graphlens.file.manifest import HookEntry
from graphlens.file.names import axes_of
from graphlens.file.stored import bind

if TYPE_CHECKING:
    from graphlens.file.safetensors import TensorEntry

IR_VERSION = 10
# ONNX's names of dtypes that NumPy calls otherwise.
_NUMPY_NAMES = {"float": "float32", "double": "float64"}


@alone
def optimise(model: ir.Model) -> None:
    """Simplifies a traced graph in place, and names its weights as the parameters are.

    Args:
        model: A traced graph whose weights hold no data.
    """
    # The weights become graph inputs meanwhile: the optimiser then neither folds them, nor reads them, nor merges two
    # that happen to be equal (which would tie layers together for good).
    graph = model.graph
    weights = [value for value in graph.initializers.values() if value.const_value is None]
    for weight in weights:
        del graph.initializers[str(weight.name)]
        graph.inputs.append(weight)
    optimizer.optimize_ir(model, num_iterations=4)
    _drop_idle_reshapes(model)
    for weight in weights:
        graph.inputs.remove(weight)
    for weight in weights:
        weight.name = str(weight.name).removeprefix(MODEL_PREFIX)
        if weight.uses():
            graph.initializers[weight.name] = weight


def _drop_idle_reshapes(model: ir.Model) -> None:
    """Removes reshapes to the shape that a value has already, in place."""
    # transformers reshapes input_ids so, by a shape that it reads elsewhere: embedding tokens would then need the mask.
    for node in list(model.graph):
        if node.op_type != "Reshape" or node.domain != "":
            continue
        before, after = node.inputs[0], node.outputs[0]
        if before is None or before.shape is None or after.shape is None or after.is_graph_output():
            continue
        known = all(isinstance(size, int) or size.value is not None for size in before.shape)
        if known and before.shape == after.shape:
            after.replace_all_uses_with(before)
            model.graph.remove(node, safe=True)


def name_hook_points(model: ir.Model, n_layers: int) -> dict[str, HookEntry]:
    """Turns hook markers into names, in place: each marked value gets the name of its hook point.

    The logits keep the name ``logits``. Hook points that mark one value (resid_post and the next resid_pre) share it:
    the value has the name of the first.

    Args:
        model: A traced and optimised graph.
        n_layers: The number of blocks.

    Returns:
        Hook name -> its value, axes and dtype, in firing order.

    Raises:
        ExportError: A hook point was traced twice, or has a name that graphlens does not know.
    """
    carried = _remove_markers(model)
    hooks: dict[str, HookEntry] = {}
    named: dict[int, str] = {}
    for name in graph_order(model.graph, carried, n_layers):
        value = carried[name]
        if id(value) not in named:
            named[id(value)] = value.name = LOGITS if value.is_graph_output() else name
        dtype = str(value.dtype).lower() if value.dtype is not None else "unknown"
        axes = axes_of(name, None if value.shape is None else len(value.shape))
        hooks[name] = HookEntry(named[id(value)], axes, _NUMPY_NAMES.get(dtype, dtype))
    if len(hooks) != len(carried):
        raise ExportError(
            f"internal error: traced hook points without a known name: {sorted(set(carried) - set(hooks))}"
        )
    return hooks


def _remove_markers(model: ir.Model) -> dict[str, ir.Value]:
    """Takes the hook markers out of a graph, in place. Returns hook name -> the value that was marked."""
    carried: dict[str, ir.Value] = {}
    for node in list(model.graph):
        if node.op_type == FORK_OP and node.domain == HOOK_DOMAIN:
            assert node.inputs[0] is not None
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            model.graph.remove(node, safe=True)
    for node in list(model.graph):
        if node.op_type != HOOK_OP or node.domain != HOOK_DOMAIN:
            continue
        (marked,), (result,) = node.inputs, node.outputs
        name = node.attributes["name"].as_string()
        if marked is None or name in carried:
            raise ExportError(f"internal error: hook point {name!r} was traced twice or marks nothing")
        if marked.shape is None or marked.dtype is None:
            marked.shape, marked.type = result.shape, result.type
        result.replace_all_uses_with(marked, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
        carried[name] = marked
    model.opset_imports.pop(HOOK_DOMAIN, None)
    return carried


def bind_weights(
    model: ir.Model,
    place_of: Callable[[str, tuple[int, ...]], tuple[str, str]],
    entries: Mapping[str, Mapping[str, TensorEntry]],
    folder: Path,
) -> dict[str, tuple[str, str]]:
    """Points every weight of a graph, in place, at its bytes in a safetensors file.

    Args:
        model: A graph from ``optimise``.
        place_of: Gives the (file, key) of a parameter from its name and shape.
        entries: File -> key -> where the tensor lies in it.
        folder: The folder of those files.

    Returns:
        The name of each parameter of the graph -> its (file, key).
    """
    places = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.shape is not None
        shape = tuple(int(size) for size in value.shape)  # type: ignore[arg-type]
        file, key = places[name] = place_of(name, shape)
        bind(value, folder / file, entries[file][key])
    return places


def tidy(model: ir.Model) -> None:
    """Sorts a graph, in place, gives its nodes names of one kind, and removes what tells of the code it was traced from."""
    common_passes.RemoveUnusedNodesPass()(model)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "graphlens", None
    model.metadata_props.clear()
    graph = model.graph
    graph.name = "graphlens"
    graph.metadata_props.clear()
    graph.sort()
    for index, node in enumerate(graph):
        node.metadata_props.clear()
        node.doc_string = None
        node.name = f"{node.op_type}_{index}"
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
