"""Which values a model returns: exposing hook points, stripping them, and pruning what no output needs."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir
import onnx_ir.passes.common as common_passes

from graphlens.file.io_names import LOGITS, PRESENT
from graphlens.file.manifest import METADATA_KEY
from graphlens.file.names import UNEMBEDDED, unknown_hook
from graphlens.surgery.graph import (
    drop_unused,
    ensure_hooks_resolve,
    finish,
    read_manifest,
    set_outputs,
    values_by_name,
)
from graphlens.surgery.values import Values


def _resolve(model: ir.Model, names: Iterable[str]) -> list[str]:
    """Hook names (or ``logits``) -> the distinct values that carry them, in firing order."""
    manifest = read_manifest(model)
    wanted = set()
    for name in names:
        if name != LOGITS and name not in manifest.hooks:
            raise unknown_hook(name, list(manifest.hooks), manifest.config.n_layers)
        wanted.add(name)
    carried = [entry.value for name, entry in manifest.hooks.items() if name in wanted]
    return list(dict.fromkeys([*carried, *([LOGITS] if LOGITS in wanted else [])]))


def _returning(model: ir.Model, value_names: Iterable[str]) -> ir.Model:
    """A copy with the outputs of these names."""
    model = model.clone()
    values = values_by_name(model)
    set_outputs(model.graph, [values[name] for name in value_names])
    return model


def expose(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy that returns more of what it computes, and is otherwise the same.

    Args:
        model: A model.
        names: Of a hooked model, names of hook points; those that share a value share an output. Of any other model,
            names of values that nodes of its main graph compute.

    Returns:
        The copy. Of a hooked model its outputs are ``logits`` and the values of the hook points, in firing order, then the
        keys and values that an adopted model with a KV cache returns; of any other model its own outputs, and the values
        after them in the order in which they are computed.

    Raises:
        UnknownHookPoint: The model is hooked and has no hook point of that name.
        InputError: The model is not hooked, and no node of its main graph computes a value of that name.
    """
    if METADATA_KEY not in model.metadata_props:
        return with_values(model, names)
    present = [str(value.name) for value in model.graph.outputs if str(value.name).startswith(PRESENT)]
    value_names = [LOGITS, *(name for name in _resolve(model, names) if name != LOGITS), *present]
    return ensure_hooks_resolve(_returning(model, value_names))


def with_values(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy that returns values besides its own outputs, whether they are hook points or not.

    Args:
        model: Any model.
        names: Names of values that nodes of its main graph compute.

    Returns:
        The copy.

    Raises:
        InputError: No node of the main graph computes a value of that name; it says what the name is instead.
    """
    wanted = set(names)
    found = Values.of(model)
    for name in wanted - found.computed.keys():
        raise found.unknown(name)
    kept = [str(value.name) for value in model.graph.outputs]
    return _returning(model, [*kept, *(name for name in found.computed if name in wanted and name not in kept)])


def strip(model: ir.Model) -> ir.Model:
    """A copy that returns ``logits`` alone. Its hook points are still there, and can be exposed again.

    Args:
        model: A hooked model.

    Returns:
        The copy.
    """
    return expose(model, ())


def prune(model: ir.Model, outputs: Iterable[str]) -> ir.Model:
    """A copy that returns only some outputs, and holds only what they need.

    Fetching fewer outputs of a session skips no work; a pruned graph does (it may stop at a layer, say). The hook map
    keeps the hook points that are still computed.

    Args:
        model: A hooked model.
        outputs: Names of hook points, or ``logits``.

    Returns:
        The copy.

    Raises:
        UnknownHookPoint: The model has no hook point of that name.
    """
    model = _returning(model, _resolve(model, outputs))
    drop_unused(model)
    return _without_lost_hooks(model)


def _without_lost_hooks(model: ir.Model) -> ir.Model:
    """The model itself, its hook map without the hook points that are computed no more."""
    manifest, alive = read_manifest(model), values_by_name(model).keys()
    return finish(model, manifest.with_hooks({n: h for n, h in manifest.hooks.items() if h.value in alive}))


def keep_results(model: ir.Model) -> ir.Model:
    """A copy that returns only what a run is for: logits (or the residual of a segment), and present keys and values.

    Args:
        model: A hooked model.

    Returns:
        The copy.
    """
    hooked = {entry.value for entry in read_manifest(model).hooks.values()} - {LOGITS}
    model = model.clone()
    set_outputs(model.graph, [value for value in model.graph.outputs if value.name not in hooked])
    return ensure_hooks_resolve(model)


def without_logits(model: ir.Model) -> ir.Model:
    """A copy that stops where the unembedding begins: what that reads is an output in place of ``logits``.

    Args:
        model: A hooked model.

    Returns:
        The copy.

    Raises:
        UnknownHookPoint: The model has no ``unembed.hook_in``.
    """
    (end,) = _resolve(model, [UNEMBEDDED])
    kept = [str(value.name) for value in model.graph.outputs if value.name not in (LOGITS, end)]
    model = _returning(model, [*kept, end])
    common_passes.RemoveUnusedNodesPass()(model)
    return _without_lost_hooks(model)
