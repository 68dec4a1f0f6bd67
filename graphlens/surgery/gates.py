"""Gates: hook points whose change is an input of the graph, so that a run can be edited with no Python in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.edits.gate import PARTS
from graphlens.errors import InputError
from graphlens.file.names import SCORES, split_name
from graphlens.surgery.graph import read_manifest
from graphlens.surgery.splice import Edit, Scope, splice


def gate_input(hook: str, part: str) -> str:
    """The name of an input of a hook point's gate: ``part`` is "scale", "add", "where" or "patch"."""
    return f"{hook}/{part}"


def with_gates(model: ir.Model, gates: Mapping[str, Sequence[str]], required: bool = False) -> ir.Model:
    """A copy in which each named hook point carries ``where(where, patch, x * scale + add)``, these being inputs.

    ``gates`` maps hook names to the kinds of change wanted there: "scale", "add", "patch" (which has the inputs "where"
    and "patch"). Inputs have as many axes as the hook point, each 1 or its size, and defaults that change nothing; with
    ``required`` they have none and must be fed, for runtimes that refuse optional inputs. At hook_attn_scores masked
    entries (-inf) stay as they are. Raises UnknownHookPoint, InputError for an unknown kind, and at an integer hook point
    for any but "patch".
    """
    hooks = read_manifest(model).hooks
    for name, kinds in gates.items():
        unknown = set(kinds) - set(PARTS)
        if unknown or not kinds:
            raise InputError(f"{name!r}: a gate has one or more of {', '.join(PARTS)}, not {sorted(unknown)}.")
        if name in hooks and hooks[name].dtype.startswith("int") and set(kinds) != {"patch"}:
            raise InputError(f"{name!r} holds integers, which can only be patched.")
    return splice(model, {name: _gate(tuple(kinds), required) for name, kinds in gates.items()})


def keep_masked(before: ir.Value, after: ir.Value, scope: Scope) -> ir.Value:
    """``after``, but with the masked entries (-inf) of attention scores as they were ``before``."""
    if split_name(scope.hook)[1] != SCORES:
        return after
    masked = scope.op("IsInf", [before], detect_positive=0)
    return scope.op("Where", [masked, before, after])


def _gate(kinds: Sequence[str], required: bool) -> Edit:
    def edit(value: ir.Value, scope: Scope) -> ir.Value:
        assert value.dtype is not None
        assert value.shape is not None
        dtype, rank = value.dtype, len(value.shape)

        def part(name: str, default: float | bool, kind: ir.DataType = dtype) -> ir.Value:
            full = gate_input(scope.hook, name)
            axes = [f"{full}:{index}" for index in range(rank)]
            if not required:
                return scope.input(full, np.full((1,) * rank, default, kind.numpy()), axes)
            found = ir.Value(name=full, shape=ir.Shape(axes), type=ir.TensorType(kind))
            scope.graph.inputs.append(found)
            return found

        result = value
        if "scale" in kinds:
            result = scope.op("Mul", [result, part("scale", 1)])
        if "add" in kinds:
            result = scope.op("Add", [result, part("add", 0)])
        if "patch" in kinds:
            result = scope.op("Where", [part("where", False, ir.DataType.BOOL), part("patch", 0), result])
        return keep_masked(value, result, scope)

    return edit


def without_gates(model: ir.Model) -> ir.Model:
    """A copy of a graph in which the gates of ``with_gates`` are gone; one without any comes back as a copy."""
    model = model.clone()
    graph = model.graph
    parts = {value.name: value for value in graph.inputs if _is_gate_input(value, graph)}
    names: dict[ir.Value, str] = {}  # an unedited value -> the name its gate had taken
    gates = [(node, value) for node in graph for value in node.inputs if value is not None and value.name in parts]
    for node, value in gates:
        if node.graph is None:  # a patch has two inputs
            continue
        hook = str(value.name).rpartition("/")[0]
        kept = node.inputs[2] if node.op_type == "Where" else node.inputs[0]
        assert kept is not None
        _replace(graph, node, kept, names, hook)
        for user, _ in tuple(kept.uses()):
            if user.op_type == "Where" and user.inputs[1] is user.inputs[2] is kept:  # what kept masked scores
                _replace(graph, user, kept, names, hook)
    for name, value in parts.items():
        graph.inputs.remove(value)
        graph.initializers.pop(str(name), None)
    common_passes.RemoveUnusedNodesPass()(model)
    for value, name in names.items():
        value.name = name
    return model


def _is_gate_input(value: ir.Value, graph: ir.Graph) -> bool:
    hook, _, part = str(value.name).rpartition("/")
    return part in {name for names in PARTS.values() for name in names} and "hook_" in hook


def _replace(graph: ir.Graph, node: ir.Node, kept: ir.Value, names: dict[ir.Value, str], hook: str) -> None:
    """Takes a node of a hook point's gate out; what it gave becomes ``kept``."""
    gone = node.outputs[0]
    if str(kept.name).startswith(f"{hook}/unedited"):  # not where the hook point's twin had the value's name
        names[kept] = str(gone.name)
    outputs = graph.outputs
    for index, output in enumerate(outputs):
        if output is gone:
            outputs[index] = kept
    gone.name = f"{gone.name}/removed"
    gone.replace_all_uses_with(kept)
    graph.remove(node, safe=True)
