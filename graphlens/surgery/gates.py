"""Gates: hook points whose change is an input of the graph, so that a run can be edited with no Python in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.edits.parts import INPUTS, PARTS
from graphlens.errors import InputError
from graphlens.file.manifest import METADATA_KEY
from graphlens.file.names import MASKED_BELOW, SCORES, split_name
from graphlens.surgery.graph import finish, read_manifest, set_outputs
from graphlens.surgery.splice import Edit, Scope, splice


def gate_input(hook: str, part: str) -> str:
    """The name of an input of a hook point's gate.

    Args:
        hook: The hook point's name.
        part: "scale", "add", "where" or "patch".

    Returns:
        The input's name in the graph: "blocks.0.attn.hook_z/scale".
    """
    return f"{hook}/{part}"


def with_gates(model: ir.Model, gates: Mapping[str, Sequence[str]], required: bool = False) -> ir.Model:
    """A copy in which each named hook point carries ``where(where, patch, x * scale + add)``, these being inputs.

    An input has as many axes as the hook point, each 1 or its size. At hook_attn_scores masked entries (-inf) stay as
    they are.

    Args:
        model: A hooked model.
        gates: Hook names -> the parts wanted there: "scale", "add", "patch" (which has the inputs "where" and "patch").
        required: True makes inputs without defaults, which every run must feed, for runtimes that refuse optional
            inputs. Otherwise they have defaults that change nothing.

    Returns:
        The copy. Its inputs are named by ``gate_input``.

    Raises:
        UnknownHookPoint: For a hook point that the model does not have.
        InputError: For a part that there is not, and for any but "patch" at a hook point of integers.
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
    """An edited activation in which masked attention scores are masked still.

    Args:
        before: The activation before the edit.
        after: The activation after it.
        scope: That of the hook point.

    Returns:
        At hook_attn_scores ``after`` with the entries that are -inf in ``before`` as they were, elsewhere ``after``. Adopted
        files may mask with a low number instead.
    """
    if split_name(scope.hook)[1] != SCORES:
        return after
    if scope.masks_with_numbers:
        assert before.dtype is not None
        lowest = scope.constant(np.asarray(MASKED_BELOW, before.dtype.numpy()), "masked")
        masked = scope.op("Less", [before, lowest])
    else:
        masked = scope.op("IsInf", [before], detect_positive=0)
    return scope.op("Where", [masked, before, after])


def _gate(kinds: Sequence[str], required: bool) -> Edit:
    """The edit that gives a hook point the named parts of a gate."""

    def edit(value: ir.Value, scope: Scope) -> ir.Value:
        result = value
        for part in PARTS.values():
            if part.name in kinds:
                inputs = [_input(name, nothing, value, scope, required) for name, nothing in part.inputs.items()]
                result = scope.op(part.operator, part.arguments(result, inputs))
        return keep_masked(value, result, scope)

    return edit


def _input(name: str, nothing: float, value: ir.Value, scope: Scope, required: bool) -> ir.Value:
    """Adds an input of a hook point's gate, which changes nothing where it is ``nothing``."""
    assert value.dtype is not None
    assert value.shape is not None
    dtype = ir.DataType.BOOL if isinstance(nothing, bool) else value.dtype
    full, rank = gate_input(scope.hook, name), len(value.shape)
    axes = [f"{full}:{index}" for index in range(rank)]
    if not required:
        return scope.input(full, np.full((1,) * rank, nothing, dtype.numpy()), axes)
    found = ir.Value(name=full, shape=ir.Shape(axes), type=ir.TensorType(dtype))
    scope.graph.inputs.append(found)
    return found


def without_gates(model: ir.Model) -> ir.Model:
    """A copy of a graph in which the gates of ``with_gates`` are gone.

    Args:
        model: A graph. One without gates comes back as a copy.

    Returns:
        The copy, in which values have the names that they had before ``with_gates``, and hook points the values.
    """
    model = model.clone()
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs if _is_gate_input(str(value.name))}
    names: dict[ir.Value, str] = {}  # an unedited value -> the name its gate had taken
    left: dict[str, ir.Value] = {}  # the name of what a gate gave -> what is there instead
    gates = [
        (node, value.name) for node in graph for value in node.inputs if value is not None and value.name in inputs
    ]
    for node, name in gates:
        if node.graph is None:  # gone already: a patch has two inputs
            continue
        hook, _, part = str(name).rpartition("/")
        kept = node.inputs[INPUTS[part].place]
        assert kept is not None
        left[str(node.outputs[0].name)] = kept
        _replace(graph, node, kept, names, hook)
        for user, _ in tuple(kept.uses()):
            if user.op_type == "Where" and user.inputs[1] is user.inputs[2] is kept:  # what kept masked scores
                left[str(user.outputs[0].name)] = kept
                _replace(graph, user, kept, names, hook)
    for value in inputs.values():
        graph.inputs.remove(value)
        graph.initializers.pop(str(value.name), None)
    common_passes.RemoveUnusedNodesPass()(model)
    for value, earlier in names.items():
        value.name = earlier
    if not left:
        return model
    # Of hook points that share a value each had an output of its own while it had a gate.
    set_outputs(graph, list(dict.fromkeys(graph.outputs)))
    if METADATA_KEY not in model.metadata_props:
        return model
    manifest = read_manifest(model)
    hooks = {
        name: replace(entry, value=str(left[entry.value].name)) if entry.value in left else entry
        for name, entry in manifest.hooks.items()
    }
    return finish(model, manifest.with_hooks(hooks))


def _is_gate_input(name: str) -> bool:
    """True for the name of a gate's input."""
    hook, _, part = name.rpartition("/")
    return part in INPUTS and "hook_" in hook


def _replace(graph: ir.Graph, node: ir.Node, kept: ir.Value, names: dict[ir.Value, str], hook: str) -> None:
    """Takes a node of a hook point's gate out; what it gave becomes ``kept``."""
    gone = node.outputs[0]
    if str(kept.name).startswith(f"{hook}/unedited"):  # not where the hook point's twin had the value's name
        names[kept] = str(gone.name)
    gone.name = f"{gone.name}/removed"
    gone.replace_all_uses_with(kept, replace_graph_outputs=True)
    graph.remove(node, safe=True)
