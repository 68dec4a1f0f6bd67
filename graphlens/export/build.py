"""From a traced graph with marked hook points to the hooked graph: optimised, named, bound to the weights files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript import optimizer

from graphlens.errors import ExportError
from graphlens.export.trace import HOOK_DOMAIN, HOOK_OP, MODEL_PREFIX
from graphlens.file.manifest import HookEntry
from graphlens.file.names import axes_of, firing_order

if TYPE_CHECKING:
    from graphlens.file.safetensors import TensorEntry

IR_VERSION = 10
LOGITS = "logits"
_DTYPES = {
    "F64": ir.DataType.DOUBLE,
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
}


def optimise(model: ir.Model) -> None:
    """Simplifies a traced graph in place.

    The weights become graph inputs meanwhile: the optimiser then neither folds them, nor reads them, nor merges two
    that happen to be equal (which would tie layers together for good).
    """
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
    """Removes reshapes to the shape a value has already (transformers views input_ids as what they are), in place.

    Besides costing nothing, the graph is then free of needs it does not have: the embedding of tokens needs no mask.
    """
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
    """Removes the hook markers in place, gives each marked value its hook name, and returns the hook map.

    The logits keep the name ``logits``. Hook points that mark one value (resid_post and the next resid_pre) share it:
    the value has the name of the first.
    """
    carried: dict[str, ir.Value] = {}
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
    hooks: dict[str, HookEntry] = {}
    named: dict[int, str] = {}
    for name in firing_order(carried, n_layers):
        value = carried[name]
        if id(value) not in named:
            named[id(value)] = value.name = LOGITS if value.is_graph_output() else name
        dtype = str(value.dtype).lower() if value.dtype is not None else "unknown"
        hooks[name] = HookEntry(named[id(value)], axes_of(name), _NUMPY_NAMES.get(dtype, dtype))
    if len(hooks) != len(carried):
        raise ExportError(
            f"internal error: traced hook points without a known name: {sorted(set(carried) - set(hooks))}"
        )
    return hooks


_NUMPY_NAMES = {"float": "float32", "double": "float64"}


def bind_weights(
    model: ir.Model,
    place_of: Callable[[str, tuple[int, ...]], tuple[str, str]],
    entries: Mapping[str, Mapping[str, TensorEntry]],
    folder: Path,
) -> dict[str, tuple[str, str]]:
    """Points every weight of the graph (in place) at its bytes in a safetensors file of ``folder``.

    ``place_of(parameter, shape)`` gives its (file, key) and ``entries[file][key]`` its bytes. Returns the places.
    """
    places = {}
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            continue
        assert value.shape is not None
        shape = tuple(int(size) for size in value.shape)  # type: ignore[arg-type]
        file, key = places[name] = place_of(name, shape)
        entry = entries[file][key]
        value.const_value = ir.ExternalTensor(
            file,
            entry.offset,
            entry.length,
            _DTYPES[entry.dtype],
            shape=ir.Shape(shape),
            name=name,
            base_dir=str(folder),
        )
    return places


def tidy(model: ir.Model) -> None:
    """Leaves one graph, in topological order, with unique names and no traces of the source code, in place."""
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
